"""Accuracies of recipes beside the un-pruned model and beside random tokens, in one form whichever command measured them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import vlmprune
from vlmprune.errors import UsageError
from vlmprune.evals import accuracy, sweep_rows
from vlmprune.evals.sweep_plan import CONTROL


@dataclass(frozen=True)
class Estimate:
    """A share of 1 with its 95 % interval, and the number of questions where it is known."""

    value: float
    low: float
    high: float
    n: int | None = None

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} {accuracy.percent((self.low, self.high))}"


@dataclass(frozen=True)
class Against:
    """Accuracy minus that of random tokens at the same layers and counts.

    Attributes:
        value, low, high: the paired difference with its 95 % interval, shares of 1.
        verdict: "beats", "ties" or "loses".
        p: its p-value, corrected for all comparisons of the file; None where the file has none.
    """

    value: float
    low: float
    high: float
    verdict: str
    p: float | None = None

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} {accuracy.percent((self.low, self.high))}"


@dataclass(frozen=True)
class Line:
    """One recipe's accuracy.

    Attributes:
        name: the method; or the recipe, where that is more than one method.
        recipe: what ran.
        mean: accuracy, mean over groups.
        groups: accuracy of every group (skill).
        budget: what was asked for, as a share of the visual tokens.
        places: where tokens are dropped, in words.
        over_random: "mean" and groups -> difference to random tokens; empty where it was not measured.
        lost_interval: of the un-pruned mean minus this one, paired, where the file has it.
        loyalty: share of answers equal to those of the un-pruned model.
        compute: visual tokens that enter a layer, mean over layers, as a share of all.
        kept: visual tokens left after the last stage, as a share of all.
        seconds: time of all questions.
        random: accuracy of random tokens at the same layers and counts.
    """

    name: str
    recipe: str
    mean: Estimate
    groups: dict[str, Estimate]
    budget: float | None = None
    places: str = ""
    over_random: dict[str, Against] = field(default_factory=dict)
    lost_interval: tuple[float, float] | None = None
    loyalty: float | None = None
    compute: float | None = None
    kept: float | None = None
    seconds: float | None = None
    random: Estimate | None = None

    @property
    def is_random(self) -> bool:
        """Whether this is the method that others are compared with."""
        return self.name.partition(",")[0] == CONTROL

    @property
    def label(self) -> str:
        """The method with its budget, for a sentence."""
        return f"`{self.name}`" if self.budget is None else f"`{self.name}` at {100 * self.budget:g} %"


@dataclass(frozen=True)
class Comparison:
    """All lines of one file.

    Attributes:
        file: its name.
        unpruned: the un-pruned model.
        lines: the recipes, those of one method together.
        equal_cost: whether budgets are compute averages, and every method has random tokens at its layers and counts; otherwise
            budgets are shares kept at the last stage, and a later stage costs more at the same share.
        several: whether the folder has other comparisons.
    """

    file: str
    unpruned: Line
    lines: tuple[Line, ...]
    equal_cost: bool
    several: bool = False

    @property
    def methods(self) -> dict[str, list[Line]]:
        """The lines of every method, with the largest budget first."""
        names = dict.fromkeys(line.name for line in self.lines)
        found = {name: [line for line in self.lines if line.name == name] for name in names}
        return {name: sorted(lines, key=lambda line: -(line.budget or 0)) for name, lines in found.items()}

    @property
    def budgets(self) -> list[float]:
        """All budgets, the largest first."""
        return sorted({line.budget for line in self.lines if line.budget is not None}, reverse=True)

    @property
    def groups(self) -> list[str]:
        """Names of the groups."""
        return list(self.unpruned.groups)

    def lost(self, line: Line, group: str = "mean") -> float:
        """What a line loses against the un-pruned model, as a share of 1."""
        before, after = (
            (self.unpruned.mean, line.mean) if group == "mean" else (self.unpruned.groups[group], line.groups[group])
        )
        return before.value - after.value

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def of_sweep(file: str, numbers: Mapping[str, Any]) -> Comparison:
    """The lines of a sweep.

    Args:
        file: its name.
        numbers: what `sweep.json` holds.
    """
    swept = sweep_rows.Sweep.from_dict(numbers)
    controls = {row.point: row for row in swept.controls}

    def line(row: sweep_rows.Row) -> Line:
        point = row.point
        beside = controls.get(point.control()) if point is not None and row.over_random else None
        return Line(
            name=accuracy.UNPRUNED if point is None else point.method,
            recipe=row.recipe,
            mean=Estimate(row.mean, *row.interval),
            groups=_groups(row.by_skill),
            budget=None if point is None else point.budget,
            places="" if point is None else point.places,
            over_random={key: _against(over) for key, over in row.over_random.items()},
            loyalty=row.loyalty,
            compute=row.share,
            kept=1.0 if point is None else point.fractions[-1],
            seconds=row.seconds,
            random=None if beside is None else Estimate(beside.mean, *beside.interval),
        )

    return Comparison(file, line(swept.unpruned), tuple(map(line, swept.methods)), equal_cost=True)


def of_accuracy(file: str, numbers: Mapping[str, Any]) -> Comparison:
    """The lines of an evaluation; the random line of the same layers and counts is looked up among them.

    Args:
        file: its name.
        numbers: what `accuracy.json` holds.
    """
    unpruned, *rows = (_accuracy_line(accuracy.Row.from_dict(row)) for row in numbers["rows"])
    at_random = {_place(line): line.mean for line in rows if line.is_random and line.kept is not None}
    beside = [line if line.is_random else replace(line, random=at_random.get(_place(line))) for line in rows]
    return Comparison(file, unpruned, tuple(beside), equal_cost=False)


def _place(line: Line) -> tuple[str, float | None]:
    """At which layers a line drops tokens, and how many it keeps."""
    return line.places, line.kept


def _accuracy_line(row: accuracy.Row) -> Line:
    name, places, kept = (accuracy.UNPRUNED, "", 1.0) if row.recipe == accuracy.UNPRUNED else _where(row.recipe)
    return Line(
        name=name,
        recipe=row.recipe,
        mean=Estimate(row.mean, *row.interval),
        groups=_groups(row.by_skill),
        budget=None if name == accuracy.UNPRUNED else kept,
        places=places,
        lost_interval=row.lost_interval,
        loyalty=row.loyalty,
        kept=kept,
    )


def _where(text: str) -> tuple[str, str, float | None]:
    """Name, places and last kept share of a recipe; one that is more than a method with shares is named by its own text."""
    try:
        recipe = vlmprune.Recipe.parse(text)
    except UsageError:  # a method of the user's own, which is not defined here
        return text, "", None
    stages = [stage for stage, _ in recipe.stages() if stage.site != "cache"]
    if len(recipe.methods) > 1 or len(stages) != 1 or stages[0].budget.fraction is None:
        return text, "", None
    (stage,) = stages
    return f"{recipe.methods[0].name}, layer {stage.layer}", str(stage.layer), stage.budget.fraction


def _groups(by_skill: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate(found.value, found.low, found.high, found.n) for name, found in by_skill.items()}


def _against(over: sweep_rows.Difference) -> Against:
    return Against(over.value, over.low, over.high, over.verdict, getattr(over, "p_corrected", None))
