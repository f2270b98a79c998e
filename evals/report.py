"""A folder of results as one page: HTML without script or other files, and the same as Markdown and JSON.

What is written depends on the folder alone: the same files give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmprune.evals import report_lines, report_lmms, report_pictures, report_sections
from vlmprune.evals.report_html import html
from vlmprune.evals.report_lines import Comparison
from vlmprune.evals.report_losses import collapses, verdict_of
from vlmprune.evals.report_markdown import markdown
from vlmprune.evals.report_parts import Document, Paragraph, Section
from vlmprune.evals.report_read import FORMAT, SHOWN, Source

COMPARED = {"sweep": report_lines.of_sweep, "accuracy": report_lines.of_accuracy}


def comparisons(sources: Sequence[Source]) -> list[Comparison]:
    """The accuracies of a folder, those of a sweep first."""
    found = [source for kind in COMPARED for source in sources if source.kind == kind]
    return [replace(COMPARED[source.kind](source.name, source.numbers), several=len(found) > 1) for source in found]


def draw(folder: Path, sources: Sequence[Source], tick: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Draw with the embedded model which tokens each method keeps, into `kept.json` of the folder.

    Raises:
        vlmprune.UsageError: there are no recipes to draw, or they are of another model.
    """
    found = comparisons(sources)
    compared = next((source.numbers for source in sources if source.kind in COMPARED), {})
    report_pictures.check(found, str(compared.get("model", "tiny")))
    report_pictures.write(folder, found[0], str(compared["split"]), tick)


def document(folder: Path, sources: Sequence[Source]) -> Document:
    """The report of the results that `report_read.read` found in a folder."""
    found = comparisons(sources)
    sections = [report_sections.in_short(one) for one in found]
    for one in found:
        sections += report_sections.comparison(one)
    pictures = [row for source in sources if source.kind == "kept" for row in report_pictures.stored(source)]
    pictures += report_pictures.drawn(folder)
    if pictures:
        note = "Patches of the tokens that are left after the last stage are framed, all others are faded."
        sections.append(Section("Which tokens stay", "kept", (Paragraph(note), *pictures)))
    sections += [report_sections.costs(one) for one in found]
    sections += [report_sections.other(source) for source in sources if source.kind in report_sections.RESULTS]
    sections += report_lmms.sections([source for source in sources if source.kind == "lmms-eval"])
    sections += [report_sections.notes_of_sweep(source.numbers) for source in sources if source.kind == "sweep"]
    sections.append(report_sections.measured(sources))
    return Document(f"vlmprune report: {folder.resolve().name}", _lead(sources), _tiles(found), tuple(sections))


def _lead(sources: Sequence[Source]) -> str:
    """What was measured, in a sentence."""
    for source in sources:
        if source.kind not in COMPARED:
            continue
        numbers = source.numbers
        groups = (numbers["rows"][0] if source.kind == "accuracy" else numbers["unpruned"])["by_skill"]
        model, data = numbers.get("model", "tiny"), numbers.get("data", "scenes")
        if data == "scenes":
            seeds = f"{numbers['seeds']} × " if "seeds" in numbers else ""
            asked = f"{seeds}{numbers['images']} held-out scenes ({numbers['split']})"
        else:
            asked = f"`{data}`{', ' + numbers['split'] if numbers.get('split') else ''}"
            asked += f", {numbers['pictures']} pictures" if "pictures" in numbers else ""
        many = f" in {len(groups)} {'skills' if data == 'scenes' else 'groups'}" if len(groups) > 1 else ""
        return (
            f"Visual token pruning on {'the embedded model' if model == 'tiny' else f'`{model}`'}: {asked}, "
            f"{sum(entry['n'] for entry in groups.values()):,} questions{many}."
        )
    return f"Results from {', '.join(source.name for source in sources if source.kind in SHOWN)}."


def _tiles(found: Sequence[Comparison]) -> tuple[tuple[str, str, str], ...]:
    """The numbers that are read first."""
    tiles = []
    for one in found[:1]:
        mean = one.unpruned.mean
        tiles.append((f"{100 * mean.value:.1f} %", "un-pruned accuracy", str(mean).partition(" ")[2]))
        verdicts = [verdict for line in one.lines if (verdict := verdict_of(line))]
        if verdicts:
            tiles.append((f"{verdicts.count('beats')} of {len(verdicts)}", "points beat random", ""))
            what = f"{'point loses' if verdicts.count('loses') == 1 else 'points lose'} to random, {verdicts.count('ties')} tie"
            tiles.append((str(verdicts.count("loses")), what, ""))
        if len(one.groups) < 2:
            continue
        points = sum(not line.is_random for line in one.lines)
        hidden = len({case.line.recipe for case in collapses(one)})
        tiles.append((f"{hidden} of {points}", f"points where the mean hides a collapsing {one.group_word}", ""))
    return tuple(tiles)


def data(page: Document, sources: Sequence[Source]) -> dict[str, Any]:
    """The report as plain data: the numbers of all comparisons in one form, verdicts, and what the means hide."""
    found = comparisons(sources)
    return {
        "format": FORMAT,
        "title": page.title,
        "about": page.lead,
        "warnings": warnings(page),
        "sources": [
            {"file": source.name, "kind": source.kind}
            | {key: source.numbers[key] for key in ("command", "date", "environment") if key in source.numbers}
            for source in sources
        ],
        "comparisons": [
            {
                **one.to_dict(),
                "verdicts": {line.recipe: verdict for line in one.lines if (verdict := verdict_of(line))},
                "collapses": [case.to_dict() for case in collapses(one)],
            }
            for one in found
        ],
    }


def warnings(page: Document) -> list[str]:
    """The sentences that must not be missed."""
    parts = [part for section in page.sections for part in section.parts]
    return [part.text for part in parts if isinstance(part, Paragraph) and part.warning]


def texts(folder: Path, sources: Sequence[Source]) -> dict[str, str]:
    """The report by the endings of its files: .html, .md and .json."""
    page = document(folder, sources)
    return {
        ".html": html(page),
        ".md": markdown(page, folder),
        ".json": json.dumps(data(page, sources), indent=1) + "\n",
    }
