"""What the tower knew of each visual token, looked up by a hash of its feature row."""

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

MEMORY_ROWS = 1 << 15
"""Visual tokens whose past in the tower is remembered after their features are gone (56 pictures of 576), and at least the last
pass; in each thread, and besides in all together."""


NAMED_BY = 128
"""Leading numbers of a feature row that name it."""


@dataclass(frozen=True, eq=False)
class Known:
    """What one pass through the tower knew, `known` `[row, …]` by probe, sorted by the names of the feature rows.

    Attributes:
        lives: weak references to what the pass returned: the memory of the features, and the tower's output.
        graph: what may be merged, with its gradient, until the prompt of the same call has taken it: scores need none.
    """

    names: Tensor
    order: Tensor
    known: dict[str, Tensor]
    lives: list[ReferenceType[Any]]
    graph: dict[str, Tensor]

    @property
    def in_use(self) -> bool:
        """Somebody still holds what the pass returned."""
        return any(life() is not None for life in self.lives)


class _Mine(local):
    """The passes of one thread, the latest first."""

    passes: tuple[Known, ...] = ()


class FeatureIndex:
    """What the tower knew of each visual token, filed under the token's features.

    A pass is remembered as long as its features are in use, wherever that is. Features are copied on their way (un-padding,
    packing, beams); therefore the latest passes of every thread are remembered, too, which no other thread can push out, and
    the latest of all.
    """

    def __init__(self) -> None:
        self._mine, self._lock = _Mine(), Lock()
        self._all: tuple[Known, ...] = ()

    def remember(
        self, features: Tensor, known: dict[str, Tensor], lives: Sequence[Any] = (), differentiable: bool = False
    ) -> Known:
        """File `known`, `[row, …]` each, under `features` `[row, dim]`, as long as any of `lives` does; `differentiable` where
        the prompt follows in the same call."""
        names, order = row_names(features).sort(stable=True)
        values = {name: value.detach() for name, value in known.items()}
        graph = {name: value for name, value in known.items() if differentiable and name == "tower_features"}
        new = Known(names, order, values, [ref(x) for x in lives if hasattr(x, "__weakref__")], graph)
        self._mine.passes = _latest((new, *self._mine.passes))
        with self._lock:
            others = (new, *self._all)
            recent = _latest(others)
            self._all = (*recent, *(found for found in others[len(recent) :] if found.in_use))
        return new

    def recall(self, pictures: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """What is known of the features `[row, dim]` of each picture, one row each; −1 for rows of NaN, which were dropped.

        Raises:
            UsageError: they did not come from the wrapped model's tower.
        """
        wanted, there = [row_names(features) for features in pictures], [~features[:, 0].isnan() for features in pictures]
        found: dict[int, dict[str, Tensor]] = {}
        passes = dict.fromkeys((*self._mine.passes, *self._all))  # a pass may be in both
        used: set[Known] = set()
        for one in passes:
            left = [number for number in range(len(pictures)) if number not in found]
            if not left:
                break
            names = one.names.to(wanted[0].device)
            places = {number: torch.searchsorted(names, wanted[number]).clamp_(max=len(names) - 1) for number in left}
            hits = [((names[place] == wanted[number]) | ~there[number]).all() for number, place in places.items()]
            for number, hit in zip(left, on_host(torch.stack(hits)), strict=True):
                if hit:
                    used.add(one)
                    # Of views that look alike, each its own.
                    twin = (places[number] + _repetition(wanted[number])).clamp_(max=len(names) - 1)
                    place = torch.where(names[twin] == wanted[number], twin, places[number])
                    rows = one.order.to(place.device)[place]
                    found[number] = {
                        name: _taken(value, rows, there[number]) for name, value in {**one.known, **one.graph}.items()
                    }
        if len(found) < len(pictures):
            raise UsageError(
                "what the vision tower saw of a picture is unknown: its features were not computed by this model while it was "
                "wrapped with this recipe, or they were changed, or copied long ago; pass pixel_values instead of encoded "
                "features."
            )
        for one in used:
            one.graph.clear()
        return [found[number] for number in range(len(pictures))]


def _latest(passes: Sequence[Known]) -> tuple[Known, ...]:
    """The first passes that together have at most `MEMORY_ROWS` rows, and at least one."""
    rows, count = 0, 0
    for one in passes:
        rows += len(one.names)
        if count and rows > MEMORY_ROWS:
            break
        count += 1
    return tuple(passes[:count])


def row_names(features: Tensor) -> Tensor:
    """`[row]` int64 names for the content of `features` `[row, dim]`: a random sum over the bits of their leading numbers."""
    bits = features[:, :NAMED_BY].detach().contiguous()
    bits = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]).long()
    return (bits * _multipliers(bits.shape[1], bits.device)).sum(dim=1)  # wraps, which is as good


def _taken(value: Tensor, rows: Tensor, there: Tensor) -> Tensor:
    """Rows of `[known, …]`, −1 where they are not there; on the device of `rows`."""
    taken = value[rows.to(value.device)].to(rows.device)
    return torch.where(there.view(-1, *[1] * (taken.ndim - 1)), taken, -1)


def _repetition(names: Tensor) -> Tensor:
    """`[row]` how often the same name stood before."""
    ordered, order = names.sort(stable=True)
    count = torch.arange(len(names), device=names.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(order).scatter(0, order, count)


@cache
def _multipliers(count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1).to(device, non_blocking=True)
