"""Figures of a comparison: accuracy over compute, tokens and time, and a panel for each method with random beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune.evals import report_svg
from vlmprune.evals.report_lines import Comparison, Estimate, Line
from vlmprune.evals.report_losses import best_names, verdict_of, worst_names
from vlmprune.evals.report_parts import Figure, Figures, percent_of, shares
from vlmprune.evals.report_svg import BAD, QUIET, SERIES, UNITS

WIDE, NARROW = (390, 330), (250, 170)
"""Sizes of an overview and of a panel, in pixels."""
APART, LETTER = 13, 6.4
"""Least distance of two labels, and width of a letter, in pixels."""


@dataclass(frozen=True)
class Axis:
    """What accuracy is drawn over: the quantity of a line and of the whole, as `of(line, comparison)` in percent or None."""

    name: str
    title: str
    label: str
    of: Callable[[Line, Comparison], float | None]
    logarithmic: bool = True


def _share(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _time(line: Line, found: Comparison) -> float | None:
    whole = found.unpruned.seconds
    return None if line.seconds is None or not whole else 100 * line.seconds / whole


AXES = (
    Axis(
        "compute", "Over compute", "visual tokens entering a layer, mean over layers (%)", lambda line, _: _share(line.compute)
    ),
    Axis("tokens", "Over tokens", "visual tokens left after the last stage (%)", lambda line, _: _share(line.kept)),
    Axis("time", "Over time", "time of all questions, un-pruned = 100 %", _time, logarithmic=False),
)


def overviews(found: Comparison) -> Figures | None:
    """Accuracy over compute, tokens and time, for each of them on which some method has two points; None if there is none."""
    figures = []
    for axis in AXES:
        lines = [line for line in found.lines if axis.of(line, found) is not None and line.budget is not None]
        if any(len({axis.of(line, found) for line in lines if line.name == name}) > 1 for name in found.methods):
            figures.append(_overview(found, axis, lines))
    shown = {"unpruned"} | {
        _look(name, own[0], best_names(found), worst_names(found))[0] for name, own in found.methods.items()
    }
    return Figures(tuple(figures), tuple((key, text) for key, text in _LEGEND if key in shown)) if figures else None


_LEGEND = (
    ("best", "highest mean at some budget, with 95 % band"),
    ("bad", "loses to random at some budget"),
    ("random", "random tokens, with 95 % band"),
    ("other", "other methods"),
    ("unpruned", "un-pruned"),
)


def _overview(found: Comparison, axis: Axis, lines: Sequence[Line]) -> Figure:
    from matplotlib.figure import Figure as Drawing

    name = f"{found.file.partition('.')[0]}-{axis.name}"
    best = [name for name in best_names(found) if any(line.name == name for line in lines)]
    worst = [name for name in worst_names(found) if any(line.name == name for line in lines)]
    with report_svg.style(name):
        figure = Drawing(figsize=(WIDE[0] / UNITS, WIDE[1] / UNITS), dpi=UNITS)
        names = _short([name for name in found.methods if any(line.name == name for line in lines)])
        margin = 22 + LETTER * max(map(len, ["un-pruned", *names.values()]))
        axes = figure.add_axes((0.125, 0.14, 0.875 - margin / WIDE[0], 0.835))
        _unpruned(axes, found)
        labels: list[tuple[float, float, str, str]] = []
        for method, own in found.methods.items():
            points = [(x, line) for line in own if line in lines and (x := axis.of(line, found)) is not None]
            if not points:
                continue
            points.sort(key=lambda point: point[0])
            key, colour, dashes, width = _look(method, points[0][1], best, worst)
            at, means = [x for x, _ in points], [line.mean for _, line in points]
            named = key != "other"
            if not named and not axis.logarithmic:  # measured values in no order: lines would only cross
                axes.plot(at, [100 * mean.value for mean in means], ".", color=colour, markersize=3)
            else:
                _draw(axes, at, means, colour, dashes, width, band=named)
            if named:
                labels.append((at[-1], 100 * means[-1].value, names[method], colour))
        _scale(axes, axis, sorted({round(x, 6) for line in lines if (x := axis.of(line, found)) is not None}), found)
        axes.set_ylabel(f"accuracy, mean over {found.group_word}s (%)" if len(found.groups) > 1 else "accuracy (%)")
        labels.append((axes.get_xlim()[1], 100 * found.unpruned.mean.value, "un-pruned", "#000000"))
        _label(axes, labels)
        svg = report_svg.from_figure(figure, _says(found, axis, best, worst))
    return Figure(axis.title, svg, _says(found, axis, best, worst))


def _short(names: Sequence[str]) -> dict[str, str]:
    """Names of methods without their layers, where that leaves them different."""
    heads = [name.partition(",")[0] for name in names]
    return {name: head if heads.count(head) == 1 else name for name, head in zip(names, heads, strict=True)}


def _look(method: str, line: Line, best: Sequence[str], worst: Sequence[str]) -> tuple[str, str, str, float]:
    """What a method's line is in the legend, its colour, dashes and width."""
    if line.is_random:
        return "random", QUIET, "--", 1.8
    if method in best:
        return "best", SERIES[best.index(method)], "-", 2.0
    return ("bad", BAD, "-.", 1.8) if method in worst else ("other", QUIET, "-", 0.7)


def _draw(axes: Any, x: Sequence[float], means: Sequence[Estimate], colour: str, dashes: str, width: float, band: bool) -> None:
    if band:
        low, high = [100 * mean.low for mean in means], [100 * mean.high for mean in means]
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    marker = {"marker": "o", "markersize": 4} if band else {}
    axes.plot(x, [100 * mean.value for mean in means], color=colour, linestyle=dashes, linewidth=width, **marker)


def _unpruned(axes: Any, found: Comparison) -> None:
    mean = found.unpruned.mean
    axes.axhspan(100 * mean.low, 100 * mean.high, color="#000000", alpha=0.12, linewidth=0)
    axes.axhline(100 * mean.value, color="#000000", linewidth=0.9, linestyle=":")


def _scale(axes: Any, axis: Axis, values: Sequence[float], found: Comparison) -> None:
    axes.set_xlabel(axis.label)
    if axis.logarithmic and values[0] > 0:
        axes.set_xscale("log")
        ticks = [100 * budget for budget in reversed(found.budgets)] if axis.name == "compute" else [1, 2, 5, 10, 20, 50]
        low, high = values[0] * 0.92, values[-1] * 1.04
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) < 3:
            ticks = sorted({float(f"{value:.2g}") for value in values})[:6]
        axes.set_xlim(low, high)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.grid(axis="y", color="#000000", alpha=0.1, linewidth=0.7)
    axes.tick_params(length=3, width=0.8)


def _label(axes: Any, labels: list[tuple[float, float, str, str]]) -> None:
    """Write names to the right of the axes, each beside the end of its line where there is room, none over another."""
    axes.figure.draw_without_rendering()
    left, bottom, width, height = axes.get_window_extent().bounds
    at = sorted(labels, key=lambda label: -label[1])
    wanted = [axes.transData.transform((x, y))[1] for x, y, *_ in at]
    placed = spread(wanted, APART, bottom, bottom + height)
    for (x, y, name, colour), pixel in zip(at, placed, strict=True):
        text = axes.transData.inverted().transform((left + width, pixel))[1]
        axes.annotate(
            name,
            xy=(x, y),
            xycoords="data",
            xytext=(1.03, text),
            textcoords=axes.get_yaxis_transform(),
            color=colour if colour != QUIET else "#000000",
            va="center",
            fontsize=10.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7, "shrinkA": 1, "shrinkB": 3},
        )


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Falling positions, moved as little as a pass down and one up need for distances of at least `apart` above `low`."""
    placed: list[float] = []
    for position in wanted:
        placed.append(min(position, placed[-1] - apart if placed else high))
    least = low
    for number in reversed(range(len(placed))):
        placed[number] = max(placed[number], least)
        least = placed[number] + apart
    return placed


def _says(found: Comparison, axis: Axis, best: Sequence[str], worst: Sequence[str]) -> str:
    said = [f"Line chart: accuracy over {axis.label}.", f"Un-pruned: {found.unpruned.mean}."]
    for name, lines in found.methods.items():
        at = [f"{100 * line.mean.value:.1f} at {x:.3g}" for line in lines if (x := axis.of(line, found)) is not None]
        if at and (name in best or name in worst or lines[0].is_random):
            said.append(f"{name}: {', '.join(at)}.")
    return " ".join(said)


def panels(found: Comparison) -> Figures | None:
    """A panel for each method that has random tokens beside it at two budgets or more."""
    chosen = {name: [line for line in lines if line.random is not None] for name, lines in found.methods.items()}
    figures = [_panel(found, name, lines) for name, lines in chosen.items() if len(lines) >= 2]
    return Figures(tuple(figures), _PANEL_LEGEND, small=True) if figures else None


_PANEL_LEGEND = (
    ("s1", "the method"),
    ("bad", "the method, where it loses to random at some budget"),
    ("random", "random tokens at the same layers and counts"),
    ("unpruned", "un-pruned"),
)


def _panel(found: Comparison, method: str, lines: Sequence[Line]) -> Figure:
    from matplotlib.figure import Figure as Drawing

    name = f"{found.file.partition('.')[0]}-{''.join(letter if letter.isalnum() else '-' for letter in method)}"
    lost = [line.budget for line in lines if verdict_of(line) == "loses" and line.budget]
    rising = sorted(lines, key=lambda line: line.budget or 0)
    x = [100 * (line.budget or 0) for line in rising]
    with report_svg.style(name):
        figure = Drawing(figsize=(NARROW[0] / UNITS, NARROW[1] / UNITS), dpi=UNITS)
        axes = figure.add_axes((0.12, 0.13, 0.85, 0.83))
        _unpruned(axes, found)
        _draw(axes, x, [line.random for line in rising if line.random], QUIET, "--", 1.5, band=True)
        _draw(axes, x, [line.mean for line in rising], BAD if lost else SERIES[0], "-", 1.8, band=True)
        budgets = [100 * budget for budget in reversed(found.budgets)]
        axes.set_xscale("log")
        axes.set_xlim(budgets[0] * 0.9, budgets[-1] * 1.08)
        axes.set_xticks(budgets, [f"{tick:.3g}" for tick in budgets])
        axes.minorticks_off()
        axes.set_ylim(0, 104)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.grid(axis="y", color="#000000", alpha=0.1, linewidth=0.7)
        axes.tick_params(length=3, width=0.8)
        says = " ".join(f"At {percent_of(line.budget or 0)}: {line.mean}, random {line.random}." for line in lines)
        svg = report_svg.from_figure(figure, f"{method}, accuracy over its budget. {says}")
    return Figure(f"`{method}`", svg, says, note=_verdicts(lines))


def _verdicts(lines: Sequence[Line]) -> str:
    """On how many budgets the method beats random, or where it does not."""
    beats = sum(verdict_of(line) == "beats" for line in lines)
    if beats == len(lines):
        return f"beats random at {'both' if beats == 2 else 'all'} budgets"
    said = []
    for verdict in ("loses", "ties"):
        budgets = [line.budget for line in lines if line.budget is not None and verdict_of(line) == verdict]
        if budgets:
            said.append(f"{verdict} at {shares(budgets)}")
    return ", ".join(said)
