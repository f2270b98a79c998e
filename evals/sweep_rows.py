"""The numbers of a sweep: accuracy at every point, and the paired difference to random tokens at the same layers and counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlmprune.evals.accuracy import UNPRUNED, draws_by_skill, loyalty, percent
from vlmprune.evals.sweep_plan import CONTROL, Plan, Point
from vlmprune.evals.sweep_store import Answers
from vlmprune.show.stats import interval, mean_of_present
from vlmprune.tiny.answers import Accuracy, Record, accuracy_by_skill, mean_over_skills


@dataclass(frozen=True)
class Difference:
    """Accuracy minus that of the random row of the same schedule, with the paired 95 % interval; shares of 1."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Beats, loses, or ties where the interval holds zero."""
        return "beats" if self.low > 0 else "loses" if self.high < 0 else "ties"

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} {percent((self.low, self.high))}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the verdict among it."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Row:
    """The result at one point, all seeds together.

    Attributes:
        point: what was run; None for the un-pruned model.
        recipe: with seed 0.
        by_skill: accuracy of every skill with its interval (images resampled).
        mean: unweighted mean over skills, with `interval`.
        over_random: "mean" and every skill -> difference to random tokens at the same layers and counts; empty for random.
        share: measured compute average, as a share of all visual tokens.
        loyalty: share of answers equal to those of the un-pruned model.
        seconds: per seed.
    """

    point: Point | None
    recipe: str
    by_skill: dict[str, Accuracy]
    mean: float
    interval: tuple[float, float]
    over_random: dict[str, Difference]
    share: float
    loyalty: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the point's fields beside the others."""
        point = {"method": UNPRUNED} if self.point is None else asdict(self.point)
        entry = {key: value for key, value in asdict(self).items() if key not in ("point", "over_random")}
        return {**point, **entry, "over_random": {key: value.to_dict() for key, value in self.over_random.items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Row:
        """A row from its plain data."""
        point = None
        if data["method"] != UNPRUNED:
            point = Point(data["method"], data["budget"], tuple(data["layers"]), tuple(data["fractions"]))
        over = {key: Difference(d["value"], d["low"], d["high"]) for key, d in data["over_random"].items()}
        return Row(
            point=point,
            recipe=data["recipe"],
            by_skill={skill: Accuracy(**entry) for skill, entry in data["by_skill"].items()},
            mean=data["mean"],
            interval=(data["interval"][0], data["interval"][1]),
            over_random=over,
            share=data["share"],
            loyalty=data["loyalty"],
            seconds=data["seconds"],
        )


@dataclass(frozen=True)
class Sweep:
    """All rows: the un-pruned model, every method, and random at every schedule that some method uses."""

    plan: Plan
    unpruned: Row
    methods: list[Row]
    controls: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "unpruned": self.unpruned.to_dict(),
            "rows": [row.to_dict() for row in self.methods],
            "controls": [row.to_dict() for row in self.controls],
            "unreachable": [
                dict(zip(("method", "budget", "lowest", "highest"), entry, strict=True)) for entry in self.plan.unreachable
            ],
            "refused": self.plan.refused,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Sweep:
        """A sweep from its plain data, as `sweep.json` holds it."""
        methods = [Row.from_dict(row) for row in data["rows"]]
        unreachable = [(u["method"], u["budget"], u["lowest"], u["highest"]) for u in data["unreachable"]]
        plan = Plan([row.point for row in methods if row.point], unreachable, dict(data["refused"]))
        return Sweep(plan, Row.from_dict(data["unpruned"]), methods, [Row.from_dict(row) for row in data["controls"]])


def compare(plan: Plan, pooled: Callable[[Point | None], tuple[list[Record], list[Answers]]]) -> Sweep:
    """All rows of a plan.

    Args:
        pooled: the records of a point (None: of the un-pruned model), all seeds together, and what they were read from.
    """
    reference, _ = pooled(None)

    def row(point: Point | None) -> Row:
        given, answers = pooled(point)
        by_skill, draws = accuracy_by_skill(given), draws_by_skill(given)
        against: dict[str, Difference] = {}
        if point is not None and point.method != CONTROL:
            against = differences(given, pooled(point.control())[0])
        return Row(
            point=point,
            recipe=answers[0].recipe,
            by_skill=by_skill,
            mean=mean_over_skills(by_skill),
            interval=interval(mean_of_present(draws)),
            over_random=against,
            share=sum(answer.share for answer in answers) / len(answers),
            loyalty=loyalty(given, reference),
            seconds=sum(answer.seconds for answer in answers) / len(answers),
        )

    return Sweep(plan, row(None), [row(point) for point in plan.points], [row(point) for point in plan.controls()])


def differences(given: Sequence[Record], control: Sequence[Record]) -> dict[str, Difference]:
    """Accuracy on the mean over skills and on every skill, minus the control's on the same questions."""
    ours, theirs = accuracy_by_skill(given), accuracy_by_skill(control)
    drawn = draws_by_skill(given) - draws_by_skill(control)
    found = {"mean": Difference(mean_over_skills(ours) - mean_over_skills(theirs), *interval(mean_of_present(drawn)))}
    for column, skill in enumerate(ours):
        found[skill] = Difference(ours[skill].value - theirs[skill].value, *interval(drawn[:, column]))
    return found
