"""Where tokens are dropped and how many are kept, as data. All rounding happens here.

A *stage* is one place where a recipe prunes, at one of four sites:

    pixels   before the first block of the vision tower, by the pixels of patches; layer is 0. Budgets count visual tokens of a
             picture (Qwen-VL: squares of 2 × 2 patches), or of a crop (LLaVA-NeXT).
    vision   inside the vision tower, between blocks that the method decides; layer is 0. Budgets count per crop (LLaVA-NeXT).
    llm      at the input of decoder layer `layer`, which is the first layer without the dropped tokens. Layer 0 means "before
             the language model".
    cache    after prefill: in decoder layer `layer` and all later ones, decoding steps attend only to what the last stage kept

A *budget* says how many tokens of each image are kept. A fraction refers to the image's original number of visual tokens:
`fraction=0.25` at a second stage keeps a quarter of all tokens, not a quarter of what the first stage kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from vlmprune.errors import UsageError, shown, unknown

Site = Literal["pixels", "vision", "llm", "cache"]
SITES: tuple[Site, ...] = ("pixels", "vision", "llm", "cache")
"""In the order in which a forward pass reaches them."""
IN_TOWER: tuple[Site, ...] = ("pixels", "vision")
"""Sites where patches are dropped before the language model sees any."""


def plain(value: Any) -> Any:
    """A NumPy number as Python's own, so that a recipe can be compared and saved; any other value unchanged."""
    return value.item() if isinstance(value, np.generic | np.ndarray) and value.ndim == 0 else value


@dataclass(frozen=True)
class Budget:
    """How many visual tokens of one image are kept: a number of `tokens`, or a `fraction` of the image's original tokens.

    Raises:
        UsageError: both or neither is given, `tokens` is negative or not whole, or `fraction` lies outside [0, 1].
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
        elif not 0.0 <= self.fraction <= 1.0:  # NaN as well
            raise UsageError(f"fraction must lie in [0, 1], found {self.fraction!r}; it is the share that is kept.")

    def resolve(self, visual: int) -> int:
        """How many tokens are kept of an image with `visual` tokens: rounded half up, at least 1 unless the budget is 0."""
        if self.tokens is not None:
            return min(self.tokens, visual)
        assert self.fraction is not None
        kept = math.floor(self.fraction * visual + 0.5)
        return min(max(kept, 1 if self.fraction > 0 else 0), visual)

    def scaled(self, tokens: float, fraction: float) -> Budget:
        """The budget multiplied: tokens by `tokens` (rounded down, at least 1), a fraction by `fraction` (at most 1)."""
        if self.tokens is not None:
            return Budget(tokens=max(int(self.tokens * tokens), 1))
        assert self.fraction is not None
        return Budget(fraction=min(self.fraction * fraction, 1.0))


@dataclass(frozen=True)
class Stage:
    """One place where a recipe prunes.

    Args:
        layer: number of the first decoder layer without the dropped tokens, from 0; always 0 for the sites "pixels" and
            "vision".
        budget: how many tokens are kept.
        site: "pixels", "vision", "llm" or "cache".

    Raises:
        UsageError: a wrong type or site, or a budget of 0 before the language model.
    """

    layer: int
    budget: Budget
    site: Site = "llm"

    @property
    def order(self) -> tuple[int, int]:
        """Stages run in the order of these pairs."""
        return SITES.index(self.site), self.layer

    @property
    def place(self) -> str:
        """Where it prunes, in words."""
        return {
            "pixels": "the vision tower's input",
            "vision": "the vision tower",
            "llm": f"layer {self.layer}",
            "cache": f"the cache from layer {self.layer} on",
        }[self.site]

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
        if self.site == "pixels" and self.layer:
            raise UsageError(
                f'a stage at site="pixels" is before the vision tower and has no layer, found layer={self.layer}: leave it out.'
            )
        if self.site == "vision" and self.layer:
            raise UsageError(
                f"a stage inside the vision tower has layer=0, found {self.layer}: the method itself decides between which "
                "blocks of the tower it prunes."
            )


@dataclass(frozen=True)
class Schedule:
    """Stages in the order in which they run.

    Raises:
        UsageError: no stage, something else than stages, two stages at one place, or a later stage that keeps more than an
            earlier one.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.stages, Iterable):
            raise UsageError(
                f"a Schedule is made of a tuple of stages, found {shown(self.stages)}: write vlmprune.Schedule((stage,)), or "
                "vlmprune.at(layer=2, fraction=0.5)."
            )
        object.__setattr__(self, "stages", tuple(self.stages))
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise UsageError(
                    f"a Schedule is made of stages, found {shown(stage)} among them: write vlmprune.Stage(layer, budget), or "
                    "vlmprune.stages({8: 0.5, 16: 0.25})."
                )
        if not self.stages:
            raise UsageError("a schedule needs at least one stage.")
        for before, after in pairwise(self.stages):
            if after.order <= before.order:
                raise UsageError(
                    f"the stages of a schedule must have different layers in rising order: found {before.place}, then "
                    f"{after.place}."
                )
            check_shrinks(before, after, crops=True)  # without a model, an image may have crops

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)


def check_shrinks(before: Stage, after: Stage, crops: bool = False) -> None:
    """Refuse a later stage that keeps more than an earlier one.

    Only budgets of one unit are compared: which of `tokens` and `fraction` is smaller depends on the image; at run time the
    smaller one holds. A stage of the cache keeps what the stage before it kept, and is not compared; nor is one inside the
    tower with one before it, because a method may only merge there.

    Args:
        before, after: two successive stages.
        crops: whether images may have crops. Then a budget in or before the tower, which counts per crop, is not compared.

    Raises:
        UsageError: the later stage keeps more.
    """
    if after.site == "cache" or (before.site, after.site) == IN_TOWER or (crops and before.site in IN_TOWER):
        return
    for unit in ("tokens", "fraction"):
        first, second = getattr(before.budget, unit), getattr(after.budget, unit)
        if first is not None and second is not None and second > first:
            raise UsageError(
                f"the stage at {after.place} keeps {unit}={second:g}, but the stage at {before.place} already left only "
                f"{unit}={first:g}: a later stage cannot keep more."
            )


PAPER_DEPTHS = (32, 40, 64, 80)
"""Numbers of decoder layers in the models of papers: 7B, 13B and larger."""


def scaled_layer(layer: int, depth: int) -> int:
    """A paper's layer, moved to the same relative depth in a model of `depth` layers.

    The paper's model is taken to be the shallowest of `PAPER_DEPTHS` that has the layer.
    """
    paper = next((paper for paper in PAPER_DEPTHS if layer < paper), layer + 1)
    return min((2 * layer * depth + paper) // (2 * paper), depth - 1)  # rounded half up


def at(layer: int, tokens: int | None = None, fraction: float | None = None) -> Schedule:
    """A schedule of one stage: `at(layer=2, fraction=0.5)`."""
    return Schedule((Stage(layer, Budget(tokens, fraction)),))


def stages(kept: Mapping[int, int | float]) -> Schedule:
    """A schedule of several stages, by their layers: `stages({8: 0.5, 16: 0.25})` with fractions (floats),
    `stages({2: 300, 6: 200})` with tokens (ints).

    Raises:
        UsageError: it is no mapping from layers, or `Stage`, `Budget` or `Schedule` refuse what it has.
    """
    if not isinstance(kept, Mapping) or not all(isinstance(plain(layer), int) for layer in kept):
        raise UsageError(
            f"stages takes what is kept by the numbers of the layers, for example vlmprune.stages({{8: 0.5, 16: 0.25}}), found "
            f"{shown(kept)}."
        )
    amounts = {layer: plain(kept[layer]) for layer in sorted(kept)}
    return Schedule(
        tuple(
            Stage(layer, Budget(fraction=amount) if isinstance(amount, float) else Budget(tokens=amount))
            for layer, amount in amounts.items()
        )
    )


def share(total: int, sizes: Sequence[int], room: Sequence[int]) -> list[int]:
    """Split a budget among parts in proportion to their sizes, exact in sum: largest remainders first, then the first part.

    Args:
        total: tokens to hand out.
        sizes: of the parts.
        room: the most that each part can take; what does not fit goes to the others in the same proportions.

    Returns:
        The tokens of each part; their sum is `total`, or the sum of `room` if that is smaller.
    """
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
