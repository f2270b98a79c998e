"""Information horizon: from which decoder layer on visual tokens no longer change the answer. arXiv:2512.07580.

Two measurements per decoder layer i, both of the prediction of the answer's first token (or of its first `answer_tokens`):

    metric  I_i(V_k) = p_k − p_text     p_k: probability of the right answer when all visual tokens but group k are dropped
                                        at the entry of layer i (the kept ones keep their positions); p_text: when all are.
                                        Groups are windows of 2×2 tokens, as in the official code; `window=1`: single ones.
    proxy   KL(full ‖ visual tokens dropped from layer i on), relative to dropping them before layer 0: needs no answer.

The paper only says that all I beyond the horizon are "≈ 0 and equal". Here:

    horizon = first measured layer i such that for every measured layer j ≥ i the curve stays below 5 % of its reference
    metric's curve: mean over samples of max_k |I_j(V_k)|; reference: its highest value over the layers
    proxy's curve: mean over samples of the KL at j; reference: the same at layer 0

max_k |I_k| bounds both quantities of the paper: every |I_k|, and (by twice as much) every difference between two groups. The
mean over groups would hide one window that still matters among many that never did. Noise biases the maximum upwards, so it
errs towards a later, safer horizon. "For every later layer" prevents a dip in the middle from being taken for the end. Ratios
are of means over samples, so that images that never mattered cannot blow up. The paper names no threshold. For the proxy, 5 %
is that of another implementation, whose name was not recorded; for the metric it is our choice.

The paper measures the first token of the answer only, and so does the default. Later tokens may need the image in later
layers: the embedded model reads the last of three digits in later layers than the first. With `answer_tokens=n` up to n tokens
are measured, each after the right ones before it (teacher forcing). A sample then has the groups of all its tokens, and the
sum of their divergences.

Intervals (95 %) draw whole samples with replacement, and compute the reference again in every draw. The upper end of a
horizon's interval is the layer from which on the curve is negligible in at least 97.5 % of the draws, that is, where its upper
band is below 5 %. The later one of the two measurements is `safe`, and recipes are made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vlmprune
from vlmprune.evals.budgets import AVERAGES, Composition, compose
from vlmprune.evals.calibration import Sample, next_logits, run_unpruned
from vlmprune.evals.horizon_groups import Group, Only, groups
from vlmprune.show.stats import bounds, times_drawn

NEGLIGIBLE = 0.05
"""Share of the reference below which a curve counts as zero."""


# -- one sample --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SampleCurves:
    """The measurements of one sample.

    Attributes:
        name: for reports.
        visual: its visual tokens.
        full: probability of the measured tokens of the right answer, with all visual tokens.
        text: per measured layer, the same with no visual token from there on.
        information: `[layer, group]` I_i(V_k); for several answer tokens, their groups in the order of the tokens.
        divergence: per measured layer, KL in nats; `blind` is its value at layer 0.
        tokens: measured tokens of the answer; `unseen` counts those that were not measured.
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
        """Plain data: the curves, and of the groups only mean, largest and spread."""
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
            model, sample.after_answer(said), token, layers, window, chunk, lambda share: tick(share / len(answer))
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
    """The measurements of the token that follows a prompt."""
    whole = run_unpruned(model, sample)
    measured = sorted(set(range(whole.layers) if layers is None else layers))
    _check_layers(measured, whole.layers)
    rows = [None, *groups(model.config, sample.inputs, whole.visual, window)]
    right: list[Tensor] = []
    divergence: dict[int, float] = {}
    for layer in sorted({0, *measured}):
        # The proxy's reference is at layer 0. The metric may not be wanted there.
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
    """`[row, vocabulary]` logits when each row keeps only its group from a layer on."""
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


# -- all samples -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A measurement over layers.

    Attributes:
        value: per measured layer, mean over samples; `low` and `high` are its 95 % band.
        threshold: values below it count as zero.
        horizon: first layer from which on all values are below the threshold, or None; `interval` (95 %) likewise.
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
        layers: the measured ones.
        window: tokens on a side of a group.
        samples: one by one.
        mean, spread: per measured layer, mean and standard deviation of I over groups, averaged over samples.
        metric: the largest |I|; in probability.
        proxy: the divergence, relative to the one without any visual token.
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
        """Recipes with random tokens from `safe` on, for shares of the image's tokens; none where there is no such layer."""
        if not self.safe:
            return []
        sizes = {sample.visual for sample in self.samples}
        visual = float(np.mean([sample.visual for sample in self.samples]))
        unit = "tokens" if len(sizes) == 1 else "fraction"
        return [compose(visual, self.depth, self.safe, share * visual, unit) for share in averages]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, numbers with seven significant digits."""
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

    Runs the model once per sample, layer and group of tokens. This is an analysis, too slow for anything else.

    Args:
        model: an un-wrapped model of a supported family. It is wrapped for the measurement only.
        samples: prompts with their right answers.
        layers: decoder layers to measure; None is all.
        window: tokens on a side of a group.
        chunk: rows of a batch; fewer need less memory and give the same numbers.
        answer_tokens: tokens of the answer that are measured, at most; the paper's is 1.
        tick: called with the share of a sample that is done, for a progress bar.

    Raises:
        vlmprune.UsageError: no sample, a sample without answer, a layer that the model lacks, or tokens that form no raster.
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
    names = [*layers, None]
    low, high = bounds(drawn)
    first = _first_negligible(_ratio(drawn, references))
    ends = bounds(first, method="inverted_cdf")
    return Curve(
        value=_floats(value),
        low=_floats(low),
        high=_floats(high),
        threshold=float(NEGLIGIBLE * reference),
        horizon=names[int(_first_negligible(_ratio(value[None], np.array([reference])))[0])],
        interval=(names[int(ends[0])], names[int(ends[1])]),
    )


def _first_negligible(relative: np.ndarray) -> np.ndarray:
    """Per row of `[row, layer]`, the first index from which on all are below the threshold; the row's length if none is."""
    large = relative >= NEGLIGIBLE
    return np.where(large.any(1), large.shape[1] - large[:, ::-1].argmax(1), 0)


def _ratio(value: np.ndarray, reference: Any) -> np.ndarray:
    """`value [row, layer] / reference [row]` (or `[layer]` by a number); zero where the images never mattered."""
    reference = np.asarray(reference)[..., None]
    return np.divide(value, reference, out=np.zeros_like(value), where=reference > 0)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(np.asarray(values).tolist())


def _short(values: Any) -> Any:
    """Numbers with seven significant digits."""
    if isinstance(values, float):
        return float(f"{values:.7g}")
    return [_short(value) for value in values] if isinstance(values, tuple | np.ndarray) else values
