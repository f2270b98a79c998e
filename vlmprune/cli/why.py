"""`vlmprune run --why`: why tokens of the picture were kept or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vlmprune.live.handle import Run
    from vlmprune.loading.questions import Question

Why = Annotated[
    list[int] | None,
    typer.Option(
        "--why",
        metavar="TOKEN",
        min=0,
        help="Also say why the recipe kept or dropped this token of the picture: stage, score, rank; may be repeated. Tokens "
        "are numbered from 0, row by row.",
    ),
]


def explained(run: Run, question: Question, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """What `run --json` prints of each token: the explanation, and the token's cell in the raster it belongs to.

    Raises:
        UsageError: the picture has no such token, or the recipe drops none.
    """
    crops = question.crops() if tokens else []
    found = []
    for token in tokens:
        explanation = run.explain(token)
        cells = [(crop, *cell) for crop in crops for cell in (crop.cells == token).nonzero().tolist()]
        place = [{"crop": crop.name, "row": row, "column": column} for crop, row, column in cells]
        found.append({**explanation.to_dict(), "cell": place[0] if place else None})
    return found


def lines(explanation: dict[str, Any]) -> list[str]:
    """The same for a reader."""
    first, *others = explanation["lines"]
    cell = explanation["cell"]
    where = "" if cell is None else f" Its cell is row {cell['row']}, column {cell['column']} of the {cell['crop']}."
    return [first + where, *(f"  {line}" for line in others)]
