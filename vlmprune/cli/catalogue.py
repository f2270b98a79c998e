"""The methods as rows: the tables of `vlmprune methods` and of README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from vlmprune.adapters.registry import FAMILIES
from vlmprune.errors import UsageError
from vlmprune.methods import METHODS, REDISTRIBUTORS
from vlmprune.methods.tower import TowerPruner
from vlmprune.recipe import Recipe
from vlmprune.recipe.entries import entry_of
from vlmprune.show.table import code, markdown, table
from vlmprune.show.units import spans
from vlmprune.view import PROBES

if TYPE_CHECKING:
    from vlmprune.methods import Pruner, Redistributor
    from vlmprune.schedule import Stage

COLUMNS = {
    "method": "method",
    "paper": "paper",
    "cuts": "prunes",  # the key keeps its name in `methods --json`, which scripts read
    "families": "families",
    "looks_at": "scored by",
    "default": "default",
    "positions": "positions in its code",
    "note": "where it differs",
}
"""Columns of the table of pruning methods: keys of a row, with their titles."""
EDIT_COLUMNS = {
    "method": "method",
    "paper": "paper",
    "edits": "edits",
    "rows": "rows of a prompt",
    "layers": "layers of 32",
    "families": "families",
    "default": "parameters",
    "presets": "presets",
    "note": "where it differs",
}
"""Columns of the table of redistribution methods: keys of a row, with their titles."""
ROWS = {"behind": "after the last picture", "last": "the last", "all": "all"}


def methods_markdown() -> str:
    """README's table of pruning methods."""
    return markdown(methods_table())


def redistribution_markdown() -> str:
    """README's table of redistribution methods."""
    return markdown(redistribution_table())


def methods_table(title: str = "") -> Table:
    """A row for each pruning method."""
    return _table(COLUMNS, method_rows(), title)


def redistribution_table(title: str = "") -> Table:
    """A row for each redistribution method."""
    return _table(EDIT_COLUMNS, redistribution_rows(), title)


def _table(columns: Mapping[str, str], rows: Sequence[Mapping[str, str]], title: str) -> Table:
    cells = [[code(row[key]) if key in ("method", "default") else row[key] for key in columns] for row in rows]
    return table(list(columns.values()), cells, text_columns=len(columns), title=title)


def method_rows() -> list[dict[str, str]]:
    """One row per pruning method, by the keys of `COLUMNS`."""
    return [_method_row(name, method()) for name, method in sorted(METHODS.items())]


def _method_row(name: str, method: Pruner) -> dict[str, str]:
    recipe = Recipe((method,))
    plans: dict[str, list[Stage]] = {}
    for family in FAMILIES.values():
        try:
            planned = [stage for stage, _ in recipe.stages(family.facts)]
        except UsageError:  # the method does not work with this family
            continue
        known = family.tower is not None and family.tower.patches is not None
        if known or all(stage.site != "pixels" for stage in planned):
            plans[family.name] = planned
    stages = {stage.order: stage for plan in plans.values() for stage in plan}
    return {
        "method": name,
        "paper": method.paper,
        "cuts": _places([stages[order] for order in sorted(stages)]),
        "families": "all" if len(plans) == len(FAMILIES) else ", ".join(plans),
        "looks_at": ", ".join(sorted(_looks_at(method, list(stages.values())))) or "nothing",
        "default": str(recipe),
        "positions": method.official_positions,
        "note": method.note,
    }


def _looks_at(method: Pruner, stages: Sequence[Stage]) -> set[str]:
    needs = {need for stage in stages if stage.site in ("pixels", "llm") for need in method.needs_at(stage)}
    watched = {method.watches} if isinstance(method, TowerPruner) else set()
    return watched | {PROBES[need].looks_at for need in needs if need in PROBES and PROBES[need].looks_at}


def _places(stages: Sequence[Stage]) -> str:
    """Where a method prunes, in a few words."""
    layers = [stage.layer for stage in stages if stage.site == "llm"]
    inside = [str(layer) for layer in layers if layer]
    places = {
        "before the tower": stages[0].site == "pixels",
        "in the tower": any(stage.site == "vision" for stage in stages),
        "before the LLM": 0 in layers,
        f"layer{'s' if len(inside) > 1 else ''} {', '.join(inside)}": bool(inside),
        "cache": stages[-1].site == "cache",
    }
    return ", ".join(place for place, there in places.items() if there)


def redistribution_rows() -> list[dict[str, str]]:
    """One row per redistribution method, by the keys of `EDIT_COLUMNS`."""
    return [_redistribution_row(name, method()) for name, method in sorted(REDISTRIBUTORS.items())]


def _redistribution_row(name: str, method: Redistributor) -> dict[str, str]:
    parameters: dict[str, Any] = {key: value for key, value in entry_of(method).items() if key != "method" and value != ""}
    with_cls = ", ".join(family.name for family in FAMILIES.values() if family.facts.cls)
    return {
        "method": name,
        "paper": method.paper,
        "edits": method.edits,
        "rows": ROWS[method.rows],
        "layers": spans(method.layers_of(32)),
        "families": with_cls if method.needs else "all",
        "default": ",".join(f"{key}={value}" for key, value in parameters.items()),
        "presets": ", ".join(method.presets),
        "note": method.note,
    }
