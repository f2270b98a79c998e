"""What a sweep asks: methods × budgets, and random tokens at the same layers and counts as each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import vlmprune
from vlmprune import Budget, Schedule, Stage
from vlmprune.errors import UsageError, unknown
from vlmprune.evals.budgets import SHARES, paper_schedule

CONTROL = "random"
"""The method that all others are compared with."""


@dataclass(frozen=True)
class Point:
    """One method at one budget.

    Attributes:
        method: see `vlmprune.METHODS`.
        budget: compute average, as a share of all visual tokens.
        layers: first decoder layer after each stage.
        fractions: kept at each stage, of all visual tokens.
    """

    method: str
    budget: float
    layers: tuple[int, ...]
    fractions: tuple[float, ...]

    def recipe(self, seed: int) -> vlmprune.Recipe:
        """The recipe to run. Methods that have a seed get this one."""
        method = vlmprune.METHODS[self.method]
        own: dict[str, Any] = dict(paper_schedule(self.method).options)
        if any(parameter.name == "seed" for parameter in fields(method)):
            own["seed"] = seed
        stages = tuple(map(self._stage, self.layers, self.fractions))
        return vlmprune.Recipe((method(schedule=Schedule(stages), **own),))

    def _stage(self, layer: int, fraction: float) -> Stage:
        usual = vlmprune.METHODS[self.method].default.stages[0]
        if layer == usual.layer:  # a stage before the language model may be inside the vision tower
            return replace(usual, budget=Budget(fraction=fraction))
        return Stage(layer, Budget(fraction=fraction))

    @property
    def places(self) -> str:
        """Where it drops tokens, in words."""
        tower = ["tower"] if paper_schedule(self.method).tower < 1 else []
        return ", ".join([*tower, *map(str, self.layers)])

    def control(self) -> Point:
        """Random tokens, as many and at the same layers. What a method merges in the tower is dropped before layer 0."""
        tower = paper_schedule(self.method).tower
        if tower == 1:
            return replace(self, method=CONTROL)
        return Point(CONTROL, self.budget, (0, *self.layers), (round(tower, 6), *self.fractions))


@dataclass
class Plan:
    """What is run, and what cannot be.

    Attributes:
        points: methods × budgets, `random` among them.
        unreachable: (method, budget, lowest and highest compute average of its stages).
        refused: method -> why it does not work with this model.
    """

    points: list[Point] = field(default_factory=list)
    unreachable: list[tuple[str, float, float, float]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def controls(self) -> list[Point]:
        """One random point for every schedule that some method uses."""
        return list(dict.fromkeys(point.control() for point in self.points))

    def recipes(self, seed: int) -> list[vlmprune.Recipe]:
        """Everything to run with one seed, nothing twice."""
        points = [*self.controls(), *(point for point in self.points if point.method != CONTROL)]
        return list({str(recipe): recipe for recipe in (point.recipe(seed) for point in points)}.values())


def make_plan(model: Any, methods: Iterable[str] | None = None, budgets: Sequence[float] = SHARES) -> Plan:
    """Plan `methods` (default: all there are) at all budgets. `random` is always among them.

    Raises:
        UsageError: an unknown method, or a budget outside (0, 1).
    """
    names = sorted({CONTROL, *(vlmprune.METHODS if methods is None else methods)})
    for name in names:
        if name not in vlmprune.METHODS:
            raise unknown("method", name, vlmprune.METHODS)
    for budget in budgets:
        if not 0 < budget < 1:
            raise UsageError(f"a budget is a share of the visual tokens between 0 and 1, found {budget:g}.")
    depth, plan = model.config.get_text_config().num_hidden_layers, Plan()
    for name in names:
        try:
            schedule = paper_schedule(name)
        except UsageError as error:
            plan.refused[name] = str(error)
            continue
        for budget in sorted(set(budgets), reverse=True):
            fractions = schedule.solve(budget, depth)
            if fractions is None:
                plan.unreachable.append((name, budget, schedule.lowest(depth), schedule.tower))
                continue
            point = Point(name, budget, schedule.at_depth(depth), fractions)
            try:
                vlmprune.wrap(model, point.recipe(seed=0)).remove()
            except UsageError as error:
                plan.refused[name] = str(error)
                break
            plan.points.append(point)
    return plan
