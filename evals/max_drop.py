"""The cheapest recipe within an accuracy budget: many candidates on few questions, few on many, the winner on unseen ones.

1. Successive halving (Jamieson & Talwalkar, AISTATS 2016, arXiv:1502.07943) on the tuning questions, in `RUNGS` rungs, of which
   each doubles the questions. By paired differences to the un-pruned model these candidates leave:

       too much   the bootstrap's interval lies above the budget. In the first rung recipes that differ in their counts alone
                  are asked from the costliest on, and what keeps still less than one that lost too much is not asked at all
       costlier   than `SPARE` others whose interval lies within the budget
       behind     at most half of a rung stays: those for which no other is both cheaper and surer, by fronts (Pareto)

2. Up to `SPARE` cheapest candidates that look safe, and one that is cheaper still, go to the held-out questions, from the
   costliest to the cheapest, up to the first whose interval leaves the budget. The last one that stayed inside is the winner.
   In such a fixed order every test may have the full level (Maurer, Hothorn & Lehmacher, 1995), because which recipes are
   tried, and in which order, does not depend on the held-out questions.

3. The best single default is the cheapest of the methods as published that looks safe on the tuning questions. It is measured
   on the held-out questions, too.

The cost is the measured compute average: visual tokens that enter a decoder layer, mean over layers, as a share of all. FLOPs
of the language model's prefill are reported beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlmprune.errors import UsageError
from vlmprune.evals.answers import UNPRUNED
from vlmprune.evals.candidates import Candidate
from vlmprune.evals.stats import Difference
from vlmprune.evals.trials import Trial, Trials

RUNGS = 5
SPARE = 3
"""Candidates that look safe and are kept although a cheaper one looks safe, too."""
LEAST = 4
"""A rung never leaves fewer candidates by halving."""


@dataclass(frozen=True)
class Found:
    """What the search found.

    Attributes:
        max_drop: the budget, in points.
        trials: all candidates on the tuning questions that they were asked, those that left first at the end.
        skipped: recipes that were not asked, because a costlier one of their line lost too much.
        finalists: on the held-out questions, in the order in which they were tried.
        winner: the cheapest that stayed within the budget there; None if none did.
        best_default: the best single default on the held-out questions; None if no default looked safe.
        gain: the winner's accuracy minus that of the best default, on the held-out questions; None where one is missing.
        unpruned: accuracy of the un-pruned model on tuning and held-out questions.
    """

    max_drop: float
    trials: list[Trial]
    skipped: list[str]
    finalists: list[Trial]
    winner: Trial | None
    best_default: Trial | None
    gain: Difference | None
    unpruned: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        listed = {name: [one.to_dict() for one in getattr(self, name)] for name in ("trials", "finalists")}
        one = {
            name: None if (own := getattr(self, name)) is None else own.to_dict() for name in ("winner", "best_default", "gain")
        }
        return {"max_drop": self.max_drop, **listed, **one, "skipped": self.skipped, "unpruned": self.unpruned}


def least_pictures(max_drop: float) -> int:
    """How many pictures it takes to confirm a budget if not a single answer differs: 1 − 0.025^(1 / n) ≤ budget."""
    return math.ceil(math.log(0.025) / math.log(1 - max_drop / 100))


# -- the search --------------------------------------------------------------------------------------------------------


@dataclass
class Search:
    """Successive halving, and the confirmation of what it leaves.

    Args:
        tuning, held_out: the questions.
        max_drop: the budget, in points of a hundred.
        note: called after every rung with a sentence.
    """

    tuning: Trials
    held_out: Trials
    max_drop: float
    note: Callable[[str], None] = lambda sentence: None
    _gone: list[Trial] = field(default_factory=list)
    _skipped: list[Candidate] = field(default_factory=list)

    def run(self, candidates: Sequence[Candidate]) -> Found:
        """Find the cheapest candidate within the budget.

        Raises:
            UsageError: a budget outside (0, 100).
        """
        check_budget(self.max_drop)
        left = self.halve(candidates)
        default = self._best_default(left)
        tried, winner = self._confirm(left)
        best = self.held_out.trial(default) if default else None
        return Found(
            max_drop=self.max_drop,
            trials=[*left, *reversed(self._gone)],
            skipped=[candidate.recipe for candidate in self._skipped],
            finalists=tried,
            winner=winner,
            best_default=best,
            gain=self.held_out.gain(winner.recipe, best.recipe) if winner and best else None,
            unpruned={"tuning": self.tuning.accuracy(UNPRUNED), "held-out": self.held_out.accuracy(UNPRUNED)},
        )

    def halve(self, candidates: Sequence[Candidate]) -> list[Trial]:
        """The candidates that are left after all tuning questions, the cheapest first."""
        left: list[Trial] = []
        for rung, batches in enumerate(rungs(self.tuning.batches), start=1):
            if rung == 1:
                trials = self._first(candidates, batches)
            else:
                trials = [self.tuning.trial(Candidate(trial.recipe, trial.origin), batches) for trial in left]
            trials.sort(key=lambda trial: (trial.cost, trial.recipe))
            left = self._staying(trials, rung, last=batches == self.tuning.batches)
            asked = f"{batches} of {self.tuning.batches} batches"
            self.note(f"rung {rung}, {asked}: {len(trials)} candidates, {len(left)} stay")
        return left

    def _first(self, candidates: Sequence[Candidate], batches: int) -> list[Trial]:
        """Trials of the first rung, without those that keep less than one of their line that lost too much."""
        trials, closed = [], set()
        for candidate in candidates:
            if candidate.line in closed:
                self._skipped.append(candidate)
                continue
            trials.append(self.tuning.trial(candidate, batches))
            if candidate.line and trials[-1].least > self.max_drop / 100:
                closed.add(candidate.line)
        return trials

    def _staying(self, trials: list[Trial], rung: int, last: bool) -> list[Trial]:
        budget, inside, staying = self.max_drop / 100, 0, []
        for trial in trials:  # from the cheapest
            if trial.least > budget:
                self._leaves(trial, "too much", rung)
            elif inside >= SPARE:
                self._leaves(trial, "costlier", rung)
            else:
                inside += trial.drop.high <= budget
                staying.append(trial)
        if last:
            return staying
        most = max(LEAST, math.ceil(len(trials) / 2))
        ranked = [trial for front in fronts(staying, budget) for trial in front]
        for trial in ranked[most:]:
            self._leaves(trial, "behind", rung)
        return [trial for trial in staying if trial in ranked[:most]]

    def _best_default(self, left: Sequence[Trial]) -> Candidate | None:
        """The cheapest default that looks safe on all tuning questions."""
        known = [trial for trial in (*left, *self._gone) if trial.origin == "default" and trial.left != "too much"]
        for trial in sorted(known, key=lambda trial: (trial.cost, trial.recipe)):
            candidate = Candidate(trial.recipe, trial.origin)
            if self.tuning.trial(candidate).reach <= self.max_drop / 100:
                return candidate
        return None

    def _leaves(self, trial: Trial, why: str, rung: int) -> None:
        self._gone.append(replace(trial, left=why, rung=rung))

    def _confirm(self, left: Sequence[Trial]) -> tuple[list[Trial], Trial | None]:
        """The finalists on the held-out questions, in order, and the winner among them."""
        tried, winner = [], None
        for trial in finalists(left, self.max_drop / 100):
            tried.append(self.held_out.trial(Candidate(trial.recipe, trial.origin)))
            if tried[-1].drop.high > self.max_drop / 100:
                break
            winner = tried[-1]
        return tried, winner


def check_budget(max_drop: float) -> None:
    """Refuse what is no number of points.

    Raises:
        UsageError: it is not between 0 and 100.
    """
    if not 0 < max_drop < 100:
        raise UsageError(
            f"--max-drop is a loss in points, between 0 and 100, found {max_drop:g}: 1 is one of a hundred answers."
        )


def rungs(batches: int) -> list[int]:
    """How many batches are asked in each rung: doubled up to all."""
    return sorted({max(1, math.ceil(batches / 2**step)) for step in range(RUNGS)})


def fronts(trials: Iterable[Trial], budget: float) -> list[list[Trial]]:
    """Trials in Pareto fronts: in the first nobody has another one that costs less and reaches less far above the budget."""
    left, found = list(trials), []

    def point(trial: Trial) -> tuple[float, float]:
        return trial.cost, max(trial.reach - budget, 0.0)

    while left:
        front: list[Trial] = []
        for trial in sorted(left, key=point):
            if not front or point(trial)[1] < point(front[-1])[1]:
                front.append(trial)
        found.append(front)
        left = [trial for trial in left if trial not in front]
    return found


def finalists(left: Sequence[Trial], budget: float) -> list[Trial]:
    """Who is confirmed, from the costliest to the cheapest.

    Up to `SPARE` cheapest that look safe (their `reach` is within the budget), and the costliest one below them whose drop is.
    If none looks safe: up to `SPARE` whose drop is within the budget, those that reach least above it.
    """
    inside = [trial for trial in left if trial.reach <= budget][:SPARE]
    likely = [trial for trial in left if trial.drop.value <= budget and trial not in inside]
    if inside:
        chosen = [*[trial for trial in likely if trial.cost < inside[0].cost][-1:], *inside]
    else:
        chosen = sorted(likely, key=lambda trial: (trial.reach, trial.cost))[:SPARE]
    return sorted(chosen, key=lambda trial: (-trial.cost, trial.recipe))
