"""Schedules from the model itself: AdaptInfer's offline analysis. arXiv:2508.06084, section 3.2.3, and its `prepocess.py`.

Once, on a calibration set, with the un-pruned model; per sample:

    a_l,j   attention from the text (all tokens after the last image) to visual token j in layer l, summed over heads and rows
    top     the 10 % of tokens with the most attention over all layers
    c_j     one change point of each top token's running sum Σ_{m ≤ l} a_m,j: the split into two segments with the least squared
            deviation from their means; c_j is the last layer of the first one (the code's "minus one")

Where the change points of all samples accumulate, attention has moved on. Each of up to three peaks p of their histogram gives
a stage at layer p + 1. How many tokens each stage keeps follows the published proportion 290 : 72 : 18 (LLaVA-1.5, budget 128;
its first two numbers or first one where there are fewer peaks), scaled until the nominal average is the wanted one.

Differences from the paper, and choices that it leaves open:
- The last layer's attention is not used: a method gets the attention of the layer before its stage, and no stage follows the
  last layer.
- The paper places stages at the edges of dense regions by eye. Here a peak is a layer with at least its even share of change
  points and no higher neighbour. Peaks are taken by height, and one nearer to a taken peak than a tenth of the depth (at least
  2) is not used.
- "Budgets follow prior work": one proportion for all budgets is our choice. The published 64 (133 : 27 : 3) is steeper.

Read a peak in the middle with care: the running sum of a token whose attention never changes is a straight line, which is split
in the middle. Reports name that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vlmprune
from vlmprune import Budget, Schedule, Stage
from vlmprune.cost import compute_average, nominal_average
from vlmprune.evals.budgets import PaperSchedule
from vlmprune.evals.calibration import Sample, next_logits, run_unpruned
from vlmprune.evals.results import Result
from vlmprune.show.stats import bounds, times_drawn
from vlmprune.show.table import table
from vlmprune.view import View

TOP = 0.1
PROPORTION = (290, 72, 18)


# -- what the model attends to -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Watch(vlmprune.Pruner):
    """Keeps everything, and sums the attention from the text to each visual token in the layer before every stage.

    Attributes:
        seen: per layer, one `[visual]` fp32 sum for each `View`, which holds the images of one size.
    """

    name = "watch"
    paper = "arXiv:2508.06084"
    needs = frozenset({"attention_from_text"})
    default = vlmprune.at(layer=1, fraction=1.0)
    first_layer = 1

    seen: dict[int, list[Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def adaptive(self) -> bool:
        return True  # so that it is called at every stage, although nothing is dropped

    def select(self, see: View, keep: int) -> vlmprune.Choice:
        paid = see.attention_from_text.sum(dim=(1, 2))  # [image, visual]
        self.seen.setdefault(see.layer - 1, []).append(paid.flatten().cpu())
        return vlmprune.Choice([torch.arange(see.visual, device=see.position.device)] * see.images)


def attention_sums(model: Any, sample: Sample) -> Tensor:
    """`[layer, visual]` fp32 attention from all text after the last image to each visual token of a sample, summed over heads
    and rows, for every decoder layer but the last. Tokens of several images are concatenated, images of one size together.

    Raises:
        vlmprune.UsageError: fewer than three decoder layers, or not one un-padded prompt with an image and text after it.
    """
    layers = run_unpruned(model, sample).layers
    if layers < 3:
        raise vlmprune.UsageError(f"a change between layers needs at least three decoder layers, found {layers}.")
    watch = Watch(schedule=vlmprune.stages(dict.fromkeys(range(1, layers), 1.0)))
    with vlmprune.wrap(model, watch):
        next_logits(model, sample)
    return torch.stack([torch.cat(watch.seen[layer]) for layer in range(layers - 1)])


def change_points(curves: np.ndarray) -> np.ndarray:
    """`[curve]` index of the last entry of the first of two segments, for curves `[curve, layer]`.

    The split with the least squared error, as `ruptures.Binseg(model="l2", jump=1).predict(n_bkps=1)` finds it: segments of at
    least two entries (one where there are fewer than four), the later split on a tie.
    """
    length = curves.shape[1]
    split = _splits(length)
    centred = curves - curves.mean(1, keepdims=True)
    before = centred.cumsum(1)[:, split - 1]
    # Σ (x − mean)² of both segments is Σ x² less this, and the centred curve sums to zero.
    explained = before**2 / split + before**2 / (length - split)
    return split[len(split) - 1 - explained[:, ::-1].argmax(1)] - 1


def _splits(length: int) -> np.ndarray:
    """Possible lengths of the first segment."""
    shortest = min(2, length // 2)
    return np.arange(shortest, length - shortest + 1)


def top_changes(attention: Tensor) -> np.ndarray:
    """Change points of the 10 % of visual tokens with the most attention in `[layer, visual]`."""
    values = attention.double().numpy().T
    most = max(1, int(TOP * len(values) + 0.5))
    top = np.argsort(-values.sum(1), kind="stable")[:most]
    return change_points(values[top].cumsum(1))


def peaks(histogram: np.ndarray, depth: int, most: int = 3) -> tuple[int, ...]:
    """Layers where change points accumulate, in rising order.

    Args:
        histogram: `[layer]` change points.
        depth: decoder layers of the model; it limits how near two peaks may be.
        most: peaks at most.
    """
    even = histogram.sum() / len(_splits(len(histogram)))
    padded = np.pad(histogram, 1)
    high = (histogram >= padded[:-2]) & (histogram >= padded[2:]) & (histogram >= even)
    gap = max(2, round(depth / 10))
    chosen: list[int] = []
    for layer in sorted(np.flatnonzero(high).tolist(), key=lambda layer: -histogram[layer]):
        if len(chosen) < most and all(abs(layer - other) >= gap for other in chosen):
            chosen.append(layer)
    return tuple(sorted(chosen))


# -- a schedule --------------------------------------------------------------------------------------------------------------


def scaled_counts(visual: float, depth: int, layers: Sequence[int], average: float) -> list[float]:
    """Tokens kept at each stage, in the published proportion, for a wanted nominal average.

    Args:
        visual: tokens of an image.
        depth: decoder layers of the model.
        layers: the stages' layers.
        average: visual tokens that leave a layer, mean over layers.

    Raises:
        vlmprune.UsageError: more than all tokens, or less than the layers before the first stage cost.
    """
    # What leaves layer i − 1 enters layer i: a nominal average is a compute average one layer earlier.
    earlier = PaperSchedule(tuple(layer - 1 for layer in layers), PROPORTION[: len(layers)])
    shares = earlier.solve(average / visual, depth)
    if shares is None:
        raise vlmprune.UsageError(
            f"an average of {average:g} visual tokens cannot be reached with a first stage at layer {layers[0]}: choose "
            f"between {earlier.lowest(depth) * visual:.1f} (all dropped there) and {visual:g} (none dropped)."
        )
    return [share * visual for share in shares]


@dataclass(frozen=True, eq=False)
class Tuned:
    """A schedule and what it was made from.

    Attributes:
        method: whose schedule.
        depth: decoder layers of the model.
        visual: visual tokens of a sample, mean over samples.
        samples: how many.
        attention: per layer but the last, attention from the text to all visual tokens, relative to its mean over these
            layers; mean over samples.
        histogram: per layer but the last, change points.
        low, high: 95 % band of the histogram (samples drawn with replacement).
        peaks: the layers that the stages follow; `agreement` is the share of these draws with the same peaks.
        recipe: the schedule.
        nominal_average, compute_average: visual tokens that leave and enter a layer under it.
    """

    method: str
    depth: int
    visual: float
    samples: int
    attention: tuple[float, ...]
    histogram: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    peaks: tuple[int, ...]
    agreement: float
    recipe: vlmprune.Recipe
    nominal_average: float
    compute_average: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**own, "attention": [round(value, 5) for value in self.attention], "recipe": str(self.recipe)}


def tune(
    model: Any,
    samples: Iterable[Sample],
    budget: Budget,
    method: str = "adaptinfer",
    tick: Callable[[float], None] = lambda share: None,
) -> Tuned:
    """Choose a method's layers and counts for a model from calibration samples.

    Args:
        model: an un-wrapped model of a supported family. It is wrapped for the measurement only.
        samples: prompts; answers are not needed.
        budget: the wanted nominal average, in tokens, or as a fraction of an image's tokens; the recipe has the same unit.
        method: see `TUNERS`.
        tick: called with the share of a sample that is done, for a progress bar.

    Raises:
        vlmprune.UsageError: an unknown method, no sample, or a budget that cannot be reached.
    """
    check_method(method)
    return TUNERS[method](model, samples, budget, tick)


def check_method(method: str) -> None:
    """Refuse a method that has nothing to tune.

    Raises:
        vlmprune.UsageError: names the methods that have.
    """
    if method not in TUNERS:
        raise vlmprune.UsageError(f"the methods that can be tuned are: {', '.join(TUNERS)}; found {method!r}.")


def tune_adaptinfer(model: Any, samples: Iterable[Sample], budget: Budget, tick: Callable[[float], None]) -> Tuned:
    """AdaptInfer's layers and counts."""
    seen, changes, visual = [], [], []
    for sample in samples:
        attention = attention_sums(model, sample)
        seen.append((attention.sum(1) / attention.sum(1).mean()).numpy())
        changes.append(np.bincount(top_changes(attention), minlength=len(attention)))
        visual.append(attention.shape[1])
        tick(1.0)
    if not changes:
        raise vlmprune.UsageError("no sample to tune on: give at least one question.")
    depth, tokens = len(changes[0]) + 1, float(np.mean(visual))
    histogram = np.sum(changes, axis=0)
    found = peaks(histogram, depth)
    drawn = times_drawn(len(changes)) @ np.stack(changes)
    low, high = bounds(drawn)
    schedule, kept = _schedule(tokens, depth, [layer + 1 for layer in found], budget)
    return Tuned(
        method="adaptinfer",
        depth=depth,
        visual=tokens,
        samples=len(changes),
        attention=tuple(np.mean(seen, axis=0).tolist()),
        histogram=tuple(histogram.tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        peaks=found,
        agreement=float(np.mean([peaks(draw, depth) == found for draw in drawn])),
        recipe=vlmprune.Recipe((vlmprune.AdaptInfer(schedule=schedule),)),
        nominal_average=nominal_average(tokens, depth, kept),
        compute_average=compute_average(tokens, depth, kept),
    )


TUNERS: dict[str, Callable[[Any, Iterable[Sample], Budget, Callable[[float], None]], Tuned]] = {"adaptinfer": tune_adaptinfer}


def _schedule(visual: float, depth: int, layers: Sequence[int], budget: Budget) -> tuple[Schedule, dict[int, float]]:
    """Stages in the budget's unit, and the tokens that they keep of an image of mean size."""
    if budget.tokens is not None:
        kept = [int(count + 0.5) for count in scaled_counts(visual, depth, layers, budget.tokens)]
        budgets = [Budget(tokens=count) for count in kept]
        return Schedule(tuple(map(Stage, layers, budgets))), {layer: float(n) for layer, n in zip(layers, kept, strict=True)}
    assert budget.fraction is not None
    shares = [round(count / visual, 4) for count in scaled_counts(visual, depth, layers, budget.fraction * visual)]
    budgets = [Budget(fraction=share) for share in shares]
    return Schedule(tuple(map(Stage, layers, budgets))), {layer: n * visual for layer, n in zip(layers, shares, strict=True)}


# -- for people --------------------------------------------------------------------------------------------------------


COLUMNS = ("layer", "attention from the text", "change points", "share")


def result(numbers: Mapping[str, Any]) -> Result:
    """The result of tuning.

    Args:
        numbers: `Tuned.to_dict()`, with `results.stamp()`.
    """
    return Result(numbers, [table(COLUMNS, rows(numbers), text_columns=0), sentences(numbers)], draw=partial(plot, numbers))


def rows(numbers: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Per layer: what the text pays to all visual tokens, change points with their band, and their share."""
    total = sum(numbers["histogram"])
    return [
        (
            f"{layer}{' ←' if layer in numbers['peaks'] else ''}",
            f"{numbers['attention'][layer]:.2f}",
            f"{count} [{numbers['low'][layer]:.0f}, {numbers['high'][layer]:.0f}]",
            f"{count / total:.1%}",
        )
        for layer, count in enumerate(numbers["histogram"])
    ]


def sentences(numbers: Mapping[str, Any]) -> list[str]:
    """The schedule, and how certain it is."""
    found = ", ".join(map(str, numbers["peaks"]))
    middle = change_points(np.arange(len(numbers["histogram"]))[None])[0]
    return [
        f"Attention moves on after layer {found}: {numbers['samples']} samples, the same in {numbers['agreement']:.0%} of "
        f"bootstrap draws. Attention that never changes would be split after layer {middle}.",
        f"`{numbers['recipe']}`: {numbers['nominal_average']:.1f} of {numbers['visual']:.0f} visual tokens leave a layer on "
        f"average, {numbers['compute_average']:.1f} enter.",
    ]


def plot(numbers: Mapping[str, Any], path: Path) -> None:
    """The histogram of change points with its band, the even share, and the stages."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    total = sum(numbers["histogram"])
    layers = np.arange(len(numbers["histogram"]))
    share = np.array(numbers["histogram"]) / total
    below, above = share - np.array(numbers["low"]) / total, np.array(numbers["high"]) / total - share
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    colours = ["C1" if layer in numbers["peaks"] else "0.75" for layer in layers]
    axes.bar(layers, share, color=colours, yerr=[np.maximum(below, 0), np.maximum(above, 0)], capsize=2)
    for layer in numbers["peaks"]:
        axes.axvline(layer + 0.5, color="0.2", linestyle="--")  # the stage is before the next layer
    axes.set(xlabel="decoder layer (stages dashed)", ylabel="share of change points", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
