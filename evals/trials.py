"""Answers of recipes to the same questions, asked batch by batch as far as they are needed, beside the un-pruned model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

import vlmprune
from vlmprune.errors import UsageError
from vlmprune.evals.answers import UNPRUNED
from vlmprune.evals.asking import Asking, under
from vlmprune.evals.candidates import Candidate
from vlmprune.evals.question import Question, QuestionSet
from vlmprune.evals.scorers import score
from vlmprune.evals.stats import Difference, bootstrap, difference
from vlmprune.evals.store import Store

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Trial:
    """What a recipe did on some questions.

    Attributes:
        recipe, origin: as in `Candidate`.
        drop: accuracy of the un-pruned model minus that of the recipe; its `low` and `high` are the paired 95 % interval.
        least, reach: ends of the bootstrap's interval alone, which are the drop itself where no answer differs. They sort
            candidates on few questions; whether a drop is within the budget is decided by `drop.high` on the held-out ones.
        cost: measured compute average, as a share of all visual tokens.
        flops: of the language model's prefill, as a share of the un-pruned one's.
        accuracy: mean over groups.
        left: why it left, and `rung` when; empty for those that stayed.
    """

    recipe: str
    origin: str
    drop: Difference
    least: float
    reach: float
    cost: float
    flops: float
    accuracy: float
    left: str = ""
    rung: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


# -- questions ---------------------------------------------------------------------------------------------------------


def halves(questions: QuestionSet, seed: int = 0) -> tuple[QuestionSet, QuestionSet]:
    """Questions for tuning and held-out ones, half of the units each, in an order drawn by `seed`; no unit is in both.

    Raises:
        UsageError: fewer than two units.
    """
    units: dict[str, list[Question]] = {}
    for question in questions:
        units.setdefault(question.unit, []).append(question)
    if len(units) < 2:
        raise UsageError("the questions are about a single picture: half of the pictures are for tuning, half to confirm.")
    names = list(units)
    order = np.random.default_rng(seed).permutation(len(names))
    middle = len(names) // 2
    return tuple(  # type: ignore[return-value]
        replace(
            questions,
            questions=tuple(question for number in chosen for question in units[names[number]]),
            fingerprint=f"{questions.fingerprint} {part} {seed}",
        )
        for part, chosen in (("tuning", order[:middle]), ("held-out", order[middle:]))
    )


class Trials:
    """Answers of recipes to a set of questions, batch by batch, each asked once.

    Args:
        name: "tuning" or "held-out"; part of the store's keys.
        model: un-wrapped.
        asking: the questions.
        store: keeps the answers.
        tick: called before every recipe with its name and the batches that are done and planned.
    """

    def __init__(self, name: str, model: Any, asking: Asking, store: Store, tick: Tick = lambda name, done, of: None) -> None:
        self._name, self._model, self._asking, self._store, self._tick = name, model, asking, store, tick
        questions = asking.questions.questions
        self._unit = np.array([question.unit or question.id for question in questions])
        self._group = np.array([question.group for question in questions])
        self.batches = len(asking.batches)
        self.units = len(set(self._unit.tolist()))
        self.questions = len(questions)

    def ask(self, recipe: str, batches: int) -> None:
        """Ask what has no answer yet of the first `batches` batches."""
        missing = [number for number in range(batches) if (self._name, recipe, number) not in self._store]
        if not missing:
            return
        parsed = None if recipe == UNPRUNED else vlmprune.Recipe.parse(recipe)
        with under(self._model, parsed) as run:
            for done, number in enumerate(missing):
                self._tick(recipe, done, len(missing))
                answered = self._asking.measure_batch(self._model, number, run)
                report = None if run is None else run.report()
                row = {
                    "given": answered.given,
                    "entered": answered.entered,
                    "visual": answered.visual,
                    "flops": 1 if report is None else report.flops,
                    "flops_unpruned": 1 if report is None else report.flops_unpruned,
                    "seconds": round(answered.seconds, 4),
                }
                self._store.add((self._name, recipe, number), row)

    def trial(self, candidate: Candidate, batches: int | None = None) -> Trial:
        """A candidate on the first batches (default: all), beside the un-pruned model."""
        batches = self.batches if batches is None else batches
        ours, theirs = self.scores(candidate.recipe, batches), self.scores(UNPRUNED, batches)
        asked = self._asked(batches)
        unit, group = self._unit[asked], self._group[asked]
        lost, (least, reach) = difference(theirs, ours, unit, group), bootstrap(theirs, ours, unit, group)
        rows = [self._store[self._name, candidate.recipe, number] for number in range(batches)]
        total = {key: sum(row[key] for row in rows) for key in ("entered", "visual", "flops", "flops_unpruned")}
        return Trial(
            recipe=candidate.recipe,
            origin=candidate.origin,
            drop=lost,
            least=least,
            reach=reach,
            cost=total["entered"] / total["visual"],
            flops=total["flops"] / total["flops_unpruned"],
            accuracy=self.accuracy(candidate.recipe, batches),
        )

    def gain(self, recipe: str, other: str) -> Difference:
        """Accuracy of a recipe minus that of another one, on all questions."""
        return difference(self.scores(recipe, self.batches), self.scores(other, self.batches), self._unit, self._group)

    def accuracy(self, recipe: str, batches: int | None = None) -> float:
        """Mean over groups."""
        batches = self.batches if batches is None else batches
        right, group = self.scores(recipe, batches), self._group[self._asked(batches)]
        return float(np.mean([right[group == name].mean() for name in dict.fromkeys(group.tolist())]))

    def scores(self, recipe: str, batches: int) -> np.ndarray:
        """`[question]` of the first batches."""
        self.ask(recipe, batches)
        given = [self._store[self._name, recipe, number]["given"] for number in range(batches)]
        pairs = zip(chain(*given), self._asked(batches), strict=True)
        return np.array([score(said, self._asking.questions[index]) for said, index in pairs])

    def _asked(self, batches: int) -> list[int]:
        return [index for number in range(batches) for index in self._asking.batches[number]]
