"""Which tokens the entries of a KV cache stand for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vlmprune.device import on_host


@dataclass(eq=False)
class Entries:
    """What cache layers store of a conversation's prompts and later turns; what follows (decoding) is stored token by token.

    It is never changed, and the layers of one section share it.

    Attributes:
        slots: `[batch, stored]` slot of each entry.
        valid: `[batch, stored]` bool, False where a ragged batch is padded.
        dense: every entry is valid.
        tokens: how many tokens of the conversation they stand for, dropped ones included.
        unpadded: no token of the conversation was hidden, of the dropped ones neither.
        shift: `[batch]` by how much rotary positions of later tokens are smaller than their slots; None where they are equal.
    """

    slots: Tensor
    valid: Tensor
    dense: bool
    tokens: int
    unpadded: bool = True
    shift: Tensor | None = None
    _selected: tuple[Tensor, Entries] | None = field(default=None, repr=False, init=False)
    _cropped: tuple[int, Entries] | None = field(default=None, repr=False, init=False)
    _placed: dict[tuple[int, int | None], tuple[Tensor, ...]] = field(default_factory=dict, repr=False, init=False)

    @property
    def dropped(self) -> int:
        """How many tokens of the conversation have no entry, in the row with the most entries."""
        return self.tokens - int(self.slots.shape[1])

    @staticmethod
    def complete(batch: int, tokens: int, device: torch.device, real: Tensor | None, unpadded: bool | None = None) -> Entries:
        """Of a layer that dropped nothing. `real` `[batch, tokens or more]` is 0 on padding; whether there is none is read from
        it, which waits for the device, unless it is known."""
        slots = torch.arange(tokens, device=device).expand(batch, tokens)
        valid = torch.ones_like(slots, dtype=torch.bool) if real is None else real[:, :tokens].to(device, torch.bool)
        dense = real is None or (bool(on_host(valid.all())) if unpadded is None else unpadded)
        return Entries(slots, valid, dense, tokens, unpadded=dense)

    def then(self, more: int) -> Entries:
        """With `more` entries after them, one for each token."""
        if not more:
            return self
        batch, device = self.slots.shape[0], self.slots.device
        slots = torch.arange(self.tokens, self.tokens + more, device=device).expand(batch, more)
        return self.joined(Entries(slots, torch.ones_like(slots, dtype=torch.bool), True, more))

    def last(self, stored: int) -> Entries:
        """Only the last `stored` entries: those before them left a window."""
        lost = self.slots.shape[1] - stored
        return self if lost <= 0 else replace(self, slots=self.slots[:, lost:], valid=self.valid[:, lost:])

    def joined(self, later: Entries) -> Entries:
        """With those of the `later.tokens` tokens that follow; `later.slots` count from the conversation's first token."""
        shift = self.shift if later.shift is None else later.shift + (0 if self.shift is None else self.shift)
        return Entries(
            torch.cat((self.slots, later.slots), dim=1),
            torch.cat((self.valid, later.valid), dim=1),
            self.dense and later.dense,
            self.tokens + later.tokens,
            self.unpadded and later.unpadded,
            shift,
        )

    def select(self, indices: Tensor) -> Entries:
        """Other batch rows (beams, contrastive search)."""
        if self._selected is None or self._selected[0] is not indices:  # the layers of a section ask one after the other
            here = indices.to(self.slots.device)
            shift = None if self.shift is None else self.shift[here]
            made = Entries(self.slots[here], self.valid[here], self.dense, self.tokens, self.unpadded, shift)
            self._selected = indices, made
        return self._selected[1]

    def repeat(self, repeats: int) -> Entries:
        """Every batch row several times."""
        return self.select(torch.arange(len(self.slots), device=self.slots.device).repeat_interleave(repeats))

    def crop(self, remove: int) -> Entries | None:
        """Without the last `remove` tokens of the conversation; None if some of these were dropped or hidden."""
        if self._cropped is None or self._cropped[0] != remove:
            kept, tokens = self.slots.shape[1] - remove, self.tokens - remove
            expected = torch.arange(tokens, self.tokens, device=self.slots.device)
            if kept < 0 or not on_host((self.slots[:, kept:] == expected).all() & self.valid[:, kept:].all()):
                return None
            made = Entries(self.slots[:, :kept], self.valid[:, :kept], self.dense, tokens, self.unpadded, self.shift)
            self._cropped = remove, made
        return self._cropped[1]

    def placed(self, room: int, limit: int | None) -> tuple[Tensor, ...]:
        """These entries in tensors of a fixed length: entry number n is in place n, or in n modulo `room` of a ring.

        Args:
            room: number of places.
            limit: tokens that the conversation may have; None for a ring.

        Returns:
            `[batch, place]` slots, and which of them can be seen; numbers on the device: tokens without entry, and entries. All
            places but those of a ring also have the slots of entries to come.
        """
        if (room, limit) not in self._placed:
            batch, stored = self.slots.shape
            device, number = self.slots.device, torch.arange(max(stored - room, 0), stored, device=self.slots.device)
            slots = torch.zeros(batch, room, dtype=torch.long, device=device)
            seen = torch.zeros(batch, room, dtype=torch.bool, device=device)
            slots[:, number % room], seen[:, number % room] = self.slots[:, number], self.valid[:, number]
            if limit is not None:
                coming = torch.arange(self.tokens, self.tokens + room - stored, device=device)
                slots[:, stored:], seen[:, stored:] = coming.clamp(max=limit - 1), coming < limit
            numbers = (torch.tensor(n, device=device) for n in (self.dropped, stored))
            self._placed[room, limit] = (slots, seen, *numbers)
        return self._placed[room, limit]
