"""Recipes that may be the cheapest one within an accuracy budget: the methods' own, all methods by compute, and with a horizon.

    default   every method as it is published, its layers moved to the same relative depth in a shallower model
    compute   every method where its paper drops tokens, its counts solved for a list of compute averages (`evals/budgets.py`)
    horizon   every method with a single stage, and no visual token from the information horizon on: at the same compute average
              more tokens are left before it

Methods that do not work with a model are left out, with their reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import vlmprune
from vlmprune import Schedule
from vlmprune.errors import UsageError
from vlmprune.evals.budgets import LLAVA_LAYERS, PaperSchedule
from vlmprune.evals.calibration import Sample
from vlmprune.evals.horizon import find_horizon
from vlmprune.evals.question import Question
from vlmprune.evals.sweep_plan import Plan, make_plan

GRID = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08)
"""Compute averages of the candidates, as shares of all visual tokens."""
WHOLE = 10_000
"""A window that is larger than any picture: the horizon of all its tokens together, which takes few prefills."""


@dataclass(frozen=True)
class Candidate:
    """A recipe that may be chosen.

    Attributes:
        recipe: as a string.
        origin: where it comes from: "default", "compute" or "horizon".
        line: recipes of one line differ in their counts alone, and are listed from the costliest on; empty for one by itself.
    """

    recipe: str
    origin: str
    line: str = ""


def check_budgets(budgets: Sequence[float]) -> None:
    """Refuse what is no share.

    Raises:
        UsageError: one is not between 0 and 1.
    """
    for budget in budgets:
        if not 0 < budget < 1:
            raise UsageError(f"a budget is a share of the visual tokens between 0 and 1, found {budget:g}.")


def propose(
    model: Any, methods: Sequence[str] | None = None, budgets: Sequence[float] = GRID, horizon: int | None = None
) -> tuple[list[Candidate], list[str]]:
    """All candidates, no recipe twice, and why some methods are left out, as sentences.

    Args:
        model: un-wrapped.
        methods: default: all pruning methods.
        budgets: compute averages, as shares of all visual tokens.
        horizon: first layer that needs no visual token; None leaves these candidates out.

    Raises:
        UsageError: an unknown method, or a budget outside (0, 1); or no method works with the model.
    """
    plan = make_plan(model, methods, budgets)
    names = [name for name in vlmprune.METHODS if methods is None or name in methods]
    found: dict[str, Candidate] = {}
    reasons = dict(plan.refused)
    for name in names:
        try:
            recipe = default(model, name)
        except UsageError as error:
            reasons[name] = str(error)
        else:
            found.setdefault(recipe, Candidate(recipe, "default"))
    for point in plan.points:
        if point.method in names:
            recipe = str(point.recipe(seed=0))
            found.setdefault(recipe, Candidate(recipe, "compute", point.method))
    if horizon:
        for candidate in with_horizon(model, plan, names, budgets, horizon):
            found.setdefault(candidate.recipe, candidate)
    if not found:
        raise UsageError(f"no method works with this model: {' '.join(reasons.values())}")
    return list(found.values()), [f"Not tried: {reason}" for reason in reasons.values()]


def default(model: Any, name: str) -> str:
    """A method as it is published; where the model is too shallow, at the same relative depth.

    Raises:
        UsageError: the model does not take it.
    """
    method = vlmprune.METHODS[name]
    stages, depth = method.default.stages, model.config.get_text_config().num_hidden_layers
    if all(stage.layer < depth for stage in stages):
        recipe = vlmprune.Recipe((method(),))
    else:
        layers = PaperSchedule(tuple(stage.layer for stage in stages), depth=LLAVA_LAYERS).at_depth(depth)
        moved = [replace(stage, layer=layer) for stage, layer in zip(stages, layers, strict=True)]
        recipe = vlmprune.Recipe((method(schedule=Schedule(tuple(moved))),))
    vlmprune.wrap(model, recipe).remove()
    return str(recipe)


def with_horizon(model: Any, plan: Plan, methods: Sequence[str], budgets: Sequence[float], horizon: int) -> list[Candidate]:
    """Every method with one stage before the horizon, at all budgets, and nothing from there on; and that alone."""
    depth = model.config.get_text_config().num_hidden_layers
    nothing = vlmprune.Random(schedule=vlmprune.at(layer=horizon, tokens=0))
    found = [(vlmprune.Recipe((nothing,)), "")]
    single = {point.method: point for point in plan.points if len(point.layers) == 1 and point.layers[0] < horizon}
    for name in methods:
        if name not in single or name == nothing.name:
            continue
        (layer,) = single[name].layers
        for budget in sorted(budgets, reverse=True):
            kept = (budget * depth - layer) / (horizon - layer)
            if 0 < kept < 1:
                recipe = replace(single[name], fractions=(round(kept, 6),)).recipe(seed=0)
                found.append((vlmprune.Recipe((*recipe.methods, nothing)), f"{name} before layer {horizon}"))
    return [Candidate(str(recipe), "horizon", line) for recipe, line in found if _works(model, recipe)]


def _works(model: Any, recipe: vlmprune.Recipe) -> bool:
    try:
        vlmprune.wrap(model, recipe).remove()
    except UsageError:
        return False
    return True


def one_per_unit(questions: Sequence[Question], most: int) -> list[Question]:
    """One question with a picture about each of the first units, cycling through groups: a horizon is of all skills."""
    pictured = [question for question in questions if question.images]
    groups = list(dict.fromkeys(question.group for question in pictured))
    units: dict[str, list[Question]] = {}
    for question in pictured:
        units.setdefault(question.unit or question.id, []).append(question)
    chosen = []
    for number, own in enumerate(list(units.values())[:most]):
        turn = number % len(groups)
        wanted = [*groups[turn:], *groups[:turn]]
        chosen.append(min(own, key=lambda question: wanted.index(question.group)))
    return chosen


def measured_horizon(model: Any, samples: Iterable[Sample], answer_tokens: int, tick: Any = lambda share: None) -> int | None:
    """The first layer that needs no visual token (`Horizon.safe`), all tokens of a picture taken together; None if none is."""
    return find_horizon(model, samples, window=WHOLE, answer_tokens=answer_tokens, tick=tick).safe
