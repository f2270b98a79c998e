"""Gradients of every method, without and with gradient checkpointing, as a table: the error of each.

Run it in one environment after the other; the files hold the results of all versions of transformers:

    python benchmarks/gradients.py --out docs/results/gradients

"none" is the error of the gradient without checkpointing. Where tokens are only dropped, it is compared with the gradient of
the masked model (the largest relative error of any parameter, float64); otherwise with the slope of the forward pass along
three random directions (features are merged in float32, the rest is float64). "reentrant" and "non-reentrant" are gradients
under that kind of checkpointing against those without it (the largest relative error of any parameter, float32). Where a
recipe is refused, its sentence.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

import vlmprune as vp
from vlmprune.evals.results import Result
from vlmprune.show.table import code, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from gradients import (
    CASES,
    CHECKPOINTING,
    DROPPING,
    OTHERS,
    RECIPES,
    Training,
    direction,
    length,
    numerical_slope,
    relative_error,
    slope,
)

COLUMNS = tuple(CHECKPOINTING)
DIRECTIONS = 3


def against_truth(exact: Training, name: str) -> float:
    """Of the gradient without checkpointing, in float64."""
    recipe = RECIPES[name]
    found = exact.gradient(recipe)
    if name in DROPPING:
        return relative_error(found, exact.masked_gradient(recipe))
    inputs, errors = exact.inputs(), []
    for seed in range(DIRECTIONS):
        along = direction(exact.model, seed, without="visual" if "qwen" in exact.family else "nothing")
        with vp.wrap(exact.model, recipe):
            expected = numerical_slope(exact.model, lambda: exact.loss(inputs), along, 1e-2 if name in OTHERS else 1e-5)
        errors.append(abs(slope(found, along) - expected) / length(found))
    return max(errors)


def cell(measure: Callable[[], float]) -> float | str:
    """The error, or in a sentence why there is none."""
    try:
        return measure()
    except vp.UsageError as refusal:
        return f"refused: {refusal}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def row(family: str, name: str) -> dict[str, Any]:
    """A recipe on a family."""
    recipe, (single, exact) = RECIPES[name], trained(family)

    def checkpointed(kind: str) -> float:
        return relative_error(single.gradient(recipe, kind), single.gradient(recipe))

    errors = {kind: cell(partial(checkpointed, kind)) for kind in COLUMNS[1:]}
    return {"family": family, "recipe": recipe, "none": cell(partial(against_truth, exact, name)), **errors}


@cache
def trained(family: str) -> tuple[Training, Training]:
    return Training(family), Training(family, torch.float64)


def measure() -> list[dict[str, Any]]:
    """One row for every family and recipe."""
    rows = []
    for family, name in CASES:
        rows.append(row(family, name))
        print(family, RECIPES[name], *(shown(rows[-1][kind]) for kind in COLUMNS), sep=" | ", flush=True)
    return rows


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else "0" if value == 0 else f"{value:.0e}"


def result(numbers: Mapping[str, Any]) -> Result:
    """All versions of transformers beside each other."""
    measured = numbers["transformers"]
    versions = sorted(measured, key=lambda version: [int(part) for part in version.split(".")])
    columns = ["family", "recipe", *(f"{kind}, {version}" for version in versions for kind in COLUMNS)]
    cells = []
    for number, row in enumerate(measured[versions[0]]):
        errors = [shown(measured[version][number][kind]) for version in versions for kind in COLUMNS]
        cells.append([row["family"], code(row["recipe"]), *errors])
    title, _, _, explained = __doc__.split("\n\n", 3)
    return Result(numbers, ["# Gradients", title, explained.strip(), table(columns, cells, text_columns=2)])


def main(
    out: Annotated[Path | None, typer.Option(help="Files to write, without suffix; other versions in them stay.")] = None,
) -> None:
    """Measure with the transformers that is installed."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    file = None if out is None else out.with_suffix(".json")
    numbers = json.loads(file.read_text()) if file is not None and file.exists() else {"transformers": {}}
    numbers["transformers"][transformers.__version__] = measure()
    numbers["torch"] = torch.__version__
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    result(numbers).deliver(Console(), out)


if __name__ == "__main__":
    typer.run(main)
