"""What attention redistribution found out about a conversation's tokens, kept on the layers of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmprune.device import on_device

SPARE = 256
"""Entries that tables are made for beyond those that exist: so many decoding steps need no new table."""


@dataclass(eq=False)
class Marks:
    """What a redistribution method found out about a conversation's prompts, in one decoder layer.

    Entries are the cached tokens of the layer. Those up to the end of the last prompt have a group each; later ones (decoding)
    are ordinary. `membership`, `present` and `weight` are tables made from `groups`.

    Attributes:
        by: the method, as its recipe string.
        groups: `[batch, 1 or head, marked]` int8 group of each entry, 0 for ordinary ones. None if the method marks no entries.
        heads: `[batch, head]` fp32 factor on the outputs of heads, or None.
        anchor: `[batch, dim]` fp32 residual of the conversation's first token, if the method compares with it; otherwise None.
        membership: `[batch, 1 or head, entry, 1 + groups]`, 1 for the group that an entry is in and 0 for the others.
        present: `[batch, 1 or head, 1, 1 + groups]` bool, which groups have a marked entry.
        weight: `[batch, entry]` the fraction of their absolute value by which scores are raised.
        step: the edit of a decoding step, made from the tables; it is neither copied nor stored with the marks.
        idle: no entry is marked, and the host knows it.
    """

    by: str
    groups: Tensor | None = None
    heads: Tensor | None = None
    anchor: Tensor | None = None
    membership: Tensor | None = None
    present: Tensor | None = None
    weight: Tensor | None = None
    step: Any = None
    idle: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "step": None}

    def members(self, count: int, entries: int, dtype: torch.dtype) -> Tensor:
        """`[batch, 1 or head, entries, 1 + count]` of `dtype`: `membership` of the first `entries`, in `count` groups. A GPU's
        kernel needs the marked entries only, and gets these."""
        assert self.groups is not None
        table, entries = self.membership, self._needed(entries)
        if table is None or table.dtype != dtype or table.shape[2] < entries:
            numbers = torch.arange(count + 1, device=self.groups.device)
            self.present = (self.groups[..., None] == numbers).any(dim=2, keepdim=True)
            table = self.membership = (self.padded(entries + SPARE)[..., None] == numbers).to(dtype)
        return table[:, :, :entries]

    def weights(self, strengths: Sequence[float], entries: int, dtype: torch.dtype) -> Tensor:
        """`[batch, entries]` of `dtype`: the strength of the group that an entry is in, 0 for ordinary ones. A GPU gets the
        marked entries only."""
        assert self.groups is not None
        table, entries = self.weight, self._needed(entries)
        if table is None or table.dtype != dtype or table.shape[1] < entries:
            of_group = on_device(np.array((0.0, *strengths)), self.groups.device).to(dtype)
            table = self.weight = of_group[self.padded(entries + SPARE)[:, 0].long()]
        return table[:, :entries]

    def _needed(self, entries: int) -> int:
        """How many entries a table must have: torch is faster with all of them, a GPU's kernel with the marked ones."""
        assert self.groups is not None
        return entries if self.groups.device.type == "cpu" else self.groups.shape[-1]

    def padded(self, entries: int) -> Tensor:
        """The groups of exactly `entries` entries, at least as many as are marked."""
        assert self.groups is not None
        return torch.nn.functional.pad(self.groups, (0, entries - self.groups.shape[-1]))

    def batch(self, indices: Tensor) -> None:
        """Take other batch rows (beams, contrastive search)."""
        for name in ("groups", "heads", "anchor"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, x[indices.to(x.device)])
        self._forget_tables()

    def repeat(self, repeats: int) -> None:
        """Repeat every batch row."""
        for name in ("groups", "heads", "anchor"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, x.repeat_interleave(repeats, dim=0))
        self._forget_tables()

    def keep_entries(self, rows: Tensor, entries: int) -> None:
        """Of `entries` entries, keep those at `rows` `[batch, kept]`."""
        if self.groups is not None:
            rows = rows.to(self.groups.device)[:, None].expand(-1, self.groups.shape[1], -1)
            self.groups = self.padded(entries).gather(2, rows)
            self._forget_tables()

    def crop(self, entries: int) -> None:
        """Keep the first `entries` entries."""
        if self.groups is not None:
            self.groups = self.groups[..., :entries]
            self._forget_tables()

    def _forget_tables(self) -> None:
        self.membership = self.present = self.weight = self.step = None
