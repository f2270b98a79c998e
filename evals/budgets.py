"""Budgets of visual tokens: where papers drop tokens, and how many to keep there for a given average over decoder layers.

The two averages in use are those of `vlmprune/cost.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import vlmprune
from vlmprune.cost import compute_average, nominal_average
from vlmprune.errors import UsageError

SHARES = (0.5, 0.35, 0.25, 0.15, 0.1)
"""Compute averages of a sweep, as shares of all visual tokens."""

AVERAGES = (1 / 3, 1 / 9)
"""Budgets of the recipes that `vlmprune horizon` recommends: 192 and 64 of LLaVA's 576 tokens, as in the paper."""

DEEP_SHARE = 38 / 284
"""Tokens kept from the horizon on per token kept before it, from the paper's DivPrune + random at 192 (at 64 it has 10 : 96).
The paper gives counts for LLaVA-1.5-7B only. That the proportion holds for other models is our assumption."""


# -- where papers drop tokens ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaperSchedule:
    """Where a paper's method has its stages, and how much it keeps at each relative to the others.

    Attributes:
        layers: first decoder layer after each stage, in a language model of `depth` layers; 0 is before the language model.
        kept: tokens kept at each stage, up to a common factor.
        depth: layers of the paper's model; None keeps `layers` as they are in every model.
        tower: share of the visual tokens that are left when the vision tower is done, where the method merges some there.
        options: other parameters of the method.
    """

    layers: tuple[int, ...]
    kept: tuple[float, ...] = (1.0,)
    depth: int | None = None
    tower: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def at_depth(self, depth: int) -> tuple[int, ...]:
        """The stages' layers in a model of `depth` layers: scaled, all different, and at layer 0 only where the paper's is."""
        layers: list[int] = []
        for layer in self.layers:
            if layer and self.depth is not None:
                layer = max(1, round(layer * depth / self.depth))
            layers.append(max(layer, layers[-1] + 1) if layers else layer)
        return tuple(layers)

    def lowest(self, depth: int) -> float:
        """The compute average if every stage kept nothing: what the layers before the first stage cost."""
        return self.at_depth(depth)[0] * self.tower / depth

    def average(self, fractions: Sequence[float], depth: int) -> float:
        """The compute average, as a share of all visual tokens, if the stages keep `fractions` of them."""
        return compute_average(self.tower, depth, dict(zip(self.at_depth(depth), fractions, strict=True)))

    def solve(self, budget: float, depth: int) -> tuple[float, ...] | None:
        """The fractions to keep at each stage for a compute average of `budget`, both as shares of all visual tokens.

        The common factor is found by bisection. A stage that would keep more tokens than there are keeps all of them.

        Returns:
            None if the budget cannot be reached: the layers before the first stage alone cost as much, or the tokens that
            the tower leaves cost less.
        """
        if not self.lowest(depth) < budget < self.tower:
            return None
        low, high = 0.0, self.tower / min(self.kept)
        for _ in range(60):
            factor = (low + high) / 2
            fractions = [min(self.tower, factor * kept) for kept in self.kept]
            low, high = (factor, high) if self.average(fractions, depth) < budget else (low, factor)
        return tuple(round(min(self.tower, high * kept), 6) for kept in self.kept)


LLAVA_LAYERS = 32
"""Decoder layers of LLaVA-1.5-7B, which most papers name their layers for."""

BEFORE = PaperSchedule((0,))
PAPER_SCHEDULES: dict[str, PaperSchedule] = {
    # Before the language model, or inside the vision tower.
    **dict.fromkeys(("random", "uniform", "cls", "divprune", "cdpruner", "holov", "visionzip", "flowcut", "tome"), BEFORE),
    # One stage, at the paper's layer whatever the depth.
    "fastv": PaperSchedule((2,)),
    "dart": PaperSchedule((2,)),
    # Several stages: LLaVA-1.5-7B's layers and counts.
    "pdrop": PaperSchedule((8, 16, 24), (0.5, 0.25, 0.125), 32),
    "adaptinfer": PaperSchedule((2, 11, 21), (133, 27, 3), 32),
    "sparsevlm": PaperSchedule((3, 7, 16), (300, 200, 110), 32),
    "vscan": PaperSchedule((0, 16), (96, 32), 32),
    # Its paper has thresholds instead of counts: the falling counts are our choice. Its tower merges windows of 3×3 tokens
    # that are alike: on 100 dev scenes of the embedded model 8.2 of 16 on average, here always 8, so that the cost is fixed.
    # The paper's cache stage starts at layer 2 of 32, which is layer 1 of 8.
    "mustdrop": PaperSchedule(
        (3, 7, 11, 15), (4, 3, 2, 1), 32, tower=(144 - 8 * 8) / 144, options={"windows": 8, "cache_layer": 1}
    ),
}


def paper_schedule(method: str) -> PaperSchedule:
    """Where a pruning method drops tokens.

    A method without an entry has the stages of its default: a single one at its layer, whatever the depth; several at layers of
    LLaVA-1.5-7B, which are scaled. They keep shares in the proportion of the default's budgets. A stage of the cache is left
    out: it changes no average.

    Raises:
        UsageError: several stages of which one is in the vision tower, or whose budgets have no common proportion.
    """
    if (known := PAPER_SCHEDULES.get(method)) is not None:
        return known
    stages = [stage for stage in vlmprune.METHODS[method].default.stages if stage.site != "cache"]
    layers = tuple(stage.layer for stage in stages)
    if len(stages) == 1:
        return PaperSchedule(layers)
    for unit in ("tokens", "fraction"):
        kept = [getattr(stage.budget, unit) for stage in stages]
        if all(kept) and all(stage.site == "llm" for stage in stages):
            return PaperSchedule(layers, tuple(map(float, kept)), LLAVA_LAYERS)
    raise UsageError(
        f"{method}: the stages of its default cannot be scaled to a budget, because one is in the vision tower, keeps nothing, "
        "or counts in another unit than the others: add an entry to PAPER_SCHEDULES in evals/budgets.py."
    )


# -- recipes with a horizon --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Composition:
    """A recipe that selects before the horizon and keeps random tokens from there on, with its two averages in tokens."""

    recipe: str
    compute_average: float
    nominal_average: float


def compose(visual: float, layers: int, horizon: int, wanted: float, unit: str = "tokens") -> Composition:
    """DivPrune before the language model and random tokens from the horizon on, in the paper's proportion.

    Args:
        visual: tokens of an image.
        layers: decoder layers.
        horizon: first layer with random tokens, 0 < horizon < layers.
        wanted: the compute average, in tokens.
        unit: write the recipe in "tokens", or as "fraction" where images differ in size.
    """
    first = min(wanted * layers / (horizon + DEEP_SHARE * (layers - horizon)), visual)
    first = float(round(first)) if unit == "tokens" else first
    deep = max((wanted * layers - first * horizon) / (layers - horizon), 0.0)
    deep = float(int(deep + 1e-9)) if unit == "tokens" else deep  # rounded down, so that the budget is not exceeded
    kept = {0: first, horizon: deep}
    shown = [f"{count:.0f}" if unit == "tokens" else f"{count / visual:.4f}" for count in kept.values()]
    return Composition(
        f"divprune:{unit}={shown[0]} + random:layer={horizon},{unit}={shown[1]}",
        compute_average(visual, layers, kept),
        nominal_average(visual, layers, kept),
    )
