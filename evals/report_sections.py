"""The sections of a report, from the results of a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table as RichTable

from vlmprune.evals import (
    bench_report,
    horizon_report,
    lmms_results,
    max_drop_report,
    power,
    report_figures,
    report_svg,
    sweep_report,
    sweep_rows,
    tune,
)
from vlmprune.evals.report_lines import Comparison, Line
from vlmprune.evals.report_losses import collapse_sentences, collapses, findings, losing, verdict_of
from vlmprune.evals.report_parts import Cell, Facts, Figure, Figures, Paragraph, Part, Section, Sentences, Table, percent_of
from vlmprune.evals.report_read import Source
from vlmprune.evals.results import Result

AT_EQUAL_COST = (
    "Budgets are compute averages: visual tokens entering a decoder layer, mean over layers. The third line of a cell is the "
    "paired difference to random tokens at the same layers and counts (▲ beats, = ties, ▼ loses)."
)
AT_ANY_COST = (
    "Budgets are shares of the visual tokens that the last stage keeps. At the same share a later stage costs more: "
    "`vlmprune sweep` compares methods at equal cost."
)
LOSSES = (
    "Points of accuracy that each {} loses against the un-pruned model. Framed numbers lose at least 10 points more than "
    "the mean and at least twice as much, and their interval does not reach the un-pruned one."
)


def in_short(found: Comparison) -> Section:
    """What must be known first: who loses, what the means hide, who beats random."""
    warnings = [Paragraph(said, warning=True) for said in (*losing(found), *collapse_sentences(found))]
    return _section("In short", "short", found, *warnings, Sentences(tuple(findings(found))))


def comparison(found: Comparison) -> list[Section]:
    """Accuracy, what the means hide, every method beside random."""
    over, panels = report_figures.overviews(found), report_figures.panels(found)
    means = f", means over {found.group_word}s" if len(found.groups) > 1 else ""
    numbers = f"Accuracies are in %{means}, with 95 % intervals by picture."
    about = Paragraph(f"{numbers} {AT_EQUAL_COST if found.equal_cost else AT_ANY_COST}")
    sections = [_section("Accuracy", "accuracy", found, about, *([over] if over else []), _means(found))]
    if len(found.groups) > 1:
        losses = Paragraph(LOSSES.format(found.group_word))
        sections.append(_section("What the means hide", "losses", found, losses, *_losses(found)))
    if panels:
        note = Paragraph("Accuracy in % over the budget in %.")
        sections.append(_section("Every method beside random", "methods", found, note, panels))
    return sections


def costs(found: Comparison) -> Section:
    """What every line cost, and how loyal its answers are."""
    return _section("Costs and same answers", "costs", found, _costs(found))


def _section(title: str, name: str, found: Comparison, *parts: Part) -> Section:
    """A section about a comparison; where the folder has several, its title names the file."""
    stem = found.file.partition(".")[0]
    return Section(f"{title} ({found.file})" if found.several else title, f"{name}-{stem}", parts)


def _means(found: Comparison) -> Table:
    """Methods × budgets where lines have budgets of a sweep; otherwise recipes below each other."""
    if found.equal_cost:
        heads = ("method", "layers", *(percent_of(budget) for budget in found.budgets))
        rows = []
        for name, lines in found.methods.items():
            at = {line.budget: line for line in lines}
            cells = [_mean(at[budget]) if budget in at else Cell("—", ("not reachable",)) for budget in found.budgets]
            rows.append((Cell(name, code=True), Cell(lines[0].places), *cells))
        return Table(f"Accuracy by method and budget; un-pruned: {found.unpruned.mean}", heads, tuple(rows), text_columns=2)
    heads = ("recipe", "accuracy", "lost against un-pruned", "random beside it", "same answers")
    return Table("Accuracy by recipe", heads, tuple(_recipe(found, line) for line in (found.unpruned, *found.lines)))


def _mean(line: Line) -> Cell:
    value, _, interval = str(line.mean).partition(" ")
    if (over := line.over_random.get("mean")) is None:
        return Cell(value, (interval,))
    corrected = [] if over.p is None else [f"p = {over.p:.2g}"]
    return Cell(value, (interval, str(over), *corrected), verdict=over.verdict)


def _recipe(found: Comparison, line: Line) -> tuple[Cell, ...]:
    plain = line is found.unpruned
    lost = f"{100 * found.lost(line):.1f}"
    low, high = line.lost_interval or (0.0, 0.0)
    corrected = [] if line.lost_p is None else [f"p = {line.lost_p:.2g}"]
    beside = "—" if line.random is None else str(line.random)
    return (
        Cell(line.recipe, code=not plain),
        Cell(str(line.mean)),
        Cell("—") if plain else Cell(lost, (f"[{100 * low:.1f}, {100 * high:.1f}]", *corrected)),
        Cell(beside, verdict="" if plain else verdict_of(line)),
        _percent(line.loyalty),
    )


def _losses(found: Comparison) -> list[Table]:
    """A table for each budget of a sweep, or one of all recipes: points lost by each group."""
    flagged = {(case.line.recipe, case.group) for case in collapses(found)}
    swept = found.equal_cost
    tables = []
    for budget in found.budgets if swept else [None]:
        lines = [line for line in found.lines if budget is None or line.budget == budget]
        rows = [
            (
                Cell(line.name if swept else line.recipe, code=True),
                _lost(found.lost(line)),
                *(_lost(found.lost(line, group), (line.recipe, group) in flagged) for group in found.groups),
            )
            for line in sorted(lines, key=found.lost)
        ]
        title = "Points lost" if budget is None else f"Points lost at {percent_of(budget)}"
        tables.append(Table(title, ("method" if swept else "recipe", "mean", *found.groups), tuple(rows), kind="losses"))
    return tables


def _lost(value: float, warn: bool = False) -> Cell:
    steps = sum(value >= step for step in (0.02, 0.1, 0.25, 0.5))
    shown = f"{100 * value:.1f}"
    return Cell("0.0" if shown == "-0.0" else shown, heat=steps, warn=warn)


def _costs(found: Comparison) -> Table:
    """What each line cost, and how often it answered as the un-pruned model did; columns that no line has are left out."""
    whole = found.unpruned.seconds
    columns: list[tuple[str, Callable[[Line], float | None]]] = [
        ("entering a layer, measured", lambda line: line.compute),
        ("left after the last stage", lambda line: line.kept),
        ("time of all questions", lambda line: line.seconds / whole if line.seconds is not None and whole else None),
        ("same answers", lambda line: line.loyalty),
    ]
    used = [(head, of) for head, of in columns if any(of(line) is not None for line in found.lines)]
    rows = [(Cell(line.recipe, code=True), *(_percent(of(line)) for _, of in used)) for line in found.lines]
    title = "In % of the un-pruned model; times are of one run each, on a machine that may have done other work"
    return Table(title, ("recipe", *(head for head, _ in used)), tuple(rows))


def _percent(value: float | None) -> Cell:
    return Cell("—" if value is None else f"{100 * value:.1f}")


RESULTS: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], Result]]] = {
    "bench": (
        "Speed and memory",
        "Bar chart: times faster than un-pruned; the table above has the numbers.",
        bench_report.result,
    ),
    "horizon": (
        "Information horizon",
        "Two line charts: what visual tokens still add, over decoder layers; the table above has the numbers.",
        horizon_report.result,
    ),
    "lmms": ("lmms-eval", "", lmms_results.result),
    "max_drop": (
        "The cheapest recipe within a budget",
        "Chart of points lost over cost; the tables above have the numbers.",
        max_drop_report.result,
    ),
    "power": ("How many questions are needed", "", power.result),
    "tune": ("Schedule from attention", "Chart of the change points; the table above has the numbers.", tune.result),
}
"""Results that are shown as their command shows them: title, what the figure shows in words, and what makes the `Result`."""


def other(source: Source) -> Section:
    """A result as its command shows it."""
    title, says, make = RESULTS[source.kind]
    result = make(source.numbers)
    stem = source.name.partition(".")[0]
    parts = [_part(shown, title) for shown in result.parts if shown]
    heads = [part.title for part in parts if isinstance(part, Table)]
    parts = [part for part in parts if not (isinstance(part, Paragraph) and part.text in heads)]
    if result.draw is not None:
        svg = report_svg.from_drawing(result.draw, stem, says)
        parts.append(Figures((Figure("", svg, says, wide=True),)))
    return Section(title, stem, tuple(parts))


def _part(shown: Any, title: str) -> Part:
    table = shown[0] if isinstance(shown, tuple) else shown
    if isinstance(table, RichTable):
        return Table.of(table, str(table.title or title))
    return Sentences(tuple(shown)) if isinstance(shown, list) else Paragraph(shown)


def notes_of_sweep(numbers: Mapping[str, Any]) -> Section:
    """Every sentence that the sweep's own summary has."""
    said = tuple(sweep_report.summary(sweep_rows.Sweep.from_dict(numbers)))
    return Section("In full, by method and skill", "notes-sweep", (Sentences(said),))


def measured(sources: Sequence[Source]) -> Section:
    """Commands, dates and versions."""
    parts: list[Part] = []
    commands = [(source.name, source.numbers["command"]) for source in sources if source.numbers.get("command")]
    dates = [(source.name, source.numbers.get("date") or "date not recorded") for source in sources if source.kind in _DATED]
    if commands:
        parts.append(Facts(tuple(commands), code=True))
    parts.append(Facts(tuple(dates)))
    environments: dict[str, list[str]] = {}
    for source in sources:
        if versions := source.numbers.get("environment"):
            text = ", ".join(f"{name} {value}" for name, value in versions.items())
            environments.setdefault(text, []).append(source.name)
    parts.append(Facts(tuple((", ".join(names), text) for text, names in environments.items())))
    if len(environments) > 1:
        parts.append(Paragraph("The files were written in different environments: compare times within a file only."))
    return Section("How it was measured", "measured", tuple(part for part in parts if not isinstance(part, Facts) or part.rows))


_DATED = ("sweep", "accuracy", *RESULTS)
