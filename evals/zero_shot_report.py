"""The result of a zero-shot evaluation, as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmprune.evals.answers import UNPRUNED
from vlmprune.evals.results import Part, Result
from vlmprune.evals.stats import LEVEL
from vlmprune.evals.zero_shot import Row
from vlmprune.show.table import code, table


def result(numbers: Mapping[str, Any]) -> Result:
    """The result of an evaluation.

    Args:
        numbers: `rows` as `Row.to_dict()` gives them, with `model`, `data`, `pictures`, `classes`, `captions`, `templates`,
            `batch`, `notes` and `results.stamp()`.
    """
    rows = [Row.from_dict(row) for row in numbers["rows"]]
    kinds = list(rows[0].scores)
    first = kinds[0]
    cells, brief = [], []
    for row in rows:
        plain = row.recipe == UNPRUNED
        name = row.recipe if plain else code(row.recipe)
        lost = "—" if plain else str(row.lost[first]).lstrip("+")
        speed = "1" if plain else f"{row.speedup[0]:.2f} [{row.speedup[1]:.2f}, {row.speedup[2]:.2f}]"
        bound = "1" if plain else f"{row.bound:.2f}"
        cells.append([name, *(str(row.scores[kind]) for kind in kinds), lost, f"{row.per_second:.1f}", speed, bound])
        brief.append([name, f"{100 * row.scores[first].value:.1f}", lost, speed])
    columns = ["recipe", *(f"{kind}, %" for kind in kinds), f"{first} lost", "pictures/s", "× un-pruned (quartiles)", "bound"]
    title = f"{numbers['model']} on {Path(numbers['data']).name}: {_about(numbers)}"
    parts: list[Part] = [
        (table(columns, cells, title=title), table(["recipe", f"{first}, %", "lost", "× faster"], brief, title=title)),
        _said(numbers, rows, first),
    ]
    return Result(numbers, parts)


def _about(numbers: Mapping[str, Any]) -> str:
    pictures = f"{numbers['pictures']:,} pictures"
    if numbers["classes"]:
        return f"{pictures}, {numbers['classes']:,} classes"
    return f"{pictures}, {numbers['captions']:,} captions"


def _said(numbers: Mapping[str, Any], rows: list[Row], first: str) -> list[str]:
    """What the columns mean, and which losses could not be seen."""
    said = [
        "bound: how many times fewer FLOPs the blocks of the image tower compute than un-pruned; nothing else is counted. "
        f"Pictures per second: of encoding batches of {numbers['batch']}, each un-pruned and under every recipe in turn.",
    ]
    if numbers["classes"]:
        said.append("Texts: " + "; ".join(f"“{template}”" for template in numbers["templates"]) + ".")
    unseen = [f"`{row.recipe}`" for row in rows if first in row.lost and row.lost[first].corrected >= LEVEL]
    if unseen:
        said.append(
            f"No difference in {first} from un-pruned could be seen (sign-flip test over pictures, corrected for all recipes "
            f"by Holm's method): {', '.join(unseen)}."
        )
    return [*said, *numbers["notes"]]
