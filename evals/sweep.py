"""Every method at equal cost, beside random tokens dropped at the same places: who beats random, where, and who does not.

Cost is the compute average: visual tokens entering a decoder layer, mean over layers, as a share of all visual tokens. Each
method drops tokens where its paper does, and one factor on its counts is solved so that the average meets the budget
(`evals/budgets.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vlmprune
from vlmprune.errors import UsageError
from vlmprune.evals.answering import recipe_name
from vlmprune.evals.answers import Answered, Scored, read
from vlmprune.evals.sweep_old import read_rows
from vlmprune.evals.sweep_plan import Plan, Point
from vlmprune.evals.sweep_rows import Sweep, compare


def questions_of(seed: int, sets: int) -> int:
    """The number of the set that a seed's recipes are asked: scenes have a set for every seed, other questions have one."""
    return seed if sets > 1 else 0


def everything(plan: Plan, seeds: int, sets: int) -> list[tuple[int, vlmprune.Recipe | None]]:
    """What a sweep asks, as `answering.answer` takes it: the un-pruned model and all recipes, nothing twice.

    Args:
        seeds: each is the seed of the methods that have one.
        sets: how many sets of questions there are: one for every seed, or one for all.
    """
    wanted = [(questions_of(seed, sets), recipe) for seed in range(seeds) for recipe in (None, *plan.recipes(seed))]
    return list({(number, recipe_name(recipe)): (number, recipe) for number, recipe in wanted}.values())


def table(plan: Plan, seeds: int, answered: Answered) -> Sweep:
    """All numbers of a sweep from its answers."""

    def scored(point: Point | None) -> tuple[str, Scored]:
        names = [recipe_name(None if point is None else point.recipe(seed)) for seed in range(seeds)]
        pairs = dict.fromkeys((name, questions_of(seed, len(answered.asked))) for seed, name in enumerate(names))
        return names[0], answered.scored(pairs)

    return compare(plan, scored)


def recomputed(folder: Path, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a sweep again, from the answers in its folder: `answers.jsonl`, or `rows.jsonl` of an earlier version.

    Args:
        numbers: of the folder's `sweep.json`, which says what was planned.

    Raises:
        UsageError: there are no answers, or those of a recipe are missing.
    """
    before = Sweep.from_dict(numbers)
    answered = read_rows(folder, numbers) or read(folder)
    planned = everything(before.plan, numbers["seeds"], len(answered.asked))
    wanted = [(recipe_name(recipe), number) for number, recipe in planned]
    if missing := [recipe for recipe, number in wanted if (recipe, number) not in answered.answers]:
        raise UsageError(
            f"{folder} lacks the answers of {len(missing)} of {len(wanted)} recipes, the first is {missing[0]}: run the sweep "
            "again."
        )
    swept = table(before.plan, numbers["seeds"], answered).to_dict()
    for key in ("rows", "controls"):  # times are not in the file of answers
        for row, old in zip(swept[key], numbers[key], strict=True):
            row["seconds"] = old["seconds"]
    swept["unpruned"]["seconds"] = numbers["unpruned"]["seconds"]
    return {**{key: value for key, value in numbers.items() if key != "summary"}, **swept}
