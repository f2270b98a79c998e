"""The answers of a sweep, kept in a file from which an interrupted sweep goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import vlmprune
from vlmprune.evals.accuracy import UNPRUNED
from vlmprune.evals.fingerprints import code_fingerprint

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Answers:
    """What one recipe answered about the scenes of one seed.

    Attributes:
        recipe: its string, or "un-pruned".
        code: fingerprint of the code that gave the answers. After a change of code they are asked again.
        seed, split, images: which scenes.
        given: the answers, in the order of the questions.
        share: the measured compute average, as a share of all visual tokens.
        seconds: time it took.
    """

    recipe: str
    code: str
    seed: int
    split: str
    images: int
    given: list[str]
    share: float
    seconds: float

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal answers are expected for equal keys."""
        return self.recipe, self.code, self.seed, self.split, self.images


class Store:
    """Answers in memory and, if a folder is given, in its `rows.jsonl`."""

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / ROWS
        self._rows: dict[tuple[Any, ...], Answers] = {}
        if self._file is not None and self._file.exists():
            whole = [line for line in self._file.read_text().splitlines(keepends=True) if line.endswith("\n")]
            self._file.write_text("".join(whole))  # a last line without its end was interrupted
            for line in whole:
                self._remember(Answers(**json.loads(line)))

    def _remember(self, row: Answers) -> None:
        self._rows[row.key] = row

    def add(self, row: Answers) -> None:
        """Keep one row."""
        self._remember(row)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")

    def get(self, recipe: vlmprune.Recipe | None, seed: int, split: str, images: int) -> Answers | None:
        """The answers of a recipe (None: of the un-pruned model) given by the current code, if there are any."""
        return self._rows.get((recipe_name(recipe), code_fingerprint(), seed, split, images))


def recipe_name(recipe: vlmprune.Recipe | None) -> str:
    """A recipe's string, or "un-pruned"."""
    return UNPRUNED if recipe is None else str(recipe)
