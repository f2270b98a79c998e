"""Information horizon: from which decoder layer on visual tokens tell the answer nothing any more. arXiv:2512.07580.

Two measurements per decoder layer i, both of the prediction of the answer's first token (or of its first `answer_tokens`):

    metric  I_i(V_k) = p_k − p_text     p_k: probability of the right answer when, at the entry of layer i, all visual tokens
                                        but group k are dropped (survivors keep their positions); p_text: when all are.
                                        Groups are windows of 2×2 tokens, as in the official code; `window=1`: single ones.
    proxy   KL(full ‖ visual tokens dropped from layer i on), relative to dropping them before layer 0: needs no answer.

The paper only says that beyond the horizon all I are "≈ 0 and equal". Here:

    horizon = first measured layer i such that for every measured layer j ≥ i the curve stays below 5 % of its reference
    metric's curve: mean over samples of max_k |I_j(V_k)|; reference: its highest value over the layers
    proxy's curve: mean over samples of the KL at j; reference: the same at layer 0

max_k |I_k| bounds both things the paper asks for: every |I_k|, and (by twice as much) every difference between two groups. The
mean over groups would not do, because it hides one window that still matters among many that never did. The maximum is biased
upwards by noise, so it errs towards a later, safer horizon. "For every later layer" keeps a dip in the middle from being taken
for the end. Ratios are of means over samples, so that pictures that never mattered cannot blow up. 5 % is the threshold that
another project uses for the proxy; for the metric it is our choice.

The paper looks at the first token of the answer only, and so does the default. What later tokens need is then not seen: the
embedded model reads the last of three digits in later layers than the first. With `answer_tokens=n` up to n tokens are
measured, each behind the right ones before it; a sample has the groups of all its tokens then, and the sum of their
divergences.

Intervals (95 %) draw whole samples with replacement, and find the reference anew in every draw. The upper end of a horizon's
interval is the layer from which on the curve is quiet in at least 97.5 % of the draws, that is, where its upper band is below
5 %. The later one of the two measurements is `safe`, and what recipes are made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vlmprune
from vlmprune.adapters.registry import family_of
from vlmprune.evals.calibration import Sample, next_logits, run_whole
from vlmprune.evals.sweep import average
from vlmprune.show.stats import bounds, times_drawn
from vlmprune.view import View

QUIET = 0.05
"""Share of the reference below which a curve counts as zero."""

AVERAGES = (1 / 3, 1 / 9)
"""Budgets of the recommended recipes: 192 and 64 of LLaVA's 576 tokens, as in the paper."""

DEEP_SHARE = 38 / 284
"""Tokens behind the horizon per token before it, from the paper's DivPrune + random at 192 (its 64 has 10 : 96). Inferred to
hold elsewhere: the paper gives counts for LLaVA-1.5-7B only."""

Group = tuple[int, Tensor]
"""A picture's number in its prompt, and indices into its tokens."""


# -- budgets -----------------------------------------------------------------------------------------------------------------


def compute_average(visual: float, layers: int, cuts: Mapping[int, float]) -> float:
    """Mean over layers of the visual tokens that enter: what is really multiplied.

    Args:
        visual: tokens of the un-pruned picture.
        layers: decoder layers of the model.
        cuts: tokens kept, by the first layer that sees only them.
    """
    places = sorted(cuts)
    return visual * average(places, [cuts[layer] / visual for layer in places], layers)


def nominal_average(visual: float, layers: int, cuts: Mapping[int, float]) -> float:
    """Mean over layers of the visual tokens that leave, the count by which SparseVLM, MustDrop and AdaptInfer name budgets.

    A cut before layer i shortens what layer i − 1 puts out, so it counts as one layer earlier.
    """
    return compute_average(visual, layers, {max(layer - 1, 0): cuts[layer] for layer in sorted(cuts)})


@dataclass(frozen=True)
class Composition:
    """A selector before the horizon and random tokens behind it, and what that costs in tokens per layer."""

    recipe: str
    compute_average: float
    nominal_average: float


def compose(visual: float, layers: int, horizon: int, wanted: float, unit: str = "tokens") -> Composition:
    """DivPrune before the language model and random at the horizon, in the paper's proportion.

    Args:
        visual: tokens of a picture.
        layers: decoder layers.
        horizon: first layer with random tokens, 0 < horizon < layers.
        wanted: tokens per layer, as `compute_average` counts.
        unit: write the recipe in "tokens", or as "fraction" where pictures differ in size.
    """
    first = min(wanted * layers / (horizon + DEEP_SHARE * (layers - horizon)), visual)
    first = float(round(first)) if unit == "tokens" else first
    deep = max((wanted * layers - first * horizon) / (layers - horizon), 0.0)
    deep = float(int(deep + 1e-9)) if unit == "tokens" else deep  # down, so as not to exceed the budget
    cuts = {0: first, horizon: deep}
    shown = [f"{kept:.0f}" if unit == "tokens" else f"{kept / visual:.4f}" for kept in cuts.values()]
    return Composition(
        f"divprune:{unit}={shown[0]} + random:layer={horizon},{unit}={shown[1]}",
        compute_average(visual, layers, cuts),
        nominal_average(visual, layers, cuts),
    )


# -- one sample --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Only(vlmprune.Pruner):
    """Keeps one group of visual tokens in each row of a batch that repeats one prompt; nothing where the group is None.

    Args:
        rows: per row, what is kept.
        visual: tokens of each of the prompt's pictures.
    """

    name = "only"
    paper = "arXiv:2512.07580"
    needs = frozenset()
    default = vlmprune.at(layer=0, fraction=1.0)

    rows: tuple[Group | None, ...] = field(default=(), repr=False)
    visual: tuple[int, ...] = ()

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def keeps_newlines(self) -> bool:
        return False  # they have seen the picture

    def select(self, see: View, keep: int) -> vlmprune.Choice:
        device = see.position.device
        nothing = torch.empty(0, dtype=torch.long, device=device)
        # A view shows pictures of one size, in the order of rows and then of pictures.
        seen = [number for number, size in enumerate(self.visual) if size == see.original]
        return vlmprune.Choice(
            [
                group[1].to(device) if group is not None and group[0] == number else nothing
                for group in self.rows
                for number in seen
            ]
        )


def windows(rows: int, columns: int, side: int) -> list[Tensor]:
    """Raster indices of square windows that cover a grid; the last ones are smaller where `side` does not divide it."""
    raster = torch.arange(rows * columns).view(rows, columns)
    return [
        raster[top : top + side, left : left + side].flatten()
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]


def groups(config: Any, inputs: Mapping[str, Any], visual: Sequence[int], side: int) -> list[Group]:
    """The windows of all pictures of a prompt; where a picture is packed from several views, each lies in one of them.

    Raises:
        vlmprune.UsageError: a picture's tokens are no grids, and windows of more than one token were asked for.
    """
    if side == 1:
        return [(number, index) for number, size in enumerate(visual) for index in torch.arange(size).split(1)]
    pictures = [[view for row in rows for view in row] for rows in family_of(config).cells(inputs, config)]
    if [sum(int((view >= 0).sum()) for view in views) for views in pictures] != list(visual):
        raise vlmprune.UsageError(
            f"the tokens of a picture (here {visual[0]}) are no grids in this model, so there are no windows: take single "
            "tokens, window=1 (on the command line --window 1)."
        )
    found = [
        (number, tokens[tokens >= 0])  # padding is no token
        for number, views in enumerate(pictures)
        for view in views
        for tokens in (view.flatten()[cells] for cells in windows(view.shape[0], view.shape[1], side))
    ]
    return [(number, tokens) for number, tokens in found if len(tokens)]


@dataclass(frozen=True, eq=False)
class SampleCurves:
    """One sample.

    Attributes:
        name: which.
        visual: its visual tokens.
        full: probability of the measured tokens of the right answer, with all visual tokens.
        text: per measured layer, the same without any from there on.
        information: `[layer, group]` I_i(V_k); the groups of several answer tokens one behind the other.
        divergence: per measured layer, KL in nats; `blind` is its value at layer 0.
        tokens: measured tokens of the answer; `unseen` are those left out.
    """

    name: str
    visual: int
    full: float
    text: tuple[float, ...]
    information: np.ndarray
    divergence: tuple[float, ...]
    blind: float
    tokens: int = 1
    unseen: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The curves; of the groups only mean, largest and spread."""
        return {
            "name": self.name,
            "visual": self.visual,
            "tokens": self.tokens,
            "unseen": self.unseen,
            "full": _short(self.full),
            "text": _short(self.text),
            "mean": _short(self.information.mean(1)),
            "largest": _short(np.abs(self.information).max(1)),
            "spread": _short(self.information.std(1)),
            "divergence": _short(self.divergence),
            "blind": _short(self.blind),
        }


def measure(
    model: Any,
    sample: Sample,
    layers: Sequence[int] | None = None,
    window: int = 2,
    chunk: int = 64,
    answer_tokens: int = 1,
    tick: Callable[[float], None] = lambda share: None,
) -> tuple[SampleCurves, int]:
    """Both measurements of one sample; arguments as in `find_horizon`. Also returns the number of decoder layers."""
    answer = sample.answer[:answer_tokens]
    if not answer:
        raise vlmprune.UsageError(
            f"the horizon needs the right answer of every question: {sample.name or 'a sample'} has none."
        )
    parts = []
    for said, token in enumerate(answer):
        curves, depth = _measure_token(
            model, sample.told(said), token, layers, window, chunk, lambda share: tick(share / len(answer))
        )
        parts.append(curves)
    first = parts[0]
    return replace(
        first,
        full=float(np.prod([part.full for part in parts])),
        text=_floats(np.prod([part.text for part in parts], axis=0)),
        information=np.concatenate([part.information for part in parts], axis=1),
        divergence=_floats(np.sum([part.divergence for part in parts], axis=0)),
        blind=float(sum(part.blind for part in parts)),
        tokens=len(answer),
        unseen=len(sample.answer) - len(answer),
    ), depth


def _measure_token(
    model: Any,
    sample: Sample,
    token: int,
    layers: Sequence[int] | None,
    window: int,
    chunk: int,
    tick: Callable[[float], None],
) -> tuple[SampleCurves, int]:
    """The measurements of the token behind a prompt."""
    whole = run_whole(model, sample)
    measured = sorted(set(range(whole.layers) if layers is None else layers))
    _check_layers(measured, whole.layers)
    rows = [None, *groups(model.config, sample.inputs, whole.visual, window)]
    right: list[Tensor] = []
    divergence: dict[int, float] = {}
    for layer in sorted({0, *measured}):
        # The proxy's reference is at layer 0, where the metric may not be wanted.
        wanted = rows if layer in measured else rows[:1]
        logits = _logits(model, sample, layer, wanted, whole.visual, chunk)
        divergence[layer] = _divergence(whole.logits, logits[0])
        if layer in measured:
            right.append(logits.softmax(-1)[:, token].cpu())
            tick(1 / len(measured))
    kept = torch.stack(right).double().numpy()  # [layer, nothing and groups]
    curves = SampleCurves(
        name=sample.name,
        visual=sum(whole.visual),
        full=float(whole.logits.softmax(-1)[token]),
        text=_floats(kept[:, 0]),
        information=kept[:, 1:] - kept[:, :1],
        divergence=tuple(divergence[layer] for layer in measured),
        blind=divergence[0],
    )
    return curves, whole.layers


def _logits(
    model: Any, sample: Sample, layer: int, rows: Sequence[Group | None], visual: tuple[int, ...], chunk: int
) -> Tensor:
    """`[row, vocabulary]` logits when only each row's group goes on at a layer."""
    parts = []
    for start in range(0, len(rows), chunk):
        part = tuple(rows[start : start + chunk])
        with vlmprune.wrap(model, Only(layer=layer, fraction=1.0, rows=part, visual=visual)):
            parts.append(next_logits(model, sample, len(part)))
    return torch.cat(parts)


def _divergence(full: Tensor, other: Tensor) -> float:
    """KL(full ‖ other) of two rows of logits, in nats."""
    full, other = full.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((full.exp() * (full - other)).sum())


# -- all samples -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A measurement over layers.

    Attributes:
        value: per measured layer, mean over samples; `low` and `high` are its 95 % band.
        threshold: what counts as zero.
        horizon: first layer from which on all values are below, or None; `interval` (95 %) likewise.
    """

    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    threshold: float
    horizon: int | None
    interval: tuple[int | None, int | None]


@dataclass(frozen=True, eq=False)
class Horizon:
    """The measurements of a model on a set of samples.

    Attributes:
        depth: decoder layers of the model.
        layers: those that were measured.
        window: tokens on a side of a group.
        samples: one by one.
        mean, spread: per measured layer, mean and standard deviation of I over groups, averaged over samples.
        metric: the largest |I|; in probability.
        proxy: the divergence, relative to that of seeing nothing.
    """

    depth: int
    layers: tuple[int, ...]
    window: int
    samples: tuple[SampleCurves, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    metric: Curve
    proxy: Curve

    @property
    def safe(self) -> int | None:
        """The later of the two horizons, each at the upper end of its interval; None if either is not reached."""
        ends = [curve.interval[1] for curve in (self.metric, self.proxy)]
        return None if None in ends else max(end for end in ends if end is not None)

    def compositions(self, averages: Sequence[float] = AVERAGES) -> list[Composition]:
        """Recipes with random tokens from `safe` on, for shares of the picture's tokens; none where there is no such layer."""
        if not self.safe:
            return []
        sizes = {sample.visual for sample in self.samples}
        visual = float(np.mean([sample.visual for sample in self.samples]))
        unit = "tokens" if len(sizes) == 1 else "fraction"
        return [compose(visual, self.depth, self.safe, share * visual, unit) for share in averages]

    def to_dict(self) -> dict[str, Any]:
        return {
            "depth": self.depth,
            "layers": self.layers,
            "window": self.window,
            "mean": _short(self.mean),
            "spread": _short(self.spread),
            "metric": {key: _short(value) for key, value in asdict(self.metric).items()},
            "proxy": {key: _short(value) for key, value in asdict(self.proxy).items()},
            "safe": self.safe,
            "recipes": [asdict(composition) for composition in self.compositions()],
            "samples": [sample.to_dict() for sample in self.samples],
        }


def find_horizon(
    model: Any,
    samples: Iterable[Sample],
    layers: Sequence[int] | None = None,
    window: int = 2,
    chunk: int = 64,
    answer_tokens: int = 1,
    tick: Callable[[float], None] = lambda share: None,
) -> Horizon:
    """Measure the information horizon of a model.

    Runs the model once per sample, layer and group of tokens: an analysis, nothing for production.

    Args:
        model: a stock model of a supported family. It is wrapped meanwhile, and un-wrapped afterwards.
        samples: prompts with their right answers.
        layers: decoder layers to measure; None is all.
        window: tokens on a side of a group.
        chunk: rows of a batch; less needs less memory and gives the same.
        answer_tokens: tokens of the answer that are measured, at most; the paper's is 1.
        tick: called with the share of a sample that was done, for a progress bar.

    Raises:
        vlmprune.UsageError: no sample, a sample without answer, a layer the model does not have, or tokens that form no grid.
    """
    if min(window, chunk, answer_tokens) < 1:
        found = f"{window}, {chunk} and {answer_tokens}"
        raise vlmprune.UsageError(f"window, chunk and answer_tokens must be at least 1, found {found}.")
    if layers is not None:
        _check_layers(layers, model.config.get_text_config().num_hidden_layers)
    curves, depth, measured = [], 0, layers
    for sample in samples:
        one, depth = measure(model, sample, measured, window, chunk, answer_tokens, tick)
        curves.append(one)
    if not curves:
        raise vlmprune.UsageError("no sample to measure: give at least one question.")
    return estimate(curves, depth, range(depth) if layers is None else sorted(set(layers)), window)


def _check_layers(layers: Sequence[int], depth: int) -> None:
    if not layers:
        raise vlmprune.UsageError("no layer to measure: give at least one, or none for all.")
    if absent := [layer for layer in layers if not 0 <= layer < depth]:
        raise vlmprune.UsageError(
            f"--layer {absent[0]}: the model has layers 0 to {depth - 1} (in Python, layers={list(layers)})."
        )


def estimate(samples: Sequence[SampleCurves], depth: int, layers: Sequence[int], window: int = 2) -> Horizon:
    """Curves over all samples, horizons and intervals, from measurements of each sample."""
    largest = np.stack([np.abs(sample.information).max(1) for sample in samples])  # [sample, layer]
    divergence = np.stack([sample.divergence for sample in samples])
    blind = np.array([sample.blind for sample in samples])
    weights = times_drawn(len(samples)) / len(samples)
    drawn = weights @ largest  # [draw, layer]
    relative, drawn_relative = _ratio(divergence.mean(0), blind.mean()), _ratio(weights @ divergence, weights @ blind)
    return Horizon(
        depth=depth,
        layers=tuple(layers),
        window=window,
        samples=tuple(samples),
        mean=_floats(np.mean([sample.information.mean(1) for sample in samples], axis=0)),
        spread=_floats(np.mean([sample.information.std(1) for sample in samples], axis=0)),
        metric=_curve(layers, largest.mean(0), drawn, largest.mean(0).max(), drawn.max(1)),
        proxy=_curve(layers, relative, drawn_relative, 1.0, np.ones(len(weights))),
    )


def _curve(layers: Sequence[int], value: np.ndarray, drawn: np.ndarray, reference: float, references: np.ndarray) -> Curve:
    """A curve `[layer]` with its bootstrap draws `[draw, layer]`, and the references of both."""
    places = [*layers, None]
    low, high = bounds(drawn)
    first = _first_quiet(_ratio(drawn, references))
    ends = bounds(first, method="inverted_cdf")
    return Curve(
        value=_floats(value),
        low=_floats(low),
        high=_floats(high),
        threshold=float(QUIET * reference),
        horizon=places[int(_first_quiet(_ratio(value[None], np.array([reference])))[0])],
        interval=(places[int(ends[0])], places[int(ends[1])]),
    )


def _first_quiet(relative: np.ndarray) -> np.ndarray:
    """Per row of `[row, layer]`, the first index from which on all are below the threshold; the row's length if none is."""
    loud = relative >= QUIET
    return np.where(loud.any(1), loud.shape[1] - loud[:, ::-1].argmax(1), 0)


def _ratio(value: np.ndarray, reference: Any) -> np.ndarray:
    """`value [row, layer] / reference [row]` (or `[layer]` by a number); zero where the pictures never mattered."""
    reference = np.asarray(reference)[..., None]
    return np.divide(value, reference, out=np.zeros_like(value), where=reference > 0)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(np.asarray(values).tolist())


def _short(values: Any) -> Any:
    """Numbers with five significant digits, for files."""
    if isinstance(values, float):
        return float(f"{values:.5g}")
    return [_short(value) for value in values] if isinstance(values, tuple | np.ndarray) else values


# -- for people --------------------------------------------------------------------------------------------------------------


def rows(result: Horizon) -> list[tuple[str, ...]]:
    """Per measured layer: layer, mean I, largest |I| with its band, spread, relative divergence with its band."""
    metric, proxy = result.metric, result.proxy
    return [
        (
            str(layer),
            f"{result.mean[n]:+.3f}",
            f"{metric.value[n]:.3f} [{metric.low[n]:.3f}, {metric.high[n]:.3f}]",
            f"{result.spread[n]:.3f}",
            f"{proxy.value[n]:.3f} [{proxy.low[n]:.3f}, {proxy.high[n]:.3f}]",
        )
        for n, layer in enumerate(result.layers)
    ]


COLUMNS = ("layer", "mean I", "largest absolute I", "spread of I", "KL / KL at layer 0")


def sentences(result: Horizon) -> list[str]:
    """The horizons, and what to do about them."""
    found = [
        f"Horizon by the {name}: {_place(curve.horizon)}, 95 % [{_place(curve.interval[0])}, {_place(curve.interval[1])}]."
        for name, curve in (("information metric", result.metric), ("label-free divergence", result.proxy))
    ]
    right = np.mean([sample.full for sample in result.samples])
    found.append(
        f"Probability of what was measured of the right answers, un-pruned: {right:.3f}, {len(result.samples)} samples."
    )
    if cut := sum(sample.unseen > 0 for sample in result.samples):
        found.append(
            f"{cut} answers are longer than what was measured, and their later tokens may need the picture in later layers: "
            "measure more tokens (answer_tokens)."
        )
    if result.safe is None:
        found.append("No measured layer can do without visual tokens for certain: no deep random stage is recommended.")
    elif result.safe == 0:
        found.append("The pictures do not matter to these answers: measure on other questions.")
    return found


def _place(layer: int | None) -> str:
    return "none" if layer is None else f"layer {layer}"


def markdown(result: Horizon) -> str:
    """The table, the horizons and the recipes."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---:|" * len(COLUMNS)]
    lines += [f"| {' | '.join(row)} |" for row in rows(result)]
    lines += ["", *(f"- {sentence}" for sentence in sentences(result))]
    lines += [
        f"- `{c.recipe}`: {c.compute_average:.1f} visual tokens enter a layer on average, {c.nominal_average:.1f} leave."
        for c in result.compositions()
    ]
    return "\n".join(lines)


def plot(result: Horizon, path: Path) -> None:
    """Both curves with their bands, thresholds and horizons."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, both = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    labels = ("largest information |I| of a window", "divergence, relative to seeing nothing")
    for axes, curve, label, colour in zip(both, (result.metric, result.proxy), labels, ("C0", "C1"), strict=True):
        axes.fill_between(result.layers, curve.low, curve.high, color=colour, alpha=0.25, linewidth=0, label="95 % band")
        axes.plot(result.layers, curve.value, color=colour, marker="o", markersize=4)
        axes.axhline(curve.threshold, color="0.5", linestyle=":", label=f"{QUIET:.0%} of the reference")
        if curve.horizon is not None:
            start, end = curve.interval
            axes.axvline(curve.horizon, color="0.2", label=f"horizon: layer {curve.horizon}")
            axes.axvspan(start, result.depth if end is None else end, color="0.2", alpha=0.12, linewidth=0)
        axes.set(xlabel="visual tokens dropped from decoder layer", ylabel=label, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
