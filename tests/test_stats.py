"""Intervals on data whose truth is known: all draws enumerated, and coverage by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vlmprune.evals import stats as evals
from vlmprune.evals.bench import Ratio
from vlmprune.show import stats
from vlmprune.tiny.answers import Record, accuracy, accuracy_by_skill

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


def arrays(given: list[Record]) -> dict[str, list]:
    """Records as `evals/stats.py` takes them."""
    return {
        "score": [float(record.right) for record in given],
        "unit": [record.image for record in given],
        "group": [record.skill for record in given],
    }


def draws(given: list[Record]) -> np.ndarray:
    """Accuracy `[draw, skill]` in draws of whole pictures; skills in the order of `SKILLS`."""
    pictures = sorted({record.image for record in given})
    cells = [[[r.right for r in given if (r.image, r.skill) == (n, skill)] for skill in SKILLS] for n in pictures]
    right = np.array([[sum(cell) for cell in line] for line in cells], float)
    return stats.shares(right, np.array([[len(cell) for cell in line] for line in cells]))


def mean_interval(given: list[Record]) -> tuple[float, float]:
    """Of the bootstrap, however few pictures there are."""
    return stats.interval(stats.mean_of_present(draws(given)))


def test_three_right_answers_of_three():
    """[29.2, 100]: three pictures cannot rule out that seven of ten would be wrong (0.292³ = 2.5 %).

    Red in the code that took a skill which a draw lacks for 0 % ([33, 100], with seven skills [85.7, 100]), and in the code
    that gave the bootstrap's point [100, 100].
    """
    given = records({0: {"colour": [True]}, 1: {"counting": [True]}, 2: {"reading": [True]}})
    found = evals.estimate(**arrays(given))
    assert (found.value, found.n, found.units, found.source) == (1.0, 3, 3, "exact")
    assert (found.low, found.high) == (pytest.approx(0.025 ** (1 / 3)), 1.0)
    same = records({n: {"colour": [True]} for n in range(3)})
    assert (accuracy(same).low, accuracy(same).high) == (pytest.approx(0.025 ** (1 / 3)), 1.0)
    wrong = evals.estimate(**arrays(records({n: {"colour": [False, False]} for n in range(3)})))
    assert (wrong.low, wrong.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 3)))


def test_draws_are_all_possible_ones():
    """Against the enumeration of all 256 draws: quantiles, mean and spread. Red: skills, weights or pictures are mixed up."""
    given = records(RARE)
    exact, drawn = np.array(by_loops(given)), stats.mean_of_present(draws(given))
    assert {round(mean, 9) for mean in drawn.tolist()} <= {round(mean, 9) for mean in exact.tolist()}
    error = exact.std() / len(drawn) ** 0.5
    assert abs(drawn.mean() - exact.mean()) < 4 * error
    assert abs(drawn.std() - exact.std()) < 4 * error
    low, high = mean_interval(given)
    for value, level in ((low, 0.025), (high, 0.975)):
        at = (exact <= value + 1e-9).mean(), (exact < value - 1e-9).mean()
        assert at[1] - 0.015 <= level <= at[0] + 0.015


def test_a_skill_by_itself_is_of_the_pictures_that_have_it():
    """Two right of two about one picture of four: one picture, whose interval is [2.5, 100], beside whatever other pictures."""
    given = records(RARE)
    assert np.isnan(draws(given)[:, 2]).mean() == pytest.approx((3 / 4) ** 4, abs=0.04)
    reading = accuracy_by_skill(given)["reading"]
    assert (reading.value, reading.low, reading.high, reading.n) == (1.0, pytest.approx(0.025), 1.0, 2)
    assert evals.estimate_by_group(**arrays(given))["reading"].units == 1


def test_without_a_lacking_skill_nothing_changed():
    """Tables that were made before: every draw has every skill, and the numbers are those of the plain formula, bit for bit."""
    rng = np.random.default_rng(3)
    given = records({n: {skill: [bool(rng.random() < 0.7)] for skill in SKILLS} for n in range(40)})
    picture = np.random.default_rng(0).integers(0, 40, (2_000, 40))
    right = np.array([[record.right for record in given if record.image == n] for n in range(40)], float)
    plain = right[picture].sum(1) / 40
    assert np.array_equal(draws(given), plain)
    assert mean_interval(given) == tuple(np.quantile(plain.mean(1), [0.025, 0.975]))
    whole = evals.estimate(**arrays(given))
    assert (whole.low, whole.high, whole.source) == (*mean_interval(given), "bootstrap")
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
        asked = asked[:, asked.any(axis=0)]
        right = rng.binomial(asked, ease)
        low, high, _ = stats.mean_interval(right.astype(float), asked)
        held += low <= truth <= high
        width.append(high - low)
    assert 0.90 <= held / experiments <= 0.98, held / experiments
    assert np.median(width) < (0.17 if rare == 1 else 0.26)


def test_nothing_drawn_is_nothing():
    """A column that nobody was asked about is NaN, with no warning and no zero."""
    none = stats.shares(np.zeros((3, 2)), np.array([[1, 0], [1, 0], [2, 0]]))
    assert np.isnan(none[:, 1]).all()
    assert (stats.mean_of_present(none) == 0).all()
    assert all(np.isnan(stats.interval(none[:, 1])))
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
