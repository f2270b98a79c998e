"""Intervals on data whose truth is known: all draws enumerated, and coverage by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vlmprune.evals.accuracy import draws_by_skill
from vlmprune.evals.bench import Ratio
from vlmprune.evals.sweep_rows import differences
from vlmprune.show import stats
from vlmprune.tiny.answers import Record, accuracy, accuracy_by_skill, mean_over_skills

SKILLS = ("colour", "counting", "reading")


def records(table: dict[int, dict[str, list[bool]]]) -> list[Record]:
    """Per picture and skill, which answers are right."""
    return [
        Record(picture, skill, "yes", "yes" if right else "no")
        for picture, skills in table.items()
        for skill, answers in skills.items()
        for right in answers
    ]


def by_loops(given: list[Record]) -> list[float]:
    """The mean over skills of every possible draw of as many pictures: what the bootstrap samples from."""
    pictures = sorted({record.image for record in given})
    means = []
    for draw in itertools.product(pictures, repeat=len(pictures)):
        answers = [record for picture in draw for record in given if record.image == picture]
        skills = {record.skill for record in answers}
        shares = []
        for skill in skills:
            own = [record.right for record in answers if record.skill == skill]
            shares.append(sum(own) / len(own))
        means.append(sum(shares) / len(shares))
    return means


RARE = {
    0: {"colour": [True], "counting": [False]},
    1: {"colour": [True, False], "counting": [True]},
    2: {"colour": [True], "reading": [True, True]},
    3: {"colour": [False, True], "counting": [True]},
}
"""Reading is asked about one picture of four: a third of all draws lack it."""


def mean_interval(given: list[Record]) -> tuple[float, float]:
    return stats.interval(stats.mean_of_present(draws_by_skill(given)))


def test_three_right_answers_of_three():
    """Red in the code that took a skill which a draw lacks for 0 %: [33, 100]."""
    given = records({0: {"colour": [True]}, 1: {"counting": [True]}, 2: {"reading": [True]}})
    assert mean_over_skills(accuracy_by_skill(given)) == 1
    assert mean_interval(given) == (1.0, 1.0)
    wrong = records({0: {"colour": [False]}, 1: {"counting": [False]}, 2: {"reading": [False]}})
    assert mean_interval(wrong) == (0.0, 0.0)
    assert differences(given, wrong)["mean"].low == differences(given, wrong)["mean"].high == 1.0


def test_the_command_says_so_too():
    """One scene, every question right: the row of `vlmprune eval` and the paired difference to itself are points."""
    from vlmprune.evals.accuracy import _row

    given = records({0: {"colour": [True]}, 1: {"counting": [True, True]}, 2: {"colour": [True], "reading": [True]}})
    row = _row("recipe", given, given)
    assert (row.mean, row.interval, row.lost, row.lost_interval) == (1.0, (1.0, 1.0), 0.0, (0.0, 0.0))


def test_draws_are_all_possible_ones():
    """Against the enumeration of all 256 draws: quantiles, mean and spread. Red: skills, weights or pictures are mixed up."""
    given = records(RARE)
    exact, drawn = np.array(by_loops(given)), stats.mean_of_present(draws_by_skill(given))
    assert {round(mean, 9) for mean in drawn.tolist()} <= {round(mean, 9) for mean in exact.tolist()}
    error = exact.std() / len(drawn) ** 0.5
    assert abs(drawn.mean() - exact.mean()) < 4 * error
    assert abs(drawn.std() - exact.std()) < 4 * error
    low, high = mean_interval(given)
    for value, level in ((low, 0.025), (high, 0.975)):
        at = (exact <= value + 1e-9).mean(), (exact < value - 1e-9).mean()
        assert at[1] - 0.015 <= level <= at[0] + 0.015


def test_a_skill_by_itself_is_of_the_pictures_that_have_it():
    """A skill's own interval never holds a draw without it: two right of two are [100, 100], beside whatever other pictures."""
    given = records(RARE)
    assert np.isnan(draws_by_skill(given)[:, 2]).mean() == pytest.approx((3 / 4) ** 4, abs=0.04)
    reading = accuracy_by_skill(given)["reading"]
    assert (reading.low, reading.high, reading.n) == (1.0, 1.0, 2)
    half = records({**RARE, 2: {"colour": [True], "reading": [False, False]}})
    difference = differences(given, half)["reading"]
    assert (difference.value, difference.low, difference.high) == (1.0, 1.0, 1.0)


def test_without_a_lacking_skill_nothing_changed():
    """Tables that were made before: every draw has every skill, and the numbers are those of the plain formula, bit for bit."""
    rng = np.random.default_rng(3)
    given = records({n: {skill: [bool(rng.random() < 0.7)] for skill in SKILLS} for n in range(40)})
    picture = np.random.default_rng(0).integers(0, 40, (2_000, 40))
    right = np.array([[record.right for record in given if record.image == n] for n in range(40)], float)
    plain = right[picture].sum(1) / 40
    assert np.array_equal(draws_by_skill(given), plain)
    assert mean_interval(given) == tuple(np.quantile(plain.mean(1), [0.025, 0.975]))
    one = [record for record in given if record.skill == "colour"]
    assert (accuracy(one).low, accuracy(one).high) == tuple(np.quantile(plain[:, 0], [0.025, 0.975]))


@pytest.mark.parametrize("rare", [1.0, 0.08], ids=["every skill everywhere", "a skill about few pictures"])
def test_coverage(rare):
    """The 95 % interval holds the true mean in about 95 % of experiments: pictures of unequal difficulty, several questions.

    Red for intervals that draw single questions: they hold it in 81 and 87 % of experiments.
    """
    rng, held, width = np.random.default_rng(11), 0, []
    experiments, pictures, truth = 400, 80, 0.7
    for _ in range(experiments):
        ease = np.where(rng.random((pictures, 1)) < 0.5, 0.45, 0.95)  # of a picture, for all its questions: mean 0.7
        asked = np.array([2, 2, 2]) * (rng.random((pictures, 3)) < [1.0, 1.0, rare])
        right = rng.binomial(asked, ease)
        low, high = stats.interval(stats.mean_of_present(stats.shares(right, asked)))
        held += low <= truth <= high
        width.append(high - low)
    assert 0.90 <= held / experiments <= 0.98, held / experiments
    assert np.median(width) < (0.17 if rare == 1 else 0.26)


def test_nothing_drawn_is_nothing():
    """A column that nobody was asked about is NaN, with no warning and no zero."""
    draws = stats.shares(np.zeros((3, 2)), np.array([[1, 0], [1, 0], [2, 0]]))
    assert np.isnan(draws[:, 1]).all()
    assert (stats.mean_of_present(draws) == 0).all()
    assert all(np.isnan(stats.interval(draws[:, 1])))
    assert np.isnan(accuracy([]).low)


def test_draws_are_shared_and_whole():
    """The same draws for equal numbers of units, as many units as there are, and nobody can write into them."""
    times = stats.times_drawn(7)
    assert times is stats.times_drawn(7)
    assert (times.sum(axis=1) == 7).all()
    assert np.array_equal(times[5], np.bincount(stats.drawn(7)[5], minlength=7))
    with pytest.raises(ValueError, match="read-only"):
        times[0, 0] = 3


def test_a_ratio_of_rounds_uses_the_same_bootstrap():
    """Rounds of two speeds: the middle 95 % of medians of rounds drawn with replacement, by the plain formula."""
    rng = np.random.default_rng(5)
    slow, fast = rng.normal(20, 1, 9), rng.normal(10, 1, 9)
    ratio, ratios = Ratio.of(slow.tolist(), fast.tolist()), slow / fast
    rounds = np.random.default_rng(0).integers(0, 9, (2_000, 9))
    assert (ratio.low, ratio.high) == tuple(np.quantile(np.median(ratios[rounds], axis=1), [0.025, 0.975]))
    same = Ratio.of([20.0] * 5, [10.0] * 5)
    assert (same.times, same.low, same.high) == (2.0, 2.0, 2.0)
