"""The published sweep is computed again from its stored answers, number by number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmprune
from vlmprune.evals.answers import UNPRUNED
from vlmprune.evals.stats import Difference, Estimate
from vlmprune.evals.sweep import table
from vlmprune.evals.sweep_old import read_rows
from vlmprune.evals.sweep_plan import Plan, Point
from vlmprune.evals.sweep_rows import Row, Sweep

FOLDER = Path(vlmprune.__file__).resolve().parent.parent / "docs" / "results" / "sweep"
SEEDS = 3


@pytest.fixture(scope="module")
def published() -> dict:
    return json.loads((FOLDER / "sweep.json").read_text())


@pytest.fixture(scope="module")
def pairs(published) -> list[tuple[Row, Row]]:
    """Of every point whose answers are stored: the row that is computed from them, and the published one."""
    answered, sweep = read_rows(FOLDER, published), Sweep.from_dict(published)
    have = {recipe for recipe, seed in answered.answers if seed == SEEDS - 1}

    def stored(point: Point) -> bool:
        return all(str(one.recipe(SEEDS - 1)) in have for one in (point, point.control()))

    again = table(Plan([point for point in sweep.plan.points if stored(point)]), SEEDS, answered)
    rows = {row.point: row for row in (sweep.unpruned, *sweep.methods, *sweep.controls)}
    assert UNPRUNED in have
    return [(row, rows[row.point]) for row in (again.unpruned, *again.methods, *again.controls)]


def ends(pair: list[tuple[Row, Row]]) -> Iterator[tuple[str, Estimate | Difference, Estimate | Difference]]:
    """Every number with an interval."""
    for ours, theirs in pair:
        assert (ours.by_skill.keys(), ours.over_random.keys()) == (theirs.by_skill.keys(), theirs.over_random.keys())
        for name in ours.by_skill:
            yield f"{ours.recipe} {name}", ours.by_skill[name], theirs.by_skill[name]
        for name in ours.over_random:
            yield f"{ours.recipe} over random, {name}", ours.over_random[name], theirs.over_random[name]


def test_the_answers_of_most_points_are_stored(pairs, published):
    assert len(pairs) >= 50
    assert {row.point.method for row, _ in pairs if row.point} == {row["method"] for row in published["rows"]}


def test_every_mean_share_and_loyalty_is_the_published_one(pairs):
    """Red: a question is scored otherwise, a seed's scenes are others, or units are counted in another order."""
    for ours, theirs in pairs:
        numbers = [(row.mean, row.interval, row.share, row.loyalty) for row in (ours, theirs)]
        assert numbers[0] == numbers[1], ours.recipe


def test_every_skill_and_difference_is_the_published_one(pairs):
    """Where the bootstrap cannot work (almost all answers alike), the interval is exact now, and wider than published."""
    exact = 0
    for name, ours, theirs in ends(pairs):
        assert ours.value == theirs.value, name
        if isinstance(ours, Estimate):
            assert ours.n == theirs.n, name
        if ours.source == "bootstrap":
            assert (ours.low, ours.high) == (theirs.low, theirs.high), name
        else:
            exact += 1
            assert ours.low <= ours.value <= ours.high, name
            assert ours.high - ours.low > theirs.high - theirs.low, name
    assert exact
