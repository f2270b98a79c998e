"""Accuracies of recipes beside the un-pruned model and beside random tokens, in one form whichever command measured them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isnan, nan
from typing import Any

import vlmprune
from vlmprune.errors import UsageError
from vlmprune.evals import accuracy, sweep_rows
from vlmprune.evals.report_parts import percent_of
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
        lost_p: of that difference, corrected for all recipes of the file, where the file has it.
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
    lost_p: float | None = None
    loyalty: float | None = None
    compute: float | None = None
    kept: float | None = None
    seconds: float | None = None
    random: Estimate | None = None

    @property
    def is_random(self) -> bool:
        """Whether this is the method that others are compared with."""
        return self.name.partition(",")[0].partition(":")[0] == CONTROL

    @property
    def label(self) -> str:
        """The method with its budget, for a sentence."""
        return f"`{self.name}`" if self.budget is None else f"`{self.name}` at {percent_of(self.budget)}"


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
        group_word: what a group is called: "skill" for scenes.
    """

    file: str
    unpruned: Line
    lines: tuple[Line, ...]
    equal_cost: bool
    several: bool = False
    group_word: str = "skill"

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
            mean=Estimate(float(row.mean), *row.interval),
            groups={name: Estimate(own.value, own.low, own.high, own.n) for name, own in row.by_skill.items()},
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
    """The lines of an evaluation; random tokens at the same layers and counts are looked up among them.

    Args:
        file: its name.
        numbers: what `accuracy.json` holds.
    """
    plain, *rows = numbers["rows"]
    whole, places = plain.get("kept"), [_where(row["recipe"]) for row in rows]
    lines = [_accuracy_line(row, place, whole) for row, place in zip(rows, places, strict=True)]
    at_random = {place.stages: line.mean for place, line in zip(places, lines, strict=True) if line.is_random}
    beside = [
        line if line.is_random or not place.stages else replace(line, random=at_random.get(place.stages))
        for place, line in zip(places, lines, strict=True)
    ]
    return Comparison(
        file,
        _accuracy_line(plain, Where(accuracy.UNPRUNED), whole),
        tuple(beside),
        equal_cost=False,
        group_word="skill" if numbers.get("data", "scenes") == "scenes" else "group",
    )


@dataclass(frozen=True)
class Where:
    """Where a recipe drops tokens.

    Attributes:
        name: the method with its layers; or the recipe, where it is no single method.
        places: the layers, in words.
        stages: layer and budget of every stage; empty where the recipe is no single method.
        fraction: budget of the last stage, where that is a share.
    """

    name: str
    places: str = ""
    stages: tuple[tuple[int, str], ...] = ()
    fraction: float | None = None


def _where(text: str) -> Where:
    try:
        recipe = vlmprune.Recipe.parse(text)
    except UsageError:  # a method of the user's own, which is not defined here
        return Where(text)
    stages = [stage for stage, _ in recipe.stages() if stage.site != "cache"]
    if len(recipe.methods) > 1 or not stages:
        return Where(text)
    layers = ", ".join(str(stage.layer) for stage in stages)
    name = f"{recipe.methods[0].name}, layer{'s' if len(stages) > 1 else ''} {layers}"
    budgets = tuple((stage.layer, str(stage.budget)) for stage in stages)
    return Where(name, layers, budgets, stages[-1].budget.fraction)


def _accuracy_line(row: Mapping[str, Any], where: Where, whole: float | None) -> Line:
    """A line from a row; `whole` is the number of visual tokens of the un-pruned model, where the file has it."""
    plain, kept = row["recipe"] == accuracy.UNPRUNED, where.fraction
    if plain:
        kept = 1.0
    elif kept is None and where.stages and row.get("kept") is not None and whole:
        kept = row["kept"] / whole
    low, high = row["lost_interval"]
    return Line(
        name=row["recipe"] if kept is None else where.name,
        recipe=row["recipe"],
        mean=Estimate(float(row["mean"]), *row["interval"]),
        groups={name: _group(own) for name, own in row["by_skill"].items()},
        budget=None if plain else kept,
        places=where.places,
        lost_interval=(low, high),
        lost_p=row.get("p"),
        loyalty=row["loyalty"],
        compute=row.get("share"),
        kept=kept,
        seconds=row.get("seconds"),
    )


def _group(found: Mapping[str, Any]) -> Estimate:
    return Estimate(found["value"], found["low"], found["high"], found["n"])


def _against(over: sweep_rows.Difference) -> Against:
    p = getattr(over, "corrected", nan)
    return Against(over.value, over.low, over.high, over.verdict, None if isnan(p) else p)
