"""Answers of sweeps from before `answers.jsonl`: `rows.jsonl`, with one line for each recipe and each seed's scenes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vlmprune
from vlmprune.errors import UsageError
from vlmprune.evals.answering import asked_of
from vlmprune.evals.answers import UNPRUNED, Answered, Answers
from vlmprune.evals.questions import scene_questions
from vlmprune.evals.scorers import score

ROWS = "rows.jsonl"
PACKED = "rows.jsonl.gz"


def read_rows(folder: Path, numbers: Mapping[str, Any]) -> Answered | None:
    """The answers of a folder's `rows.jsonl` or `rows.jsonl.gz`; None if it has neither.

    Where code was changed in the middle, a recipe has several rows, and the last one counts.

    Args:
        numbers: of the folder's `sweep.json`, which says how many scenes were asked.

    Raises:
        UsageError: a line cannot be read.
    """
    path = next((folder / name for name in (ROWS, PACKED) if (folder / name).exists()), None)
    if path is None:
        return None
    text = gzip.decompress(path.read_bytes()).decode() if path.name == PACKED else path.read_text()
    asked = [scene_questions(numbers["images"], numbers["split"], seed) for seed in range(numbers["seeds"])]
    found: dict[tuple[str, int], Answers] = {}
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            continue  # interrupted while it was written
        try:
            row = json.loads(line)
            at = row["split"], row["images"], row["seed"]
            if at[:2] != (numbers["split"], numbers["images"]) or at[2] >= numbers["seeds"]:
                continue
            scores = [score(said, one) for said, one in zip(row["given"], asked[row["seed"]], strict=True)]
            name = _named(row["recipe"])
            found[name, row["seed"]] = Answers(name, row["seed"], row["given"], scores, row["share"], [], row["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} has a line that cannot be read ({line[:60].strip()}…): delete this line.") from error
    return Answered([asked_of(one) for one in asked], found.values())


def _named(recipe: str) -> str:
    """A recipe as it is written today: parameters may have had another order."""
    if recipe == UNPRUNED:
        return recipe
    try:
        return str(vlmprune.Recipe.parse(recipe))
    except UsageError:  # of a method or a parameter that is gone: its row still counts by the name it has
        return recipe
