"""Accuracy of recipes on any questions, by group, beside the un-pruned model; on the embedded VLM no network is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import vlmprune
from vlmprune.evals.answering import answer, recipe_name
from vlmprune.evals.answers import UNPRUNED as UNPRUNED
from vlmprune.evals.answers import Answered
from vlmprune.evals.asking import Asking
from vlmprune.evals.questions import CLIPS, SCENES, open_questions
from vlmprune.evals.results import Result
from vlmprune.evals.shards import ALONE, USUAL_WAIT, Shard
from vlmprune.evals.stats import LEVEL, Difference, Estimate, correct, differences_of_many, estimate, estimate_by_group
from vlmprune.evals.store import Store
from vlmprune.show.table import code, table

FRACTIONS = (0.5, 0.25, 0.1, 0.05)
CHOSEN = ("random:layer=0", "cls:layer=0", "divprune:layer=0", "fastv:layer=2")
DEFAULT = tuple(f"{method},fraction={fraction:g}" for method in CHOSEN for fraction in FRACTIONS)
SCENES_AT_ONCE = 80
"""Questions about scenes in a batch; each picture is encoded once per batch."""
WIDE = 10
"""Groups beyond which they have a table of their own."""


@dataclass(frozen=True)
class Row:
    """One recipe's result. What results of earlier versions lack is None.

    Attributes:
        recipe: the recipe, or "un-pruned".
        by_skill: score of every skill (group of questions) with its interval.
        mean: unweighted mean over groups, with `interval` (95 %, pictures resampled).
        lost: the un-pruned model's mean on the same questions minus this one, with `lost_interval` (paired).
        loyalty: share of answers equal to those of the un-pruned model.
        overall: mean over questions, whatever their groups.
        p: of the loss, by the sign-flip test over pictures, corrected for all recipes of the table (Holm).
        share: measured compute average: visual tokens that enter a decoder layer, mean over layers, as a share of all.
        kept: visual tokens of a question that leave the last decoder layer, mean over questions.
        seconds: time of all batches.
    """

    recipe: str
    by_skill: dict[str, Estimate]
    mean: float
    interval: tuple[float, float]
    lost: float
    lost_interval: tuple[float, float]
    loyalty: float
    overall: float | None = None
    p: float | None = None
    share: float | None = None
    kept: float | None = None
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Row:
        """A row from its plain data."""
        by_skill = {skill: estimate_from_dict(entry) for skill, entry in data["by_skill"].items()}
        pairs = {key: (data[key][0], data[key][1]) for key in ("interval", "lost_interval")}
        return Row(**{**data, "by_skill": by_skill, **pairs})


def estimate_from_dict(data: Mapping[str, Any]) -> Estimate:
    """A group's score from its plain data; files from before there were several kinds of intervals do not name theirs."""
    return Estimate(**{"units": 0, "source": "bootstrap", **data})


def evaluate(
    model: Any,
    processor: Any,
    recipes: Sequence[str | vlmprune.Recipe] = DEFAULT,
    images: int = 150,
    split: str = "test",
    tick: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> list[Row]:
    """`measure` on held-out scenes of the embedded model's world."""
    questions = open_questions(SCENES, images, split=split)
    rows = measure(model, Asking(processor, questions, SCENES_AT_ONCE, encode_once=True), recipes, tick=tick)
    assert rows is not None  # this process is alone
    return rows


def measure(
    model: Any,
    asking: Asking,
    recipes: Sequence[str | vlmprune.Recipe] | Mapping[str, vlmprune.Recipe],
    store: Store | None = None,
    shard: Shard = ALONE,
    minutes: float = USUAL_WAIT,
    tick: Callable[[str, int, int], None] = lambda step, done, total: None,
    keep: Callable[[Answered], object] = lambda answered: None,
) -> list[Row] | None:
    """Ask every question under every recipe; the first row is the un-pruned model.

    Args:
        model: un-wrapped.
        asking: the questions.
        recipes: strings or recipes; or recipes by the names of their rows.
        store, shard, minutes, tick: as in `answering.answer`. Without a store, answers are kept in memory.
        keep: called with all answers.

    Returns:
        The rows; None for another rank than 0.

    Raises:
        vlmprune.UsageError: a recipe cannot be read or applied; before anything is computed.
    """
    named = recipes if isinstance(recipes, Mapping) else {str(recipe): vlmprune.Recipe.of(recipe) for recipe in recipes}
    for recipe in named.values():
        vlmprune.wrap(model, recipe).remove()  # all are checked before the first is run
    plan = list({recipe_name(recipe): (0, recipe) for recipe in (None, *named.values())}.values())
    answered = answer(model, [asking], plan, Store(None, {}) if store is None else store, shard, minutes, tick)
    if answered is None:
        return None
    keep(answered)
    return rows_of(answered, {UNPRUNED: UNPRUNED, **{name: recipe_name(recipe) for name, recipe in named.items()}})


def rows_of(answered: Answered, names: Mapping[str, str]) -> list[Row]:
    """The rows of a table, from all answers.

    Args:
        names: what each row is called -> the recipe's string; the un-pruned model first.
    """
    scored = {name: answered.scored([(recipe, 0)]) for name, recipe in names.items()}
    plain = scored[UNPRUNED]
    pairs = {name: (own.score, plain.score) for name, own in scored.items() if name != UNPRUNED}
    found = differences_of_many(pairs, plain.unit, plain.group)
    lost: dict[str, Difference] = correct({name: mean for name, (mean, _) in found.items()})
    rows = []
    for name, own in scored.items():
        mean, less = estimate(own.score, own.unit, own.group), lost.get(name)
        rows.append(
            Row(
                recipe=name,
                by_skill=estimate_by_group(own.score, own.unit, own.group),
                mean=mean.value,
                interval=(mean.low, mean.high),
                lost=0.0 if less is None else 0.0 - less.value,  # never −0.0
                lost_interval=(0.0, 0.0) if less is None else (0.0 - less.high, 0.0 - less.low),
                loyalty=float(own.loyal.mean()),
                overall=float(own.score.mean()),
                p=None if less is None else less.corrected,
                share=own.share,
                kept=float(np.mean(answered.answers[names[name], 0].kept)),
                seconds=own.seconds,
            )
        )
    return rows


# -- for people --------------------------------------------------------------------------------------------------------------


def result(numbers: Mapping[str, Any]) -> Result:
    """The result of an evaluation.

    Args:
        numbers: `rows` as `Row.to_dict()` gives them, with `images`, `split`, and with `results.stamp()`; of other questions
            than scenes, also `data`, `questions`, `pictures` and `scorers`.
    """
    rows = [Row.from_dict(row) for row in numbers["rows"]]
    groups = list(rows[0].by_skill)
    shown = groups if 1 < len(groups) <= WIDE else []
    scenes = numbers.get("data", SCENES) == SCENES
    counted = rows[0].share is not None
    heads = ["mean" if len(groups) > 1 or scenes else "score", "lost against un-pruned", "same answer"]
    over_questions = len(groups) > 1 and not scenes
    cells, brief = [], []
    for row in rows:
        plain = row.recipe == UNPRUNED
        name = row.recipe if plain else code(row.recipe)
        lost = "—" if plain else f"{100 * row.lost:.1f} {percent(row.lost_interval)}"
        ends = [f"{100 * row.mean:.1f} {percent(row.interval)}", lost, f"{100 * row.loyalty:.1f}"]
        whole = [f"{100 * (row.overall or 0):.1f}"] if over_questions else []
        tokens = [f"{100 * (row.share or 0):.1f}"] if counted else []
        cells.append([name, *(f"{100 * row.by_skill[group].value:.1f}" for group in shown), *whole, *ends, *tokens])
        brief.append([name, *ends])
    title = _title(numbers, scenes)
    columns = ["recipe", *shown, *(["all questions"] if over_questions else []), *heads, *(["tokens, %"] if counted else [])]
    parts: list[Any] = [(table(columns, cells, title=title), table(["recipe", *heads], brief, title=title))]
    if len(groups) > WIDE:
        each = [[group, *(f"{100 * row.by_skill[group].value:.1f}" for row in rows)] for group in groups]
        parts.append(table(["group", *(row.recipe for row in rows)], each))
    parts += [_asked(numbers, rows[0]), _said(rows, counted)]
    return Result(numbers, parts, draw=partial(plot, rows))


def _title(numbers: Mapping[str, Any], scenes: bool) -> str:
    if scenes:
        return f"accuracy in %, {numbers['images']} held-out scenes ({numbers['split']})"
    split = f", {numbers['split']}" if numbers.get("split") else ""
    about = f"{numbers['questions']} questions, {numbers['pictures']} {'clips' if numbers['data'] == CLIPS else 'pictures'}"
    return f"score in %, {Path(numbers['data']).name}{split}: {about}, by {', '.join(numbers['scorers'])}"


def _asked(numbers: Mapping[str, Any], plain: Row) -> str:
    """How many questions there were, in how many groups and about how many pictures, and how they were scored."""
    counts = ", ".join(f"{group} {entry.n}" for group, entry in plain.by_skill.items())
    if "scorers" not in numbers:
        return f"Questions per skill: {counts}."
    groups = f" Questions per {'skill' if numbers['data'] == SCENES else 'group'}: {counts}." if len(plain.by_skill) > 1 else ""
    return (
        f"Scored by {', '.join(numbers['scorers'])}: {numbers['questions']:,} questions about "
        f"{numbers['pictures']:,} {'clips' if numbers['data'] == CLIPS else 'pictures'}.{groups}"
    )


def _said(rows: Sequence[Row], counted: bool) -> list[str]:
    """What the columns mean, and which losses could not be seen."""
    if not counted:
        return []
    said = ["tokens: visual tokens that enter a decoder layer, mean over layers, as a share of all."]
    unseen = [f"`{row.recipe}`" for row in rows if row.p is not None and row.p >= LEVEL]
    if unseen:
        said.append(
            "No difference from un-pruned could be seen (sign-flip test over pictures, corrected for all recipes by Holm's "
            f"method): {', '.join(unseen)}."
        )
    return said


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
        try:
            recipe = vlmprune.Recipe.parse(row.recipe)
        except vlmprune.UsageError:  # a name that was given to it, or a method that is not defined here
            continue
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
    axes.set(xscale="log", xlabel="visual tokens kept (%)", ylabel="accuracy, mean over groups (%)")
    ticks = sorted({100 * fraction for points in lines.values() for fraction, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
