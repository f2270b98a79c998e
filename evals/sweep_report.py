"""A sweep for people: sentences, tables and a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from vlmprune.evals.accuracy import UNPRUNED, percent
from vlmprune.evals.questions import SCENES
from vlmprune.evals.results import Result
from vlmprune.evals.sweep_plan import CONTROL, Plan
from vlmprune.evals.sweep_rows import IntervalOnly, Row, Sweep
from vlmprune.show.table import code, table


def summary(result: Sweep) -> list[str]:
    """What the numbers say, as plain sentences."""
    compared = [row for row in result.methods if row.over_random]
    verdicts = [row.over_random["mean"].verdict for row in compared]
    count = {verdict: verdicts.count(verdict) for verdict in ("beats", "ties", "loses")}
    said = [
        f"Of {len(compared)} points (a method at a budget), {count['beats']} beat random at the same layers and counts on the "
        f"mean over skills, {count['ties']} tie and {count['loses']} lose. {_reading(compared)}"
    ]
    for method, rows in _by_method(compared):
        if missed := _misses(rows, "mean", numbers=True):
            said.append(f"On the mean, `{method}` does not beat random: {missed}.")
    for method, rows in _by_method(compared):
        skills = {skill: _misses(rows, skill) for skill in result.unpruned.by_skill}
        if any(skills.values()):
            listed = "; ".join(f"{skill} {missed}" for skill, missed in skills.items() if missed)
            said.append(f"On single skills, `{method}` does not beat random: {listed}.")
    return said + _drifts(result) + _left_out(result.plan)


def _reading(compared: Sequence[Row]) -> str:
    """How far the verdicts can be trusted."""
    interval = "Each 95 % interval is for one point alone: about one in twenty misses by chance."
    if not compared or isinstance(compared[0].over_random["mean"], IntervalOnly):
        return interval
    return (
        f"{interval} Verdicts are corrected for that (Holm): the chance that any of those on the mean is false is at most 5 %, "
        "and the same holds for those on single skills."
    )


def _by_method(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    names = dict.fromkeys(row.point.method for row in rows if row.point)
    return [(name, [row for row in rows if row.point and row.point.method == name]) for name in names]


def _misses(rows: Sequence[Row], key: str, numbers: bool = False) -> str:
    """At which budgets a method does not beat random on a skill or the mean; empty if it always does."""
    found = []
    for verdict in ("ties", "loses"):
        points = [(row.point, row.over_random[key]) for row in rows if row.point and row.over_random[key].verdict == verdict]
        if points:
            at = _listed(f"{100 * point.budget:g} %{f' ({over})' if numbers else ''}" for point, over in points)
            found.append(f"{verdict} at {at}")
    return ", ".join(found)


def _left_out(plan: Plan) -> list[str]:
    said = []
    for method, group in groupby(plan.unreachable, key=lambda entry: entry[0]):
        points = list(group)
        at, (low, high) = _listed(f"{100 * budget:g} %" for _, budget, *_ in points), points[0][2:]
        said.append(f"Not reachable: `{method}` at {at}; its stages cost between {100 * low:.3g} % and {100 * high:.3g} %.")
    return said + [f"Not run: {reason}" for reason in plan.refused.values()]


def _drifts(result: Sweep) -> list[str]:
    """Points whose measured cost is not what was asked for."""
    off = [row for row in result.methods if row.point and abs(row.share - row.point.budget) > 0.01]
    return [
        f"`{row.point.method}` at {100 * row.point.budget:g} % really costs {100 * row.share:.1f} %."
        for row in off
        if row.point
    ]


def _listed(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


MARKS = {"beats": "▲", "ties": "=", "loses": "▼"}
LEGEND = (
    "Accuracy in %, mean over skills, with 95 % intervals by picture; below it the paired difference to random tokens at the "
    "same layers and counts (▲ beats, = ties, ▼ loses). Budgets are compute averages: visual tokens entering a decoder layer, "
    "mean over layers."
)


def result(numbers: Mapping[str, Any]) -> Result:
    """The result of a sweep.

    Args:
        numbers: `Sweep.to_dict()`, with `images`, `seeds` and `split`, and with `results.stamp()`.
    """
    swept = Sweep.from_dict(numbers)
    budgets = sorted({point.budget for point in swept.plan.points}, reverse=True)
    heads = [f"{100 * budget:g} %" for budget in budgets]
    whole, said = swept.unpruned, summary(swept)
    skills = list(whole.by_skill)
    means = [_mean_cells(*entry, budgets) for entry in _by_method(swept.methods)]
    controls = [_control_cells(row) for row in swept.controls]
    parts: list[Any] = [
        f"Un-pruned: {100 * whole.mean:.1f} {percent(whole.interval)}. {LEGEND}",
        table(["method", "layers", *heads], means, text_columns=2),
        "Random tokens at the schedules of the other methods:",
        table(["layers", "kept", "mean"], controls, text_columns=2),
    ]
    for budget, head in zip(budgets, heads, strict=True):
        rows = [whole, *(row for row in swept.methods if row.point and row.point.budget == budget)]
        parts += [f"Per skill at {head}:", table(["method", *skills], [_skill_cells(row, skills) for row in rows])]
    parts += [f"Questions per skill: {', '.join(f'{skill} {entry.n}' for skill, entry in whole.by_skill.items())}.", said]
    parts += [list(numbers.get("notes", ()))]
    return Result({**numbers, "summary": said}, parts, [_screen(swept, numbers), said], partial(plot, swept))


def _screen(swept: Sweep, numbers: Mapping[str, Any]) -> Table:
    """The mean over skills at every point: what fits into a terminal."""
    if numbers.get("data", SCENES) == SCENES:
        what = f"{numbers['seeds']} × {numbers['images']} held-out scenes ({numbers['split']})"
    else:
        what = f"{numbers['questions']} questions of {numbers['data']}, {numbers['seeds']} seeds, {numbers['model']}"
    title = f"accuracy in %, {what}"
    columns = ["method", "budget", "accuracy", "over random", "verdict"]
    return table(columns, [_cells(row) for row in swept.methods], title=title)


def _mean_cells(method: str, rows: Sequence[Row], budgets: Sequence[float]) -> list[str | Text]:
    at = {row.point.budget: row for row in rows if row.point}
    point = rows[0].point
    assert point is not None
    return [code(method), point.places, *(_mean_cell(at.get(budget)) for budget in budgets)]


def _mean_cell(row: Row | None) -> str:
    if row is None:
        return "not reachable"
    mean = f"{100 * row.mean:.1f} {percent(row.interval)}"
    over = row.over_random.get("mean")
    return f"{mean}\n{over} {MARKS[over.verdict]}" if over else mean


def _control_cells(row: Row) -> list[str]:
    assert row.point is not None
    kept = ", ".join(f"{100 * fraction:.1f} %" for fraction in row.point.fractions)
    return [row.point.places, kept, f"{100 * row.mean:.1f} {percent(row.interval)}"]


def _cells(row: Row) -> list[str]:
    assert row.point is not None
    head = [row.point.method, f"{100 * row.point.budget:g} %", f"{100 * row.mean:.1f} {percent(row.interval)}"]
    over = row.over_random.get("mean")
    return [*head, str(over), over.verdict] if over else [*head, "", ""]


def _skill_cells(row: Row, skills: Sequence[str]) -> list[str | Text]:
    marks = {skill: f" {MARKS[row.over_random[skill].verdict]}" if row.over_random else "" for skill in skills}
    name = code(row.point.method) if row.point else UNPRUNED
    return [name, *(f"{100 * row.by_skill[skill].value:.1f}{marks[skill]}" for skill in skills)]


def plot(result: Sweep, path: Path) -> None:
    """Accuracy against budget: one panel per method, random at its schedule in grey, the un-pruned model dashed."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    panels = [(name, rows) for name, rows in _by_method(result.methods) if name != CONTROL] or _by_method(result.methods)
    controls = {row.point: row for row in result.controls}
    columns = min(5, len(panels))
    lines = -(-len(panels) // columns)
    size = (2.3 * columns + 0.6, 1.9 * lines + 0.6)
    figure, grid = pyplot.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for number, (axes, (name, rows)) in enumerate(zip(grid.flat, panels, strict=False)):
        axes.tick_params(labelbottom=number + columns >= len(panels))
        axes.axhline(100 * result.unpruned.mean, color="0.3", linewidth=1, linestyle="--")
        random = [controls[row.point.control()] for row in rows if row.point]
        _draw_line(axes, rows, random, color="0.6")
        _draw_line(axes, rows, rows, color="C0")
        axes.set_title(name, fontsize=9)
        axes.set_xscale("log")
        axes.grid(alpha=0.25, linewidth=0.5)
    ticks = sorted({100 * point.budget for point in result.plan.points})
    grid[0, 0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    grid[0, 0].minorticks_off()
    figure.supxlabel("visual tokens, compute average (%)", fontsize=9)
    figure.supylabel("accuracy, mean over skills (%)", fontsize=9)
    handles = [Line2D([], [], color="C0"), Line2D([], [], color="0.6"), Line2D([], [], color="0.3", linestyle="--")]
    labels = ["method", "random at the same layers and counts", UNPRUNED]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_line(axes: Any, rows: Sequence[Row], shown: Sequence[Row], color: str) -> None:
    """`shown` at the budgets of `rows`, with intervals."""
    x = [100 * row.point.budget for row in rows if row.point]
    y = [100 * row.mean for row in shown]
    below = [100 * (row.mean - row.interval[0]) for row in shown]
    above = [100 * (row.interval[1] - row.mean) for row in shown]
    axes.errorbar(x, y, yerr=[below, above], color=color, marker="o", markersize=3, capsize=2, linewidth=1.3)
