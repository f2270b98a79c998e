"""Comparisons on simulated answers whose truth is known: coverage, false alarms, finds, corrections."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from simulated import simulate

import vlmprune as vp
from vlmprune.evals import stats
from vlmprune.show.stats import difference_interval

EXPERIMENTS = 300


def binomial_error(share, of=EXPERIMENTS):
    return 3 * (share * (1 - share) / of) ** 0.5


SITUATIONS = {
    "few": (8, 1, 0.8, 0.0),
    "few, nearly all right": (12, 3, 0.98, 0.0),
    "few clusters": (20, 8, 0.6, 0.5),
    "clusters": (80, 5, 0.7, 0.6),
    "whole clusters": (60, 4, 0.9, 1.0),
    "many, nearly all right": (300, 1, 0.99, 0.0),
    "many": (400, 2, 0.75, 0.2),
}


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_coverage_of_a_mean(situation):
    """The 95 % interval holds the truth in 95 % of experiments within binomial error, clusters included; exact ones in more."""
    units, per_unit, accuracy, cluster = situation
    rng, held = np.random.default_rng(1), 0
    for _ in range(EXPERIMENTS):
        score, _, unit = simulate(rng, units, per_unit, accuracy, cluster=cluster)
        found = stats.estimate(score, unit)
        held += found.low <= accuracy <= found.high
    assert held / EXPERIMENTS >= 0.95 - binomial_error(0.95)


@pytest.mark.parametrize(
    ("units", "per_unit", "agreement", "loss", "cluster"),
    [(10, 2, 0.7, 0.1, 0.0), (60, 3, 0.8, 0.05, 0.5), (300, 1, 0.98, 0.01, 0.0), (300, 2, 0.9, 0.05, 0.3)],
)
def test_coverage_of_a_difference(units, per_unit, agreement, loss, cluster):
    rng, held = np.random.default_rng(2), 0
    for _ in range(EXPERIMENTS):
        first, second, _ = simulate(rng, units, per_unit, 0.8, agreement, loss, cluster)
        ours, theirs = (score.reshape(units, -1).sum(axis=1, keepdims=True) for score in (second, first))
        found = difference_interval(ours, theirs, np.full((units, 1), per_unit))
        held += found.low <= -loss <= found.high
    assert held / EXPERIMENTS >= 0.95 - binomial_error(0.95)


def test_coverage_where_every_answer_differs():
    """Better or worse by a coin: the two shares exclude each other, which makes their difference vary more.

    Red if they are joined as if they were independent, or rose together.
    """
    rng, held = np.random.default_rng(7), 0
    for _ in range(EXPERIMENTS):
        ours = (rng.random((25, 1)) < 0.5).astype(float)
        low, high, _ = difference_interval(ours, 1 - ours, np.ones((25, 1)))
        held += low <= 0 <= high
    assert held / EXPERIMENTS >= 0.95 - binomial_error(0.95)


def test_intervals_of_single_questions_would_be_too_narrow():
    """What the coverage test guards: with every question as its own unit, clusters leave the interval in over a tenth."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(EXPERIMENTS):
        score, _, _ = simulate(rng, 80, 5, 0.7, cluster=0.6)
        found = stats.estimate(score, np.arange(len(score)))
        held += found.low <= 0.7 <= found.high
    assert held / EXPERIMENTS < 0.88


@pytest.mark.parametrize(("units", "per_unit", "cluster"), [(40, 1, 0.0), (100, 4, 0.7), (9, 3, 0.5)])
def test_equal_recipes_are_silent(units, per_unit, cluster):
    """Two equally good recipes that answer differently: at least 90 of 100 resamplings give no verdict."""
    rng, silent = np.random.default_rng(3), 0
    for _ in range(100):
        first, second, unit = simulate(rng, units, per_unit, 0.7, agreement=0.8, cluster=cluster)
        silent += stats.difference(second, first, unit).verdict == "ties"
    assert silent >= 90


def test_nothing_differs():
    """The same answers: p is 1, and the interval is what so many pictures can rule out, not a point."""
    score, unit = np.array([1.0, 0.0, 1.0, 1.0] * 25), np.arange(100)
    found = stats.difference(score, score, unit)
    assert (found.value, found.p, found.verdict, found.source) == (0.0, 1.0, "ties", "exact")
    assert found.high == -found.low == pytest.approx(1 - 0.025**0.01)


@pytest.mark.parametrize("units", [7, 15])
def test_all_flips_equal_scipys(units):
    """Exact p-values, also where several flips give the very sum that was observed."""
    rng = np.random.default_rng(units)
    moves = rng.integers(-2, 4, (units, 3)) / 7
    expected = [
        scipy.stats.permutation_test((column,), np.sum, permutation_type="samples", n_resamples=2**units).pvalue
        for column in moves.T
    ]
    assert stats.sign_flip(moves) == pytest.approx(expected, abs=1e-12)


def test_random_flips_equal_scipys():
    rng = np.random.default_rng(4)
    moves = rng.normal(0.18, 1, (60, 1))
    expected = scipy.stats.permutation_test(
        (moves[:, 0],), np.sum, permutation_type="samples", n_resamples=49_999, vectorized=False, rng=np.random.default_rng(0)
    ).pvalue
    (found,) = stats.sign_flip(moves)
    assert found == pytest.approx(expected, abs=4 * (expected / 49_999) ** 0.5)
    assert 0.01 < found < 0.9
    assert stats.sign_flip(moves + 3)[0] == 1 / 100_000  # the observed signs alone


def test_groups_weigh_the_same():
    """The mean is over groups, not over questions; a group asked about one picture weighs as much as one with a hundred."""
    score = np.array([1.0] * 100 + [0.0])
    group = ["often"] * 100 + ["rare"]
    found = stats.estimate(score, np.arange(101), group)
    assert (found.value, found.n, found.units) == (0.5, 101, 101)
    assert found.low < 0.45  # a single wrong answer says little about its group
    assert found.high > 0.55
    by_group = stats.estimate_by_group(score, np.arange(101), group)
    assert list(by_group) == ["often", "rare"]
    assert (by_group["rare"].low, by_group["rare"].high) == (0.0, pytest.approx(0.975))


def test_order_of_questions_and_names_of_units_do_not_matter():
    rng = np.random.default_rng(5)
    first, second, unit = simulate(rng, 50, 4, 0.7, 0.8, 0.1, 0.3)
    group, order = np.array(["a", "b", "b", "c"] * 50), rng.permutation(200)
    whole = stats.difference(second, first, unit, group)
    again = stats.difference(second[order], first[order], unit[order], group[order])
    assert again.value == pytest.approx(whole.value, abs=1e-12)
    assert (again.low, again.high, again.p) == pytest.approx((whole.low, whole.high, whole.p), abs=0.012)
    names = np.char.add("picture ", unit.astype(str))
    assert stats.estimate(first, names, group) == stats.estimate(first, unit, group)  # "picture 10" is not before "picture 2"


def test_a_difference_is_of_its_means():
    rng = np.random.default_rng(6)
    first, second, unit = simulate(rng, 90, 3, 0.7, 0.8, 0.2)
    group = np.array(["a", "b", "a"] * 90)
    whole, parts = stats.difference(second, first, unit, group), stats.differences_by_group(second, first, unit, group)
    assert whole.value == pytest.approx(stats.estimate(second, unit, group).value - stats.estimate(first, unit, group).value)
    assert whole.value == pytest.approx(np.mean([part.value for part in parts.values()]))
    assert (whole.verdict, whole.n) == ("loses", 270)
    assert stats.difference(first, second, unit, group).verdict == "beats"


def test_loyalty():
    found = stats.loyalty(["yes", "2", "red", "no"], ["yes", "3", "red", "no"], ["a", "a", "b", "c"])
    assert (found.value, found.n, found.units) == (0.75, 4, 3)
    assert found.low < 0.4 < 0.9 < found.high
    with pytest.raises(vp.UsageError, match="1 and 2 answers"):
        stats.loyalty(["yes"], ["yes", "no"], [0, 1])


def test_holm_by_hand():
    """The paper's procedure step by step, and a tie; Benjamini–Hochberg is scipy's."""
    p = [0.01, 0.04, 0.03, 0.005]
    assert stats.corrected(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.corrected([0.4, 0.4]) == [0.8, 0.8]
    assert stats.corrected([0.7, 0.9]) == [1.0, 1.0]
    assert stats.corrected(p, "bh") == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert stats.corrected([]) == []
    with pytest.raises(vp.UsageError, match="unknown correction 'bonferoni'"):
        stats.corrected(p, "bonferoni")


def test_a_table_of_equal_recipes_is_silent():
    """Forty recipes like the reference, on the same pictures: after Holm's correction at most one table in ten has a claim."""
    rng, tables = np.random.default_rng(8), 0
    for _ in range(60):
        reference, _, unit = simulate(rng, 50, 1, 0.7)
        found = {}
        for recipe in range(40):
            flip = rng.random(50) < 0.2
            again = np.where(flip, rng.random(50) < 0.7, reference)
            pair = (again, np.where(flip, rng.random(50) < 0.7, reference))
            found[recipe] = stats.difference(*pair, unit)
        assert {one.verdict for one in found.values()} <= {"ties", "beats", "loses"}
        tables += any(one.verdict != "ties" for one in stats.correct(found).values())
    assert tables <= 6


def test_correction_takes_verdicts_back():
    rng = np.random.default_rng(9)
    first, second, unit = simulate(rng, 60, 1, 0.8, 0.85, 0.12)
    alone = stats.difference(second, first, unit)
    assert alone.verdict == "loses"
    among = stats.correct({"this": alone, **{n: stats.difference(first, first, unit) for n in range(200)}})["this"]
    assert (among.p, among.verdict) == (alone.p, "ties")
    assert among.to_dict()["verdict"] == "ties"


def test_wrong_arrays():
    with pytest.raises(vp.UsageError, match="no answers"):
        stats.estimate([], [])
    with pytest.raises(vp.UsageError, match="found lengths 2, 3, 3"):
        stats.estimate([1, 0], [0, 1, 2])
    for wrong in (1.5, float("nan")):
        with pytest.raises(vp.UsageError, match="between 0 and 1"):
            stats.estimate([1, wrong], [0, 1])
