"""What was observed of each visual token inside the vision tower, looked up by a hash of its feature row.

Packing, un-padding and beam expansion move and copy feature rows, but do not change their contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock, local
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from vlmprune.device import on_host
from vlmprune.errors import UsageError

INDEX_ROWS = 1 << 15
"""Visual tokens whose entries are kept after their features are gone (56 pictures of 576), and at least the last pass: so many
for each thread, and so many for all threads together."""

HASHED = 128
"""Leading numbers of a feature row that its hash is made of."""


@dataclass(frozen=True, eq=False)
class Observed:
    """What was observed in one pass through the tower.

    Attributes:
        hashes: `[row]` of the feature rows, sorted.
        order: `[row]` which row of `probes` each hash belongs to.
        probes: `[row, …]` by probe, without gradient.
        graph: probes that a method may merge, with their gradient, until the prompt of the same call has taken them.
        holders: weak references to what the pass returned: the storage of the features, and the tower's output.
    """

    hashes: Tensor
    order: Tensor
    probes: dict[str, Tensor]
    graph: dict[str, Tensor]
    holders: list[ReferenceType[Any]]

    @property
    def in_use(self) -> bool:
        """Whether anyone still holds what the pass returned."""
        return any(holder() is not None for holder in self.holders)


class _OfThread(local):
    """The entries of one thread, the latest first."""

    entries: tuple[Observed, ...] = ()


class FeatureIndex:
    """What was observed of each visual token inside the tower, by the token's features.

    An entry is kept as long as its features are in use anywhere. Features are copied on their way (un-padding, packing,
    beams). Therefore the latest entries of every thread are kept too, which other threads cannot push out, and the latest of
    all threads.
    """

    def __init__(self) -> None:
        self._own, self._lock = _OfThread(), Lock()
        self._all: tuple[Observed, ...] = ()

    def add(
        self, features: Tensor, probes: dict[str, Tensor], holders: Sequence[Any] = (), differentiable: bool = False
    ) -> Observed:
        """File `probes`, `[row, …]` each, under `features` `[row, dim]`, at least as long as any of `holders` exists.

        Args:
            features: `[row, dim]` that entered, or will enter, the language model.
            probes: by name.
            holders: objects whose life keeps the entry.
            differentiable: the prompt follows in the same call, and its gradient runs through the probes.
        """
        hashes, order = hash_rows(features).sort(stable=True)
        plain = {name: value.detach() for name, value in probes.items()}
        graph = {name: value for name, value in probes.items() if differentiable and name == "tower_features"}
        new = Observed(hashes, order, plain, graph, [ref(x) for x in holders if hasattr(x, "__weakref__")])
        self._own.entries = _latest((new, *self._own.entries))
        with self._lock:
            entries = (new, *self._all)
            recent = _latest(entries)
            self._all = (*recent, *(entry for entry in entries[len(recent) :] if entry.in_use))
        return new

    def find(self, pictures: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The probes of each picture's features `[row, dim]`, one row each; −1 for rows of NaN, which were dropped.

        Raises:
            UsageError: the features did not come from the wrapped model's tower.
        """
        wanted = [hash_rows(features) for features in pictures]
        there = [~features[:, 0].isnan() for features in pictures]
        found: dict[int, dict[str, Tensor]] = {}
        used: set[Observed] = set()
        for entry in dict.fromkeys((*self._own.entries, *self._all)):  # an entry may be in both
            missing = [number for number in range(len(pictures)) if number not in found]
            if not missing:
                break
            hashes = entry.hashes.to(wanted[0].device)
            places = {number: torch.searchsorted(hashes, wanted[number]).clamp_(max=len(hashes) - 1) for number in missing}
            hits = [((hashes[place] == wanted[number]) | ~there[number]).all() for number, place in places.items()]
            for number, hit in zip(missing, on_host(torch.stack(hits)), strict=True):
                if hit:
                    used.add(entry)
                    # Of equal rows, the first takes the first entry, the second the second.
                    twin = (places[number] + _repetition(wanted[number])).clamp_(max=len(hashes) - 1)
                    place = torch.where(hashes[twin] == wanted[number], twin, places[number])
                    rows = entry.order.to(place.device)[place]
                    found[number] = {
                        name: _rows(value, rows, there[number]) for name, value in {**entry.probes, **entry.graph}.items()
                    }
        if len(found) < len(pictures):
            raise UsageError(
                "the vision tower's features of a picture are unknown: this model did not compute them while it was wrapped "
                "with this recipe, or they were changed, or copied long ago; pass pixel_values instead of encoded features."
            )
        for entry in used:
            entry.graph.clear()
        return [found[number] for number in range(len(pictures))]


def _latest(entries: Sequence[Observed]) -> tuple[Observed, ...]:
    """The first entries that together have at most `INDEX_ROWS` rows, and at least one."""
    rows, count = 0, 0
    for entry in entries:
        rows += len(entry.hashes)
        if count and rows > INDEX_ROWS:
            break
        count += 1
    return tuple(entries[:count])


def hash_rows(features: Tensor) -> Tensor:
    """`[row]` int64 hashes of the rows of `features` `[row, dim]`: a random sum over the bits of their leading numbers."""
    bits = features[:, :HASHED].detach().contiguous()
    bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]).long()
    return (bits * multipliers(bits.shape[1], bits.device)).sum(dim=1)  # overflow wraps around, which is as good


def _rows(value: Tensor, rows: Tensor, there: Tensor) -> Tensor:
    """Rows of `[observed, …]`, −1 where `there` is False; on the device of `rows`."""
    taken = value[rows.to(value.device)].to(rows.device)
    return torch.where(there.view(-1, *[1] * (taken.ndim - 1)), taken, -1)


def _repetition(hashes: Tensor) -> Tensor:
    """`[row]` how many earlier rows have the same hash."""
    ordered, order = hashes.sort(stable=True)
    count = torch.arange(len(hashes), device=hashes.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(order).scatter(0, order, count)


@cache
def multipliers(count: int, device: torch.device) -> Tensor:
    """`[count]` odd random numbers, int64, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1).to(device, non_blocking=True)
