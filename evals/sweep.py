"""Every method at equal cost, beside random tokens dropped at the same places: who beats random, where, and who does not.

Cost is the compute average: visual tokens entering a decoder layer, mean over layers, as a share of all visual tokens. Each
method drops tokens where its paper does, and one factor on its counts is solved so that the average meets the budget
(`evals/budgets.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import vlmprune
from vlmprune.evals.asking import Questions, scenes_of_seed
from vlmprune.evals.sweep_plan import Plan, Point
from vlmprune.evals.sweep_rows import Sweep, compare
from vlmprune.evals.sweep_store import Answers, Store, code_fingerprint, recipe_name
from vlmprune.tiny.answers import Record


def ask(model: Any, questions: Questions, recipe: vlmprune.Recipe | None) -> tuple[list[str], float]:
    """The answers under a recipe, and the measured compute average as a share of all visual tokens."""
    if recipe is None:
        return questions.ask(model), 1.0
    entered = visual = 0.0

    def measure(asked: int) -> None:
        nonlocal entered, visual
        report = run.report()
        entered += report.visual_compute_average * asked
        visual += report.visual_tokens

    with vlmprune.wrap(model, recipe) as run:
        return questions.ask(model, measure), entered / visual


def sweep(
    model: Any,
    processor: Any,
    plan: Plan,
    seeds: int = 3,
    images: int = 100,
    split: str = "test",
    folder: Path | None = None,
    tick: Callable[[str, int, int], None] = lambda recipe, done, total: None,
) -> Sweep:
    """Run what has no answers yet, and compare everything.

    Args:
        plan: from `make_plan`.
        seeds: each has other held-out scenes, and is the seed of methods that have one.
        images: scenes per seed.
        folder: where answers are kept, so that an interrupted sweep goes on.
        tick: called before every run with its recipe, the number of runs that are done, and their total; and at the end.
    """
    store = Store(folder)
    wanted = [(seed, recipe) for seed in range(seeds) for recipe in (None, *plan.recipes(seed))]
    done, total = 0, sum(store.get(recipe, seed, split, images) is None for seed, recipe in wanted)
    known: dict[int, list[tuple[int, str, str]]] = {}
    for seed, group in groupby(wanted, key=lambda pair: pair[0]):
        questions = Questions(processor, scenes_of_seed(seed, images, split), first=seed * images)
        known[seed] = questions.known
        for _, recipe in group:
            if store.get(recipe, seed, split, images) is None:
                tick(recipe_name(recipe), done, total)
                start = time.perf_counter()
                given, share = ask(model, questions, recipe)
                seconds = time.perf_counter() - start
                store.add(Answers(recipe_name(recipe), code_fingerprint(), seed, split, images, given, share, seconds))
                done += 1
    tick("", done, total)

    def pooled(point: Point | None) -> tuple[list[Record], list[Answers]]:
        rows = [store.get(None if point is None else point.recipe(seed), seed, split, images) for seed in range(seeds)]
        found = [row for row in rows if row is not None]
        return [Record(*at, said) for row in found for at, said in zip(known[row.seed], row.given, strict=True)], found

    return compare(plan, pooled)
