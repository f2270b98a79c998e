"""The bootstrap behind every interval: what is independent is drawn again, whole, and an interval is the middle of the draws.

What is drawn are pictures, samples or rounds, never the single questions about one picture, which are not independent
(Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13). A draw speaks of what it holds: a skill that no
picture of a draw was asked about has no accuracy in it, and is left out of that draw's mean.

An interval of draws that are all equal is a point: three right answers of three give [100, 100]. It says that the answers did
not differ, and nothing about questions that were not asked; look at the number of answers beside it.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np

RESAMPLES = 2_000
LEVEL = (0.025, 0.975)
"""The middle 95 % of the draws."""


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
        right, asked: `[unit, column]` numbers of right answers and of questions of each unit (picture), by column (skill).
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
