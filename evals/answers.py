"""What recipes answered to sets of questions, scored, and the file `answers.jsonl` that holds all of it.

The file is the same, byte for byte, whoever answered: it has no times, and its order is that of the plan. It needs neither the
model nor the pictures to be read: first a line for every set of questions, then a line for every recipe and set.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmprune.errors import UsageError
from vlmprune.evals.files import written_whole

FILE = "answers.jsonl"
UNPRUNED = "un-pruned"
"""Name of the model without a recipe."""


@dataclass(frozen=True)
class Asked:
    """The questions of one set, as far as statistics need them: one entry per question in each list.

    Attributes:
        ids, texts: names and texts.
        answers: all that are right.
        groups: skills or categories.
        units: what is independent, usually the picture.
    """

    ids: list[str]
    texts: list[str]
    answers: list[list[str]]
    groups: list[str]
    units: list[str]


@dataclass(frozen=True)
class Answers:
    """What one recipe answered to one set of questions: one entry per question in each list.

    Attributes:
        recipe: its string, or "un-pruned".
        asked: number of the set.
        given: the answers.
        scores: from 0 (wrong) to 1 (right).
        share: the measured compute average, as a share of all visual tokens.
        kept: visual tokens that leave the last decoder layer; empty where they were not counted.
        seconds: time it took; not in the file.
    """

    recipe: str
    asked: int
    given: list[str]
    scores: list[float]
    share: float
    kept: list[int]
    seconds: float = 0.0


@dataclass(frozen=True)
class Scored:
    """Answers to the questions of all sets, one entry per question; where a recipe has several seeds, their mean.

    Attributes:
        score: from 0 to 1.
        unit: numbers of what is independent, in the order of their first question.
        group: skills or categories.
        loyal: share of answers that are equal to those of the un-pruned model.
        share, seconds: means over everything that was asked.
    """

    score: np.ndarray
    unit: np.ndarray
    group: list[str]
    loyal: np.ndarray
    share: float
    seconds: float


class Answered:
    """All answers of a plan.

    Args:
        asked: the sets of questions.
        answers: of every recipe to every set, in the order of the plan.
    """

    def __init__(self, asked: Sequence[Asked], answers: Iterable[Answers]) -> None:
        self.asked = list(asked)
        self.answers: dict[tuple[str, int], Answers] = {(row.recipe, row.asked): row for row in answers}

    def scored(self, recipes: Iterable[tuple[str, int]]) -> Scored:
        """The answers of one recipe to one or several sets of questions; or of several recipes, for their mean.

        Args:
            recipes: (recipe, set) pairs.
        """
        rows = [self.answers[pair] for pair in recipes]
        score, loyal, group, unit = [], [], [], []
        numbers: dict[tuple[int, str], int] = {}
        for number in sorted({row.asked for row in rows}):
            own = [row for row in rows if row.asked == number]
            plain = self.answers[UNPRUNED, number].given
            score.append(np.mean([row.scores for row in own], axis=0))
            loyal.append(
                np.mean([[said == other for said, other in zip(row.given, plain, strict=True)] for row in own], axis=0)
            )
            group += self.asked[number].groups
            unit += [numbers.setdefault((number, name), len(numbers)) for name in self.asked[number].units]
        return Scored(
            np.concatenate(score),
            np.array(unit),
            group,
            np.concatenate(loyal),
            sum(row.share for row in rows) / len(rows),
            sum(row.seconds for row in rows) / len(rows),
        )

    def write(self, folder: Path) -> None:
        """Write `answers.jsonl`."""
        lines: list[Mapping[str, Any]] = [{"asked": number, **asdict(one)} for number, one in enumerate(self.asked)]
        lines += [{key: value for key, value in asdict(row).items() if key != "seconds"} for row in self.answers.values()]
        with written_whole(folder / FILE) as draft:
            draft.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(folder: Path) -> Answered:
    """The answers of a folder's `answers.jsonl`.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    path = folder / FILE
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        asked = [Asked(**{key: value for key, value in line.items() if key != "asked"}) for line in lines if "ids" in line]
        return Answered(asked, [Answers(**line) for line in lines if "recipe" in line])
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no {FILE} in {folder}: give a folder to which `vlmprune sweep --out` has written."
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: write it again by running the command that made it.") from error
