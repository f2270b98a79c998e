"""How many questions a comparison needs, so that a loss of a given size is found: planned for the test of `evals/stats.py`.

A recipe and its reference answer the same questions. What decides is not how accurate they are, but how often their scores
differ. With the variance s² of a unit's difference, a loss d is found at level α with power 1 − β by

    n = (z_{1−α/2} √(s² + d²) + z_{1−β} s)² / d² + (s² + d²) / (δ d)        units (pictures)

where δ is the share of questions whose scores differ. (Connor, Biometrics 43, 1987, for pairs of right and wrong answers, where
s² + d² = δ; s² makes it hold for several questions per picture, and the last term corrects for sums that move in whole
answers.) Variance and δ come from a pilot, or from assumptions about m questions per picture:

    δ = 1 − agreement        s² = (δ − d²) · (1 + (m − 1) · correlation) / m

A recipe that loses d differs in at least d of all questions, whatever was assumed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from vlmprune.errors import UsageError
from vlmprune.evals.answers import UNPRUNED, read
from vlmprune.evals.results import Result
from vlmprune.evals.stats import Array, unit_moves
from vlmprune.show.table import code, table

LOSSES = (1.0, 2.0, 5.0)
"""In points of a hundred."""
POWER, ALPHA = 0.9, 0.05
ASSUMED = "assumed"
_WIDTH = 2 * NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Spread:
    """How much the differences between two recipes vary.

    Attributes:
        name: of the assumption, or the recipe in a pilot.
        variance: of a unit's difference.
        differing: share of questions whose scores differ, at most; None where a pilot does not say.
        per_unit: questions per unit.
        source: where it comes from, as a part of a sentence.
    """

    name: str
    variance: float
    differing: float | None
    per_unit: float
    source: str


@dataclass(frozen=True)
class Need:
    """What a loss needs.

    Attributes:
        name, source: as in `Spread`.
        loss: in points of a hundred.
        differing: share of questions whose scores differ, as it was used: at least the loss; None as in `Spread`.
        units, questions: how many.
    """

    name: str
    loss: float
    differing: float | None
    units: int
    questions: int
    source: str


def units_needed(spread: Spread, loss: float, power: float = POWER, alpha: float = ALPHA, comparisons: int = 1) -> Need:
    """Units and questions with which a loss is found.

    Args:
        spread: how much differences vary.
        loss: in points of a hundred.
        power: probability of finding it.
        alpha: level of the test.
        comparisons: how many tests are corrected together; each has the level alpha / comparisons (which is what Holm's
            correction asks of the smallest p-value).

    Raises:
        UsageError: a number outside its range.
    """
    if not 0 < loss < 100:
        raise UsageError(f"a loss is given in points, between 0 and 100, found {loss:g}: 1 is one question of a hundred.")
    for name, value in (("power", power), ("alpha", alpha)):
        if not 0 < value < 1:
            raise UsageError(f"{name} is a probability between 0 and 1, found {value:g}.")
    if power <= alpha:
        raise UsageError(f"the power must be above alpha ({alpha:g}), found {power:g}.")
    if comparisons < 1:
        raise UsageError(f"there is at least one comparison, found {comparisons}.")
    share = loss / 100
    differing, variance = spread.differing, spread.variance
    if differing is not None and differing < share:  # what loses more than it was seen to differ varies more, too
        variance = variance * share / differing if differing else share - share**2
        differing = share
    root = NormalDist().inv_cdf(1 - alpha / comparisons / 2) * math.sqrt(variance + share**2)
    root += NormalDist().inv_cdf(power) * math.sqrt(variance)
    step = (variance + share**2) / differing if differing else 1 / spread.per_unit  # what one answer moves a unit's mean
    units = math.ceil(root**2 / share**2 + step / share)
    return Need(spread.name, loss, differing, units, math.ceil(units * spread.per_unit), spread.source)


# -- where the spread comes from -----------------------------------------------------------------------------------------


def assumed(
    loss: float, accuracy: float | None = None, agreement: float | None = None, per_unit: int = 1, correlation: float = 1.0
) -> Spread:
    """The spread from assumptions.

    Args:
        loss: in points of a hundred.
        accuracy: of the reference, from 0 to 1. Without `agreement`, the recipe is taken to be right independently of it,
            which is as often as two different models differ, and needs the most questions.
        agreement: share of questions that both answer right or both answer wrong. Loyalty is never above it.
        per_unit: questions per picture.
        correlation: how alike the differences at questions about one picture are: 0 is not at all, 1 is that the questions
            about a picture count as one.

    Raises:
        UsageError: neither accuracy nor agreement, or a number outside its range.
    """
    share = loss / 100
    for name, value in (("accuracy", accuracy), ("agreement", agreement), ("correlation", correlation)):
        if value is not None and not 0 <= value <= 1:
            raise UsageError(f"{name} is a share between 0 and 1, found {value:g}.")
    if per_unit < 1:
        raise UsageError(f"a picture has at least one question, found {per_unit}.")
    if agreement is not None:
        if agreement > 1 - share + 1e-9:
            raise UsageError(
                f"with an agreement of {agreement:g} at most {100 * (1 - agreement):g} points can be lost, found a loss of "
                f"{loss:g}: give a lower agreement or a smaller loss."
            )
        differing, name = max(1 - agreement, share), f"agreement {agreement:g}"
    elif accuracy is not None:
        if accuracy < share:
            raise UsageError(f"a reference with accuracy {accuracy:g} cannot lose {loss:g} points: give a smaller loss.")
        worse = accuracy - share
        differing, name = accuracy * (1 - worse) + (1 - accuracy) * worse, f"accuracy {accuracy:g}, right independently"
    else:
        raise UsageError("how often two recipes differ decides: give --pilot, --agreement or at least --accuracy.")
    variance = (differing - share**2) * (1 + (per_unit - 1) * correlation) / per_unit
    return Spread(name, variance, differing, per_unit, ASSUMED)


def from_pilot(path: Path) -> list[Spread]:
    """The spread of every recipe in a result of `vlmprune eval` or `vlmprune sweep`.

    Args:
        path: a folder with `answers.jsonl`, from which every recipe is compared with the un-pruned model, question by question.
            Or the JSON file of a result: `eval` compares with the un-pruned model, `sweep` with random tokens at the same
            layers and counts; the variance is that of the file's paired interval, which has whole pictures as its units.

    Raises:
        UsageError: it cannot be read, or holds no paired comparison.
    """
    found = _of_answers(path) if path.is_dir() else _of_result(path)
    if not found:
        raise UsageError(f"{path} compares no recipe with another: let `vlmprune eval` measure at least one recipe.")
    return found


def measured(name: str, score: Array, reference: Array, unit: Array, group: Array) -> Spread:
    """The spread of two recipes' scores of the same questions; arrays as in `stats.difference`."""
    moves, differing = unit_moves(score, reference, unit, group)
    units = len(moves)
    variance = float((units * moves).var(ddof=1)) if units > 1 else 0.0
    source = f"measured against the un-pruned model on {units} pictures"
    return Spread(name, variance, differing, len(score) / units, source)


def _of_answers(folder: Path) -> list[Spread]:
    answered = read(folder)
    sets: dict[str, list[int]] = {}
    for recipe, number in answered.answers:
        sets.setdefault(recipe, []).append(number)
    found = []
    for recipe, numbers in sets.items():
        if recipe != UNPRUNED:
            own, plain = (answered.scored([(name, number) for number in numbers]) for name in (recipe, UNPRUNED))
            found.append(measured(recipe, own.score, plain.score, own.unit, own.group))
    return found


def _of_result(path: Path) -> list[Spread]:
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"the pilot {path} cannot be read as JSON ({error}).") from error
    rows = numbers.get("rows") if isinstance(numbers, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "by_skill" in row for row in rows):
        raise UsageError(f"{path} holds no comparison: give the JSON file that `vlmprune eval --out` or `sweep --out` wrote.")
    return [spread for row in rows if (spread := _spread(row, numbers)) is not None]


def _spread(row: Mapping[str, Any], numbers: Mapping[str, Any]) -> Spread | None:
    """Of one row; None if it is the reference itself."""
    units = int(numbers["images"]) * int(numbers.get("seeds", 1))
    questions = sum(entry["n"] for entry in row["by_skill"].values())
    if over := row.get("over_random"):
        low, high, against, differing = over["mean"]["low"], over["mean"]["high"], "random tokens", None
        units = over["mean"].get("units") or units  # results of earlier versions do not say
    elif "lost_interval" in row and row["loyalty"] < 1:
        low, high = row["lost_interval"]
        against, differing = "the un-pruned model", 1 - row["loyalty"]
    else:
        return None
    source = f"measured against {against} on {units} pictures"
    return Spread(row["recipe"], units * ((high - low) / _WIDTH) ** 2, differing, questions / units, source)


# -- for people ----------------------------------------------------------------------------------------------------------


def plan(pairs: Iterable[tuple[Spread, float]], power: float, alpha: float, comparisons: int) -> dict[str, Any]:
    """Plain data: the settings, and the need of every spread at its loss."""
    rows = [asdict(units_needed(spread, loss, power, alpha, comparisons)) for spread, loss in pairs]
    return {"power": power, "alpha": alpha, "comparisons": comparisons, "rows": rows}


def result(numbers: Mapping[str, Any]) -> Result:
    """The result of planning.

    Args:
        numbers: from `plan`, with `results.stamp()`.
    """
    measured = any(row["source"] != ASSUMED for row in numbers["rows"])
    cells = [
        [
            code(row["name"]) if measured else row["name"],
            f"{row['loss']:g}",
            "—" if row["differing"] is None else f"{100 * row['differing']:.1f}",
            f"{row['units']:,}",
            f"{row['questions']:,}",
        ]
        for row in numbers["rows"]
    ]
    heads = ["recipe" if measured else "assumption"]
    heads += ["loss, points", "answers that differ, %", "pictures", "questions"]
    return Result(numbers, [table(heads, cells), sentences(numbers)])


def sentences(numbers: Mapping[str, Any]) -> list[str]:
    """What the numbers of questions promise, and what they rest on."""
    many = numbers["comparisons"]
    level = f"p < {numbers['alpha']:g}" + (f", corrected for {many} comparisons" if many > 1 else "")
    sources = dict.fromkeys(row["source"] for row in numbers["rows"])
    return [
        f"With so many pictures a recipe that really loses as much is found with a probability of {100 * numbers['power']:g} % "
        f"({level}, paired sign-flip test over pictures).",
        f"How much the scores of the two differ is {'; '.join(sources)}. A recipe that differs more needs more questions.",
    ]
