"""Sink dimensions for people: the evidence by layer, the finding, and what to write into a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune.evals.results import Result
from vlmprune.evals.sinks import Sinks
from vlmprune.show.table import table

COLUMNS = ("layer", "dim", "energy", "φ", "norm of the first", "of others", "× median", "attention to the first")
"""Columns of the evidence. "The first" is the first token of a prompt."""


def result(found: Sinks, stamp: Mapping[str, Any]) -> Result:
    """The result of a search for sink dimensions.

    Args:
        found: what was found.
        stamp: from `results.stamp`.
    """
    cells = [
        (
            str(row.layer),
            str(row.dim),
            f"{row.energy:.1%}",
            f"{row.phi:.1f}",
            f"{row.first_norm:.0f}",
            f"{row.other_norm:.0f}",
            f"{row.ratio:.0f}",
            f"{row.attention:.1%}",
        )
        for row in found.evidence
    ]
    parts = [table(COLUMNS, cells, text_columns=0), table(("finding", ""), found.rows(), text_columns=2)]
    return Result({**stamp, **found.to_dict()}, [*parts, [found.advice, *found.cautions]])
