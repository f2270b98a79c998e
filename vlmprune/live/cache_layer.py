"""What cache layers of ours have, whatever they store their entries in: a tensor that grows, or one of a fixed length."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from vlmprune.live.entries import Entries
from vlmprune.live.marks import Marks
from vlmprune.live.owner import Owner

REMOVED = (
    "this conversation was pruned, and the recipe it began with has been removed from the model: go on inside the `with` block "
    "(before run.remove()), wrap the model with that recipe again, or start with an empty cache."
)
UNWRAPPED = (
    "this conversation was pruned by a wrapped model; an un-wrapped model cannot continue it: go on in the model it began in, "
    "or start with an empty cache."
)


class Marked(CacheLayerMixin):
    """A cache layer with `marks`, which follow everything that happens to its entries."""

    marks: Marks | None = None

    def reset(self) -> None:
        super().reset()
        self.marks = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.marks is not None:
            self.marks.batch(beam_idx)


class Pruned(Marked):
    """A cache layer that stores fewer entries than the conversation has tokens.

    Attributes:
        recorded: the entries of prompts; what is stored after them is stored token by token. None while there are none.
        lost: how many entries, the first of these, left the layer's window and are stored no more.
        stages: layers of the recipe's stages. A conversation goes on only under stages at the same layers, because these decide
            which layers have equal entries.
        owner: whose conversation it is.
    """

    device: torch.device
    recorded: Entries | None = None
    lost = 0
    stages: tuple[int, ...] = ()
    owner: Owner | None = None

    @property
    def stored(self) -> int:
        """Entries per row."""
        raise NotImplementedError

    @property
    def entries(self) -> Entries:
        """All that is stored."""
        if self.recorded is None:
            assert self.keys is not None
            return Entries.complete(self.keys.shape[0], self.stored, self.device, None)
        return self.recorded.then(self.stored + self.lost - self.recorded.slots.shape[1]).last(self.stored)

    @property
    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[batch, kv_head, stored, dim]` in the order of the conversation."""
        raise NotImplementedError

    def record(self, entries: Entries) -> None:
        """The call that runs will store the last of `entries`, so that these are all."""
        self.recorded, self.lost = entries, 0

    def refill(self, keys: Tensor, values: Tensor, entries: Entries) -> None:
        """Store `entries`, and nothing else any more."""
        raise NotImplementedError

    def reset(self) -> None:
        super().reset()
        self.recorded, self.lost = None, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.recorded = None if self.recorded is None else self.recorded.select(beam_idx)
