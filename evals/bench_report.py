"""A speed run for people: the table, where our own time goes, and the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text

from vlmprune.evals.accuracy import UNPRUNED
from vlmprune.evals.bench import Measured
from vlmprune.evals.results import Result
from vlmprune.show.table import code, table

COLUMNS = (
    "recipe",
    "batch",
    "TTFT ms",
    "faster",
    "of ideal",
    "TPOT ms",
    "faster",
    "whole ms",
    "faster",
    "peak MiB",
    "KV MiB",
    "ours",
)


def result(numbers: Mapping[str, Any]) -> Result:
    """The result of a speed run.

    Args:
        numbers: a `title` and `rows` as `Measured.to_dict()` gives them, with `results.stamp()`.
    """
    measured, title = [Measured.from_dict(row) for row in numbers["rows"]], numbers["title"]
    shown = table(COLUMNS, map(cells, measured), title=title)
    draw = partial(plot, measured, title)
    return Result(numbers, [title, shown, overheads(measured)], [shown, overheads(measured)], draw)


def cells(row: Measured) -> list[str | Text]:
    """One line of the table."""
    plain = row.recipe == UNPRUNED

    def milliseconds(phase: str) -> str:
        if phase not in row.times:
            return "—"
        found = row.times[phase]
        return f"{found.ms:.1f} ({found.low:.1f}–{found.high:.1f})"

    def ratio(phase: str) -> str:
        if plain or phase not in row.faster:
            return "—"
        found = row.faster[phase]
        return f"{found.times:.2f}× [{found.low:.2f}, {found.high:.2f}]"

    return [
        row.recipe if plain else code(row.recipe),
        str(row.batch),
        milliseconds("ttft"),
        ratio("ttft"),
        "—" if plain else f"{row.achieved:.0%} of {row.ideal:.2f}×",
        milliseconds("tpot"),
        ratio("tpot"),
        milliseconds("e2e"),
        ratio("e2e"),
        f"{row.peak_bytes / 2**20:.0f}",
        f"{row.kv_bytes / 2**20:.1f}",
        "—" if plain else f"{row.overhead_share:.1%}",
    ]


def overheads(rows: Sequence[Measured]) -> list[str]:
    """Per recipe, our own work by where it is done."""
    return [
        f"Share of vlmprune's own work in TTFT, `{row.recipe}`, batch {row.batch}: "
        + ", ".join(f"{where} {share:.1%}" for where, share in row.overhead.items())
        for row in rows
        if row.overhead
    ]


def plot(rows: Sequence[Measured], title: str, path: Path) -> None:
    """How many times faster, per phase, beside the ratio of FLOPs."""
    from matplotlib import pyplot

    pruned = [row for row in rows if row.recipe != UNPRUNED]
    phases = [phase for phase in ("ttft", "tpot", "e2e") if all(phase in row.faster for row in pruned)]
    figure, axes = pyplot.subplots(figsize=(7.2, 1.2 + 0.55 * len(pruned)), layout="constrained")
    for line, row in enumerate(pruned):
        axes.plot([row.ideal] * 2, [line - 0.36, line + 0.36], color="0.3", linewidth=1.5)
        for number, phase in enumerate(phases):
            found = row.faster[phase]
            whiskers = [[max(found.times - found.low, 0)], [max(found.high - found.times, 0)]]
            height = line + (number - (len(phases) - 1) / 2) * 0.24
            axes.barh(height, found.times, 0.22, xerr=whiskers, color=f"C{number}", error_kw={"linewidth": 1})
    axes.axvline(1, color="0.6", linewidth=1)
    axes.set_yticks(range(len(pruned)), [f"{row.recipe}, batch {row.batch}" for row in pruned], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than un-pruned (95 % interval); line: ratio of FLOPs to the first token")
    axes.set_title(title, fontsize=10)
    names = {"ttft": "first token", "tpot": "further tokens", "e2e": "whole answer"}
    axes.legend(
        [pyplot.Rectangle((0, 0), 1, 1, color=f"C{n}") for n in range(len(phases))], [names[p] for p in phases], fontsize=8
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
