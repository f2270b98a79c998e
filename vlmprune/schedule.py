"""When tokens are dropped and how many are kept, as data. All rounding happens here.

A *stage* is one cut, at one of three sites:

    vision   inside the vision tower; the method itself knows between which blocks. Counted per view (LLaVA-NeXT: per crop).
    llm      at the input of decoder layer `layer`: that layer is the first one to see the shorter sequence, and layer 0 means
             "before the language model"
    cache    after prefill: decoding steps see, from decoder layer `layer` on, only what the last cut kept

Budgets say what is *kept*, per image, and count from the image's original number of visual tokens: `fraction=0.25` at a second
stage is a quarter of all tokens, not of the survivors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vlmprune.errors import UsageError, shown, unknown

Site = Literal["vision", "llm", "cache"]
SITES: tuple[Site, ...] = ("vision", "llm", "cache")


def plain(value: Any) -> Any:
    """A number of NumPy as Python's own, so that a recipe can be compared and saved; anything else as it is."""
    return value.item() if isinstance(value, np.generic | np.ndarray) and value.ndim == 0 else value


@dataclass(frozen=True)
class Budget:
    """How many visual tokens of one image are kept: either `tokens`, or a `fraction` of the image's original tokens.

    Raises:
        UsageError: both or neither given, `tokens` negative or not whole, `fraction` outside [0, 1].
    """

    tokens: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", plain(self.tokens))
        object.__setattr__(self, "fraction", plain(self.fraction))
        if (self.tokens is None) == (self.fraction is None):
            found = "both" if self.tokens is not None else "neither"
            raise UsageError(f"a budget is either tokens=… or fraction=…: found {found}; give exactly one.")
        if self.tokens is not None:
            if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 0:
                raise UsageError(f"tokens must be a whole number >= 0, found {shown(self.tokens)}.")
        elif isinstance(self.fraction, bool) or not isinstance(self.fraction, int | float):
            raise UsageError(f"fraction must be a number in [0, 1], found {shown(self.fraction)}.")
        elif not 0.0 <= self.fraction <= 1.0:  # also refuses NaN
            raise UsageError(f"fraction must lie in [0, 1], found {self.fraction!r}; it is what is kept.")

    def resolve(self, visual: int) -> int:
        """Tokens kept of an image with `visual` tokens: rounded half up, at least 1 unless the budget is zero."""
        if self.tokens is not None:
            return min(self.tokens, visual)
        assert self.fraction is not None
        kept = math.floor(self.fraction * visual + 0.5)
        return min(max(kept, 1 if self.fraction > 0 else 0), visual)

    def scaled(self, tokens: float, fraction: float) -> Budget:
        """So many times the tokens (cut off, at least one), or so many times the fraction (at most all)."""
        if self.tokens is not None:
            return Budget(tokens=max(int(self.tokens * tokens), 1))
        assert self.fraction is not None
        return Budget(fraction=min(self.fraction * fraction, 1.0))


@dataclass(frozen=True)
class Stage:
    """One cut: `layer` is the 0-based index of the first decoder layer that sees only the kept tokens (0 for site "vision")."""

    layer: int
    budget: Budget
    site: Site = "llm"

    @property
    def order(self) -> tuple[int, int]:
        """Stages run in this order."""
        return SITES.index(self.site), self.layer

    @property
    def place(self) -> str:
        """Where it cuts, in words."""
        return {"vision": "the vision tower", "llm": f"layer {self.layer}", "cache": f"the cache from layer {self.layer} on"}[
            self.site
        ]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", plain(self.layer))
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise UsageError(f"layer must be a whole number >= 0 (0 is before the language model), found {shown(self.layer)}.")
        if not isinstance(self.budget, Budget):
            raise UsageError(f"a stage needs a budget, for example vlmprune.Budget(tokens=64), found {shown(self.budget)}.")
        if self.site not in SITES:
            raise unknown("site", str(self.site), SITES)
        if self.site != "cache" and self.layer == 0 and 0 in (self.budget.tokens, self.budget.fraction):
            raise UsageError(
                "nothing would be kept before the language model, found a budget of 0 at layer 0: keep at least tokens=1, or "
                "drop everything at a later layer (layer >= 1)."
            )
        if self.site == "vision" and self.layer:
            raise UsageError(f"a stage inside the vision tower has layer=0, found {self.layer}: its method knows the blocks.")


@dataclass(frozen=True)
class Schedule:
    """Stages in the order of their layers.

    Raises:
        UsageError: no stage, two stages at one layer, or a later stage that keeps more than an earlier one.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise UsageError("a schedule needs at least one stage.")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if after.order <= before.order:
                raise UsageError(f"stages must have different layers in rising order: found {before.place} then {after.place}.")
            check_shrinks(before, after, crops=True)  # whether a picture has several is not known here

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)


def check_shrinks(before: Stage, after: Stage, crops: bool = False) -> None:
    """Refuse a later stage that is known to keep more than an earlier one (like budgets only: tokens against fraction
    depends on the image, and the smaller count then wins at run time). With `views`, a picture has several, and budgets inside
    the tower are those of one."""
    if after.site == "cache" or (crops and before.site == "vision"):  # a cache stage keeps what is left, and decides nothing
        return
    for unit in ("tokens", "fraction"):
        first, second = getattr(before.budget, unit), getattr(after.budget, unit)
        if first is not None and second is not None and second > first:
            raise UsageError(
                f"the stage at {after.place} keeps {unit}={second:g}, but {before.place} already left only "
                f"{unit}={first:g}: a later stage cannot keep more."
            )


PAPER_DEPTHS = (32, 40, 64, 80)
"""Decoder layers of the models that papers name layers of: 7B, 13B and larger."""


def scaled_layer(layer: int, depth: int) -> int:
    """The layer of a model with `depth` layers that stands where `layer` stands in the shallowest paper's model that has it."""
    paper = next((paper for paper in PAPER_DEPTHS if layer < paper), layer + 1)
    return min((2 * layer * depth + paper) // (2 * paper), depth - 1)  # rounded half up


def at(layer: int, tokens: int | None = None, fraction: float | None = None) -> Schedule:
    """A single cut: `at(layer=2, fraction=0.5)`."""
    return Schedule((Stage(layer, Budget(tokens, fraction)),))


def stages(kept: Mapping[int, int | float]) -> Schedule:
    """Several cuts: `stages({8: 0.5, 16: 0.25})` keeps fractions (floats), `stages({2: 300, 6: 200})` tokens (ints)."""
    shares = {layer: plain(kept[layer]) for layer in sorted(kept)}
    return Schedule(
        tuple(
            Stage(layer, Budget(fraction=share) if isinstance(share, float) else Budget(tokens=share))
            for layer, share in shares.items()
        )
    )


def share(total: int, sizes: Sequence[int], room: Sequence[int]) -> list[int]:
    """Split a budget of `total` tokens among parts in proportion to their sizes: exact in sum, the largest remainders first,
    then the first part. No part gets more than its `room`; what it cannot take goes to the others in the same way."""
    shares = [0] * len(sizes)
    while (left := min(total, sum(room)) - sum(shares)) > 0:
        open_parts = [part for part in range(len(sizes)) if shares[part] < room[part]]
        whole = sum(sizes[part] for part in open_parts)
        exact = {part: left * sizes[part] / whole for part in open_parts}
        more = {part: math.floor(exact[part]) for part in open_parts}
        for part in sorted(open_parts, key=lambda part: (more[part] - exact[part], part))[: left - sum(more.values())]:
            more[part] += 1
        for part in open_parts:
            shares[part] = min(shares[part] + more[part], room[part])
    return shares
