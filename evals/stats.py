"""Statistics of scored answers: means with intervals, paired differences with p-values, and correction for many of them.

Everything works on three arrays of one entry per question: `score` in 0…1, `unit` (what is independent, usually the picture)
and `group` (skill or category). Which interval, which test and which correction is used, and why, is in docs/statistics.md:

- A mean is the unweighted mean over groups of each group's mean. Intervals (95 %) resample whole units, or are exact where the
  bootstrap cannot work (`vlmprune/show/stats.py`).
- A difference is of the same questions under two recipes. Its p-value is that of the sign-flip test: if two recipes are equally
  good, each unit's difference is as likely with the other sign (Fisher, The Design of Experiments, 1935, section 21).
- Many p-values are corrected by Holm's method, which holds whatever the tests share.

All draws are seeded: equal arrays give equal numbers. Units are numbered as they first occur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np

from vlmprune.errors import UsageError, unknown
from vlmprune.show.stats import Interval, difference_interval, interval, mean_interval, mean_of_present, shares

LEVEL = 0.05
"""A difference with a smaller p-value (corrected, where there are many) is called one; intervals hold 1 − LEVEL."""
FLIPS = 99_999
"""Random sign flips of a test; with up to 16 units that differ, all flips are counted instead."""
_ALL_FLIPS = 16
_ROWS = 8_192

Array = Sequence[Any] | np.ndarray
Key = TypeVar("Key")
Correction = Literal["holm", "bh"]
CORRECTIONS: dict[str, str] = {
    "holm": "Holm: at most one in twenty such tables has any false claim, whatever the tests share",
    "bh": "Benjamini–Hochberg: at most one in twenty of the claims is false on average, for tests that help each other",
}


@dataclass(frozen=True)
class Estimate:
    """A mean of scores.

    Attributes:
        value: unweighted mean over groups.
        low, high: its 95 % interval.
        n: questions.
        units: what they are about (pictures).
        source: how the interval was made: "bootstrap" or "exact".
    """

    value: float
    low: float
    high: float
    n: int
    units: int
    source: str

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """Scores minus those of a reference on the same questions.

    Attributes:
        value: unweighted mean over groups; positive is better than the reference.
        low, high: its 95 % interval, units paired.
        p: two-sided p-value of the sign-flip test over units.
        n, units, source: as in `Estimate`.
        corrected: the p-value among all that it was tested with; `p` itself where it was tested alone.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    units: int
    source: str
    corrected: float

    @property
    def verdict(self) -> str:
        """Beats or loses where the corrected p-value is below `LEVEL`, and ties elsewhere."""
        if self.corrected >= LEVEL or not self.value:
            return "ties"
        return "beats" if self.value > 0 else "loses"

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the verdict among it."""
        return {**asdict(self), "verdict": self.verdict}


# -- one recipe --------------------------------------------------------------------------------------------------------


def estimate(score: Array, unit: Array, group: Array | None = None, seed: int = 0) -> Estimate:
    """The mean over groups with its interval; without `group`, the mean over questions.

    Args:
        score: `[question]` in 0…1.
        unit: `[question]` names or numbers of what is independent.
        group: `[question]` names of skills or categories.
        seed: of the draws.

    Raises:
        UsageError: no question, arrays of unequal lengths, or a score outside 0…1.
    """
    sums = _sums(unit, group, score)
    right = sums.scores[0]
    return _estimate(right, sums.asked, mean_interval(right, sums.asked, seed))


def estimate_by_group(score: Array, unit: Array, group: Array, seed: int = 0) -> dict[str, Estimate]:
    """The mean of every group, in the order in which groups first occur; a group's units are those that it is about."""
    sums, found = _sums(unit, group, score), {}
    for column, name in enumerate(sums.groups):
        has = sums.asked[:, column] > 0
        right, asked = sums.scores[0][has, column, None], sums.asked[has, column, None]
        found[name] = _estimate(right, asked, mean_interval(right, asked, seed))
    return found


def loyalty(given: Sequence[str], reference: Sequence[str], unit: Array, seed: int = 0) -> Estimate:
    """Share of answers that equal those of the un-pruned model to the same questions, right or wrong."""
    if len(given) != len(reference):
        raise UsageError(f"loyalty compares answers to the same questions: found {len(given)} and {len(reference)} answers.")
    return estimate([float(one == other) for one, other in zip(given, reference, strict=True)], unit, seed=seed)


def _estimate(right: np.ndarray, asked: np.ndarray, interval: Interval) -> Estimate:
    total = asked.sum(axis=0)
    return Estimate(
        float((right.sum(axis=0) / total).mean()), interval.low, interval.high, int(total.sum()), len(asked), interval.source
    )


# -- two recipes -------------------------------------------------------------------------------------------------------


def difference(score: Array, reference: Array, unit: Array, group: Array | None = None, seed: int = 0) -> Difference:
    """Scores minus those of a reference on the same questions, mean over groups, with interval and p-value.

    Args:
        score, reference: `[question]` in 0…1, in the same order.
        unit, group, seed: as in `estimate`.

    Raises:
        UsageError: as in `estimate`.
    """
    sums = _sums(unit, group, score, reference)
    ours, theirs = sums.scores
    p = sign_flip(_moves(ours - theirs, sums.asked).mean(axis=1, keepdims=True), seed)[0]
    return _difference(ours, theirs, sums.asked, difference_interval(ours, theirs, sums.asked, seed), p)


def bootstrap(score: Array, reference: Array, unit: Array, group: Array | None = None, seed: int = 0) -> tuple[float, float]:
    """The bootstrap's interval of a difference, however few units there are; arguments as in `difference`.

    For sorting only: with few units it is too narrow, and a point where nothing differs.
    """
    sums = _sums(unit, group, score, reference)
    ours, theirs = (shares(one, sums.asked, seed) for one in sums.scores)
    return interval(mean_of_present(ours - theirs))


def differences_by_group(score: Array, reference: Array, unit: Array, group: Array, seed: int = 0) -> dict[str, Difference]:
    """The difference of every group by itself; see `corrected`, because these are many tests.

    All groups are measured on the same draws of all units, so that they belong to the mean's.
    """
    return differences_of_many({"": (score, reference)}, unit, group, seed)[""][1]


def differences_of_many(
    scores: Mapping[Key, tuple[Array, Array]], unit: Array, group: Array, seed: int = 0
) -> dict[Key, tuple[Difference, dict[str, Difference]]]:
    """`difference` and `differences_by_group` of many pairs of recipes on the same questions, tested by the same flips.

    Args:
        scores: name of each pair -> (score, reference).
        unit, group, seed: as in `estimate`.
    """
    sums = {key: _sums(unit, group, *pair) for key, pair in scores.items()}
    moves = [_moves(one.scores[0] - one.scores[1], one.asked) for one in sums.values()]
    tests = np.concatenate([column for own in moves for column in (own.mean(axis=1, keepdims=True), own)], axis=1)
    p = iter(sign_flip(tests, seed))
    found = {}
    for key, one in sums.items():
        (ours, theirs), asked = one.scores, one.asked
        whole = _difference(ours, theirs, asked, difference_interval(ours, theirs, asked, seed), next(p))
        groups = {}
        for column, name in enumerate(one.groups):
            own, other, n = ours[:, [column]], theirs[:, [column]], asked[:, [column]]
            groups[name] = _difference(own, other, n, difference_interval(own, other, n, seed), next(p))
        found[key] = whole, groups
    return found


def unit_moves(score: Array, reference: Array, unit: Array, group: Array | None = None) -> tuple[np.ndarray, float]:
    """`[unit]` what each unit adds to the difference of the means over groups; and the share of questions that differ, of which
    groups weigh alike. Arguments as in `difference`."""
    sums = _sums(unit, group, score, reference)
    differs = _sums(unit, group, (np.asarray(score, float) != np.asarray(reference, float)).astype(float))
    share = float((differs.scores[0].sum(axis=0) / differs.asked.sum(axis=0)).mean())
    return _moves(sums.scores[0] - sums.scores[1], sums.asked).mean(axis=1), share


def _difference(ours: np.ndarray, theirs: np.ndarray, asked: np.ndarray, interval: Interval, p: float) -> Difference:
    total = asked.sum(axis=0)
    value = float((ours.sum(axis=0) / total).mean() - (theirs.sum(axis=0) / total).mean())
    return Difference(value, interval.low, interval.high, p, int(total.sum()), _units(asked), interval.source, p)


def _units(asked: np.ndarray) -> int:
    return int(asked.any(axis=1).sum())


def _moves(change: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """`[unit, column]` what each unit adds to the difference of a column."""
    return change / asked.sum(axis=0)


def sign_flip(moves: np.ndarray, seed: int = 0) -> list[float]:
    """Two-sided p-values of `[unit, test]` contributions whose sums are tested against zero.

    The share of sign flips of whole units whose sum is at least as far from zero; of random flips, the observed signs count as
    one (Phipson & Smyth, Statistical Applications in Genetics and Molecular Biology 9, 2010). All tests use the same flips.
    `scipy.stats.permutation_test(permutation_type="samples")` gives the same p-values, but draws anew for every test, and a
    sweep has hundreds.
    """
    moves = moves[np.any(moves != 0, axis=1)]
    units, tests = moves.shape
    if not units:
        return [1.0] * tests
    # Sums of the same contributions in another order differ by rounding: equal ones must count as equal.
    observed = np.abs(moves.sum(axis=0)) - 1e-9 * np.abs(moves).sum(axis=0)
    every = units <= _ALL_FLIPS
    total = 2**units if every else FLIPS
    rng, far = np.random.default_rng(seed), np.zeros(tests, np.int64)
    for start in range(0, total, _ROWS):
        rows = min(_ROWS, total - start)
        if every:
            signs = (np.arange(start, start + rows)[:, None] >> np.arange(units)) & 1
        else:
            signs = rng.integers(0, 2, (rows, units), dtype=np.int8)
        far += (np.abs((2.0 * signs - 1.0) @ moves) >= observed).sum(axis=0)
    return (far / total if every else (far + 1) / (total + 1)).tolist()


# -- many comparisons --------------------------------------------------------------------------------------------------


def corrected(p: Sequence[float], method: Correction = "holm") -> list[float]:
    """P-values as they count among all of them, in the given order.

    Args:
        p: of all tests that are read together.
        method: "holm" (Holm, Scandinavian Journal of Statistics 6, 1979) or "bh" (Benjamini & Hochberg, Journal of the Royal
            Statistical Society B 57, 1995). A table whose lines are quoted one by one needs Holm's: each line counts alone,
            and all of them use the same pictures.

    Raises:
        UsageError: an unknown method.
    """
    if method not in CORRECTIONS:
        raise unknown("correction", method, CORRECTIONS)
    values = np.asarray(p, float)
    if not len(values):
        return []
    if method == "bh":
        from scipy.stats import false_discovery_control

        return false_discovery_control(values, method="bh").tolist()
    order = np.argsort(values, kind="stable")
    rising = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    found = np.empty(len(values))
    found[order] = np.minimum(rising, 1.0)
    return found.tolist()


def correct(differences: Mapping[Any, Difference], method: Correction = "holm") -> dict[Any, Difference]:
    """The same differences with `corrected` set among all of them."""
    values = corrected([one.p for one in differences.values()], method)
    return {key: replace(one, corrected=p) for (key, one), p in zip(differences.items(), values, strict=True)}


# -- sums per unit -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sums:
    """Per unit and group, both in the order of first occurrence: `[unit, group]` scores and questions."""

    scores: list[np.ndarray]
    asked: np.ndarray
    groups: list[str]


def _sums(unit: Array, group: Array | None, *scores: Array) -> _Sums:
    units = np.asarray(unit)
    groups = np.zeros(len(units), np.int64) if group is None else np.asarray(group)
    arrays = [np.asarray(score, float) for score in scores]
    if not len(units):
        raise UsageError("there are no answers to measure: give at least one question.")
    if any(array.shape != units.shape for array in (*arrays, groups)):
        found = ", ".join(str(len(array)) for array in (*arrays, units, groups))
        raise UsageError(f"scores, units and groups must have one entry per question: found lengths {found}.")
    for array in arrays:
        if not bool(((array >= 0) & (array <= 1)).all()):
            raise UsageError(f"a score lies between 0 and 1: found {array[~((array >= 0) & (array <= 1))][0]:g}.")
    row, _ = _numbered(units)
    column, names = _numbered(groups)
    cell = row, column
    shape = (int(row.max()) + 1, len(names))
    asked = np.zeros(shape)
    np.add.at(asked, cell, 1)
    sums = []
    for array in arrays:
        sums.append(np.zeros(shape))
        np.add.at(sums[-1], cell, array)
    return _Sums(sums, asked, [str(name) for name in names])


def _numbered(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[question]` number of each entry's name, and the names, in the order of first occurrence."""
    found, first, number = np.unique(names, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return np.argsort(order)[number.reshape(-1)], found[order]
