"""Intervals from sums per unit: the ground of all statistics (docs/statistics.md; comparisons are in `evals/stats.py`).

A *unit* is what is independent of all others: a picture, a sample or a round, never a single question about a picture.

The bootstrap draws whole units again, with replacement, and an interval is the middle 95 % of the draws (Efron & Tibshirani,
An Introduction to the Bootstrap, 1993, chapters 8 and 13). A draw speaks of what it holds: a skill that no picture of a draw
was asked about has no accuracy in it, and is left out of that draw's mean.

The bootstrap cannot see what it has no unit for. Three right answers of three would give the point [100, 100]. So a mean has
the exact interval instead where a column has fewer than `FEW_UNITS` units, or fewer than `FEW_DIFFERENT` units differ from the
others: Clopper & Pearson's of a binomial share (Biometrika 26, 1934), with as many answers as the units are worth (Korn &
Graubard, Survey Methodology 24, 1998): n = p(1 − p) / variance between units, times the squared ratio of the t quantiles for
all answers and for all units (fewer where some weigh more), and never more than there are answers. If no unit differs from the
others, nothing is known of that variance, and each unit counts as one answer. With every answer right this is
[0.025^(1 / units), 1], whatever is inside a unit: a unit is all right with a probability of at most the true mean.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from vlmprune.errors import UsageError

RESAMPLES = 2_000
LEVEL = (0.025, 0.975)
"""The middle 95 % of the draws."""

FEW_UNITS = 30
"""A column with fewer units has the exact interval."""
FEW_DIFFERENT = 4
"""With fewer units that differ from all others, over 2.5 % of the draws have none of them: an end of the bootstrap's interval
is then the common value itself, and its other end rests on those few."""

BOOTSTRAP, EXACT = "bootstrap", "exact"


class Interval(NamedTuple):
    """A 95 % interval, and how it was made: "bootstrap" or "exact"."""

    low: float
    high: float
    source: str


# -- the bootstrap -----------------------------------------------------------------------------------------------------


@cache
def drawn(units: int, seed: int = 0) -> np.ndarray:
    """Which units are drawn, with replacement, as many as there are: `[draw, unit]` int64, from 0 to `units` − 1.

    The same for every quantity about the same units, so that differences are paired.
    """
    return _read_only(np.random.default_rng(seed).integers(0, units, (RESAMPLES, units)))


@cache
def times_drawn(units: int, seed: int = 0) -> np.ndarray:
    """How often each unit is drawn: `[draw, unit]` float64, whole numbers; every row has the sum `units`."""
    times = np.zeros((RESAMPLES, units))
    np.add.at(times, (np.arange(RESAMPLES)[:, None], drawn(units, seed)), 1)
    return _read_only(times)


def _read_only(shared: np.ndarray) -> np.ndarray:
    shared.flags.writeable = False
    return shared


def shares(right: np.ndarray, asked: np.ndarray, seed: int = 0) -> np.ndarray:
    """`[draw, column]` share of right answers in every draw, NaN where a draw has no question of that column.

    Args:
        right, asked: `[unit, column]` sums of scores and numbers of questions of each unit (picture), by column (skill).
    """
    times = times_drawn(len(asked), seed)
    questions = times @ asked
    return np.divide(times @ right, questions, out=np.full(questions.shape, np.nan), where=questions > 0)


def mean_of_present(draws: np.ndarray) -> np.ndarray:
    """`[draw, column]` -> `[draw]`: the unweighted mean over the columns that a draw has; NaN for a draw that has none."""
    present = ~np.isnan(draws)
    total, columns = np.where(present, draws, 0).sum(axis=1), present.sum(axis=1)
    if present.all():
        return draws.mean(axis=1)
    return np.divide(total, columns, out=np.full(len(draws), np.nan), where=columns > 0)


def bounds(draws: np.ndarray, **quantile: Any) -> tuple[np.ndarray, np.ndarray]:
    """`[draw, …]` -> lower and upper ends `[…]` of the middle 95 % of the draws that are numbers; NaN if none is.

    Further keywords go to `numpy.nanquantile`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        low, high = np.nanquantile(draws, LEVEL, axis=0, **quantile)
    return low, high


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of `[draw]`, as two numbers; draws that are NaN are left out."""
    low, high = bounds(draws)
    return float(low), float(high)


# -- means and differences of scores -----------------------------------------------------------------------------------


def mean_interval(right: np.ndarray, asked: np.ndarray, seed: int = 0) -> Interval:
    """The interval of the mean over columns of Σ right / Σ asked.

    Args:
        right, asked: `[unit, column]` sums of scores in 0…1, and numbers of questions; every column has a question.

    Raises:
        vlmprune.UsageError: the exact interval is needed, and scipy is missing.
    """
    if _resolved(right, asked):
        return Interval(*interval(mean_of_present(shares(right, asked, seed))), BOOTSTRAP)
    low, high, _ = _exact(right, asked)
    return Interval(low, high, EXACT)


def difference_interval(right: np.ndarray, other: np.ndarray, asked: np.ndarray, seed: int = 0) -> Interval:
    """The interval of the mean over columns of Σ (right − other) / Σ asked, units paired; arguments as in `mean_interval`.

    Its exact form is the difference of two shares: how much of a unit got better, how much got worse. Their intervals are
    joined by the square root of squared distances, with the correlation of the two (Newcombe, Statistics in Medicine 17, 1998;
    Zou & Donner, Statistics in Medicine 27, 2008).
    """
    change = right - other
    if _resolved(change, asked):
        return Interval(*interval(mean_of_present(shares(right, asked, seed) - shares(other, asked, seed))), BOOTSTRAP)
    better, worse = np.maximum(change, 0), np.maximum(-change, 0)
    low_up, high_up, up = _exact(better, asked)
    low_down, high_down, down = _exact(worse, asked)
    scale = float(np.sqrt((up**2).sum() * (down**2).sum()))
    together = float((up * down).sum()) / scale if scale else 0.0
    rise, fall = _mean(better, asked), _mean(worse, asked)

    def reach(one: float, another: float) -> float:
        return float(np.sqrt(max(one**2 + another**2 - 2 * together * one * another, 0.0)))

    low = rise - fall - reach(rise - low_up, high_down - fall)
    high = rise - fall + reach(high_up - rise, fall - low_down)
    return Interval(max(low, -1.0), min(high, 1.0), EXACT)


def _mean(right: np.ndarray, asked: np.ndarray) -> float:
    return float((right.sum(axis=0) / asked.sum(axis=0)).mean())


def _resolved(right: np.ndarray, asked: np.ndarray) -> bool:
    """Whether there are enough units, and enough that differ, for the bootstrap."""
    return bool((asked > 0).sum(axis=0).min() >= FEW_UNITS and _differing(right, asked) >= FEW_DIFFERENT)


def _differing(right: np.ndarray, asked: np.ndarray) -> int:
    """How many units have a mean, in any column, that is not the most frequent one of that column."""
    differs = np.zeros(len(asked), bool)
    for column in range(asked.shape[1]):
        has = asked[:, column] > 0
        values, number, counts = np.unique(right[has, column] / asked[has, column], return_inverse=True, return_counts=True)
        differs[has] |= number.reshape(-1) != counts.argmax() if len(values) > 1 else False
    return int(differs.sum())


def _exact(right: np.ndarray, asked: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Ends of the exact interval, and `[unit]` how far each unit moves the mean."""
    special = _scipy_special()
    has = asked.any(axis=1)  # others say nothing
    right, asked = right[has], asked[has]
    total, (units, columns) = asked.sum(axis=0), asked.shape
    value = _mean(right, asked)
    moves = ((right - right.sum(axis=0) / total * asked) / total).mean(axis=1)
    # Columns of unequal size: as many answers of a single column as have the same variance. A unit is shared by its columns.
    part = (asked > 0) / (asked > 0).sum(axis=1, keepdims=True)
    size = float(columns**2 / (1 / part.sum(axis=0)).sum())
    variance = units / (units - 1) * float((moves**2).sum()) if units > 1 else 0.0
    if 0 < value < 1 and variance > 0:
        most = float(columns**2 / (1 / total).sum())
        worth = (asked / total).mean(axis=1)  # a unit alone in its column counts as much as all units of another together
        freedom = max(float((worth**2).sum() ** 2 / (worth**4).sum()) - 1, 1.0)
        narrower = special.stdtrit(max(total.sum() - 1, 1), LEVEL[1]) / special.stdtrit(freedom, LEVEL[1])
        size = min(value * (1 - value) / variance * float(narrower) ** 2, most)
    hits, misses = value * size, (1 - value) * size
    low = float(special.betaincinv(hits, misses + 1, LEVEL[0])) if hits > 0 else 0.0
    high = float(special.betaincinv(hits + 1, misses, LEVEL[1])) if misses > 0 else 1.0
    return low, high, moves


def _scipy_special() -> Any:
    try:
        from scipy import special
    except ImportError as error:
        raise UsageError("the interval of few or equal answers needs scipy: pip install 'vlmprune[evals]'.") from error
    return special
