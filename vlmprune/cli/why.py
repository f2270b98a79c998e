"""`vlmprune run --why`: why tokens of the picture were kept or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmprune.errors import UsageError

if TYPE_CHECKING:
    from vlmprune.live.handle import Run
    from vlmprune.loading.questions import ReadyQuestion

Why = Annotated[
    list[int] | None,
    typer.Option(
        "--why",
        metavar="TOKEN",
        min=0,
        help="Also explain why this visual token was kept or dropped: stage, score, rank; may be repeated. Tokens are numbered "
        "from 0, row by row.",
    ),
]


def check_tokens(question: ReadyQuestion, wanted: Sequence[int]) -> None:
    """Refuse tokens that the picture does not have, before the model answers.

    Raises:
        UsageError: says how many tokens the picture has.
    """
    tokens = sum(crop.tokens for crop in question.crops()) if wanted else 0
    for token in wanted:
        if not 0 <= token < tokens:
            raise UsageError(f"there is no token {token}: the picture has {tokens}, numbered 0 to {tokens - 1}.")


def explained(run: Run, question: ReadyQuestion, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """What `run --json` prints of each token: the explanation, and the token's cell in its raster if its index says where it
    is."""
    crops = question.crops() if tokens else []
    found = []
    for token in tokens:
        explanation = run.explain(token)
        cells = [(crop, *cell) for crop in crops for cell in (crop.cells == token).nonzero().tolist()]
        place = [{"crop": crop.name, "row": row, "column": column} for crop, row, column in cells]
        found.append({**explanation.to_dict(), "cell": place[0] if place and explanation.in_place else None})
    return found


def lines(explanation: dict[str, Any]) -> list[str]:
    """The explanation as lines for a terminal."""
    first, *others = explanation["lines"]
    cell = explanation["cell"]
    where = ""
    if cell is not None:
        where = f" Its cell is row {cell['row']}, column {cell['column']} (counted from 0) of the {cell['crop']}."
    return [first + where, *(f"  {line}" for line in others)]
