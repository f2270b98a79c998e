"""Results of lmms-eval, several runs beside each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vlmprune.evals.report_parts import Cell, Paragraph, Part, Section, Table
from vlmprune.evals.report_read import Source, arguments, pretrained

NOTE = (
    "What lmms-eval computed for each task; ± is its standard error over documents, which are not independent where "
    "several ask about one picture."
)


def sections(sources: Sequence[Source]) -> list[Section]:
    """A section with all runs, or nothing."""
    if not sources:
        return []
    runs = {source.name: recipe(arguments(source.numbers)) for source in sources}
    parts: list[Part] = [Paragraph(f"Model: `{pretrained(sources[0].numbers)}`. {NOTE}"), _scores(sources, runs)]
    if any(source.numbers.get("throughput") for source in sources):
        parts.append(_throughput(sources, runs))
    return [Section("lmms-eval", "lmms-eval", tuple(parts))]


def recipe(arguments: str) -> str:
    """The recipe in `--model_args`; "none" if there is none."""
    found = re.search(r"recipe=(?:\"([^\"]*)\"|'([^']*)'|([^,]*))", arguments)
    return next((group for group in found.groups() if group is not None), "none") if found else "none"


def _scores(sources: Sequence[Source], runs: dict[str, str]) -> Table:
    rows = []
    for source in sources:
        numbers = source.numbers
        for task, scores in numbers["results"].items():
            asked = numbers.get("n-samples", {}).get(task, {}).get("effective", "—")
            for key, value in scores.items():
                metric, _, kind = key.partition(",")
                if metric.endswith("_stderr") or not isinstance(value, int | float) or not kind:
                    continue
                error = scores.get(f"{metric}_stderr,{kind}")
                shown = f"{value:.4g} ± {error:.2g}" if isinstance(error, int | float) else f"{value:.4g}"
                cells = (Cell(runs[source.name], code=True), Cell(task), Cell(metric), Cell(shown), Cell(str(asked)))
                rows.append((task, metric, cells))
    rows.sort(key=lambda row: row[:2])
    heads = ("recipe", "task", "metric", "score", "documents")
    return Table("Scores by task", heads, tuple(cells for *_, cells in rows), text_columns=3)


def _throughput(sources: Sequence[Source], runs: dict[str, str]) -> Table:
    """Averages of rank 0, which is all that lmms-eval writes."""
    measured: dict[str, dict[str, Any]] = {source.name: dict(source.numbers.get("throughput") or {}) for source in sources}
    keys = [key for key in dict.fromkeys(key for found in measured.values() for key in found) if key.startswith("avg_")]
    rows = [
        (Cell(runs[name], code=True), *(Cell(f"{found[key]:.4g}" if _number(found.get(key)) else "—") for key in keys))
        for name, found in measured.items()
    ]
    heads = ("recipe", *(key.removeprefix("avg_").replace("_", " ") for key in keys))
    return Table("Averages of the first process", heads, tuple(rows))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
