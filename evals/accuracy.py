"""Accuracy of recipes on the embedded VLM, per skill, beside the un-pruned model and beside random: no network needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import vlmprune
from vlmprune.evals.answers import UNPRUNED as UNPRUNED
from vlmprune.evals.results import Result
from vlmprune.show.stats import interval, mean_of_present, shares
from vlmprune.show.table import code, table
from vlmprune.tiny.answers import Accuracy, Record, accuracy_by_skill, mean_over_skills
from vlmprune.tiny.evaluate import records
from vlmprune.tiny.questions import SKILLS
from vlmprune.tiny.scenes import held_out

FRACTIONS = (0.5, 0.25, 0.1, 0.05)
CHOSEN = ("random:layer=0", "cls:layer=0", "divprune:layer=0", "fastv:layer=2")
DEFAULT = tuple(f"{method},fraction={fraction:g}" for method in CHOSEN for fraction in FRACTIONS)


@dataclass(frozen=True)
class Row:
    """One recipe's result.

    Attributes:
        recipe: the recipe, or "un-pruned".
        by_skill: accuracy of every skill with its interval.
        mean: unweighted mean over skills, with `interval` (95 %, images resampled).
        lost: the un-pruned model's mean on the same questions minus this one, with `lost_interval` (paired).
        loyalty: share of answers equal to those of the un-pruned model.
    """

    recipe: str
    by_skill: dict[str, Accuracy]
    mean: float
    interval: tuple[float, float]
    lost: float
    lost_interval: tuple[float, float]
    loyalty: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Row:
        """A row from its plain data."""
        by_skill = {skill: Accuracy(**entry) for skill, entry in data["by_skill"].items()}
        pairs = {key: (data[key][0], data[key][1]) for key in ("interval", "lost_interval")}
        return Row(**{**data, "by_skill": by_skill, **pairs})


def evaluate(
    model: Any,
    processor: Any,
    recipes: Sequence[str] = DEFAULT,
    images: int = 150,
    split: str = "test",
    tick: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Ask every question of `images` held-out scenes under every recipe; the first row is the un-pruned model.

    Raises:
        vlmprune.UsageError: a recipe cannot be read or applied; before anything is computed.
    """
    parsed = [vlmprune.Recipe.parse(recipe) for recipe in recipes]
    for recipe in parsed:
        vlmprune.wrap(model, recipe).remove()  # all are checked before the first is run
    plan = [None, *parsed]
    answers: list[list[Record]] = []
    for one in plan:
        with vlmprune.wrap(model, one) if one else nullcontext():
            answers.append(records(model, processor, held_out(images, split)))
        tick()
    names = [UNPRUNED, *recipes]
    return [_row(name, given, answers[0]) for name, given in zip(names, answers, strict=True)]


def _row(name: str, given: list[Record], reference: list[Record]) -> Row:
    by_skill = accuracy_by_skill(given)
    draws, lost = mean_of_present(draws_by_skill(given)), mean_of_present(draws_by_skill(reference))
    mean = mean_over_skills(by_skill)
    return Row(
        recipe=name,
        by_skill=by_skill,
        mean=mean,
        interval=interval(draws),
        lost=mean_over_skills(accuracy_by_skill(reference)) - mean,
        lost_interval=interval(lost - draws),
        loyalty=loyalty(given, reference),
    )


def loyalty(given: Sequence[Record], reference: Sequence[Record]) -> float:
    """Share of equal answers to the same questions."""
    return sum(a.given == b.given for a, b in zip(given, reference, strict=True)) / len(given)


def draws_by_skill(given: Sequence[Record]) -> np.ndarray:
    """Accuracy `[draw, skill]` in draws of whole images, NaN where a draw lacks the skill; skills in the order of `SKILLS`.

    The draws are the same for all records of the same images, so that differences are paired.
    """
    images = sorted({record.image for record in given})
    skills = [skill for skill in SKILLS if any(record.skill == skill for record in given)]
    right, asked = np.zeros((len(images), len(skills))), np.zeros((len(images), len(skills)))
    line, column = {image: n for n, image in enumerate(images)}, {skill: n for n, skill in enumerate(skills)}
    for record in given:
        cell = line[record.image], column[record.skill]
        asked[cell] += 1
        right[cell] += record.right
    return shares(right, asked)


def result(numbers: Mapping[str, Any]) -> Result:
    """The result of an evaluation.

    Args:
        numbers: `rows` as `Row.to_dict()` gives them, with `images`, `split`, and with `results.stamp()`.
    """
    rows = [Row.from_dict(row) for row in numbers["rows"]]
    skills = list(rows[0].by_skill)
    cells, brief = [], []
    for row in rows:
        plain = row.recipe == UNPRUNED
        name = row.recipe if plain else code(row.recipe)
        lost = "—" if plain else f"{100 * row.lost:.1f} {percent(row.lost_interval)}"
        ends = [f"{100 * row.mean:.1f} {percent(row.interval)}", lost, f"{100 * row.loyalty:.1f}"]
        cells.append([name, *(f"{100 * row.by_skill[skill].value:.1f}" for skill in skills), *ends])
        brief.append([name, *ends])
    counts = ", ".join(f"{skill} {entry.n}" for skill, entry in rows[0].by_skill.items())
    title = f"accuracy in %, {numbers['images']} held-out scenes ({numbers['split']})"
    ends = ["mean", "lost against un-pruned", "same answer"]
    whole = table(["recipe", *skills, *ends], cells, title=title)
    small = table(["recipe", *ends], brief, title=title)
    return Result(numbers, [(whole, small), f"Questions per skill: {counts}."], draw=partial(plot, rows))


def percent(low_high: tuple[float, float]) -> str:
    """An interval in percent."""
    return f"[{100 * low_high[0]:.1f}, {100 * low_high[1]:.1f}]"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Mean accuracy against the share of tokens kept, one line per method (single-stage fraction recipes only)."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    lines: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        if row.recipe == UNPRUNED:
            axes.axhspan(100 * row.interval[0], 100 * row.interval[1], color="0.9")
            axes.axhline(100 * row.mean, color="0.4", linewidth=1, label=UNPRUNED)
            continue
        recipe = vlmprune.Recipe.parse(row.recipe)
        if len(recipe.methods) > 1 or len(recipe.stages()) != 1:
            continue
        ((stage, method),) = recipe.stages()
        if stage.budget.fraction is not None:
            lines.setdefault(f"{method.name}, layer {stage.layer}", []).append((stage.budget.fraction, row))
    for name, points in lines.items():
        points.sort(key=lambda point: point[0])
        x, y = [100 * fraction for fraction, _ in points], [100 * row.mean for _, row in points]
        below = [100 * (row.mean - row.interval[0]) for _, row in points]
        above = [100 * (row.interval[1] - row.mean) for _, row in points]
        axes.errorbar(x, y, yerr=[below, above], marker="o", markersize=4, capsize=2, linewidth=1.5, label=name)
    axes.set(xscale="log", xlabel="visual tokens kept (%)", ylabel="accuracy, mean over skills (%)")
    ticks = sorted({100 * fraction for points in lines.values() for fraction, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
