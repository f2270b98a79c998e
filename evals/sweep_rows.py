"""The numbers of a sweep: accuracy at every point, and the paired difference to random tokens at the same layers and counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vlmprune.evals.accuracy import UNPRUNED, estimate_from_dict
from vlmprune.evals.answers import Scored
from vlmprune.evals.stats import Difference, Estimate, Key, correct, differences_of_many, estimate, estimate_by_group
from vlmprune.evals.sweep_plan import CONTROL, Plan, Point


@dataclass(frozen=True)
class IntervalOnly(Difference):
    """A difference of a file from before there were p-values, which says by its interval alone whether it is one."""

    @property
    def verdict(self) -> str:
        return "beats" if self.low > 0 else "loses" if self.high < 0 else "ties"


def difference_from_dict(data: Mapping[str, Any]) -> Difference:
    """A difference from its plain data, as `sweep.json` holds it."""
    entries = {key: value for key, value in data.items() if key != "verdict"}
    if "p" in entries:
        return Difference(**entries)
    nan = float("nan")
    return IntervalOnly(**entries, p=nan, n=0, units=0, source="bootstrap", corrected=nan)


@dataclass(frozen=True)
class Row:
    """The result at one point, all seeds together.

    Attributes:
        point: what was run; None for the un-pruned model.
        recipe: with seed 0.
        by_skill: accuracy of every skill (group of questions) with its interval (images resampled).
        mean: unweighted mean over skills, with `interval`.
        over_random: "mean" and every skill -> difference to random tokens at the same layers and counts; empty for random.
            P-values are corrected for all points: those of the mean among themselves, and those of all skills.
        share: measured compute average, as a share of all visual tokens.
        loyalty: share of answers equal to those of the un-pruned model.
        seconds: per seed.
    """

    point: Point | None
    recipe: str
    by_skill: dict[str, Estimate]
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
        over = {key: difference_from_dict(entry) for key, entry in data["over_random"].items()}
        return Row(
            point=point,
            recipe=data["recipe"],
            by_skill={skill: estimate_from_dict(entry) for skill, entry in data["by_skill"].items()},
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


def compare(plan: Plan, scored: Callable[[Point | None], tuple[str, Scored]]) -> Sweep:
    """All rows of a plan.

    Args:
        scored: the recipe of a point (None: of the un-pruned model) and its answers, all seeds together.
    """
    compared = [point for point in plan.points if point.method != CONTROL]
    found = differences({point: (scored(point)[1], scored(point.control())[1]) for point in compared})
    means = correct({point: mean for point, (mean, _) in found.items()})
    skills = correct({(point, skill): one for point, (_, own) in found.items() for skill, one in own.items()})

    def row(point: Point | None) -> Row:
        recipe, given = scored(point)
        against: dict[str, Difference] = {}
        if point in found:
            against = {"mean": means[point], **{skill: skills[point, skill] for skill in found[point][1]}}
        mean = estimate(given.score, given.unit, given.group)
        return Row(
            point=point,
            recipe=recipe,
            by_skill=estimate_by_group(given.score, given.unit, given.group),
            mean=mean.value,
            interval=(mean.low, mean.high),
            over_random=against,
            share=given.share,
            loyalty=float(given.loyal.mean()),
            seconds=given.seconds,
        )

    return Sweep(plan, row(None), [row(point) for point in plan.points], [row(point) for point in plan.controls()])


def differences(pairs: Mapping[Key, tuple[Scored, Scored]]) -> dict[Key, tuple[Difference, dict[str, Difference]]]:
    """Of each pair, scores minus those of the control on the same questions: of the mean over skills, and of every skill."""
    if not pairs:
        return {}
    questions = next(iter(pairs.values()))[0]
    scores = {key: (ours.score, theirs.score) for key, (ours, theirs) in pairs.items()}
    return differences_of_many(scores, questions.unit, questions.group)
