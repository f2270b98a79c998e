"""What a comparison says in words: who beats random and who loses to it, and which averages hide that one group collapses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune.evals.report_lines import Comparison, Line
from vlmprune.evals.report_parts import listed, percent_of, shares

FARTHER, TIMES = 0.10, 2.0
"""A group collapses if it loses at least so much more than the mean, and at least so many times as much."""


@dataclass(frozen=True)
class Collapse:
    """A group that loses far more than the mean: `group_lost` and `mean_lost` are shares of 1."""

    line: Line
    group: str
    group_lost: float
    mean_lost: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "recipe": self.line.recipe,
            "group": self.group,
            "group_lost": self.group_lost,
            "mean_lost": self.mean_lost,
        }


def collapses(found: Comparison) -> list[Collapse]:
    """Groups whose loss the mean hides; random's are left out. The group's interval must not overlap with the un-pruned one."""
    seen = []
    for line in found.lines:
        mean = found.lost(line)
        for group in found.groups if not line.is_random else ():
            lost = found.lost(line, group)
            apart = line.groups[group].high < found.unpruned.groups[group].low
            if apart and lost - mean >= FARTHER and lost >= TIMES * mean:
                seen.append(Collapse(line, group, lost, mean))
    return seen


def collapse_sentences(found: Comparison) -> list[str]:
    """One sentence for each group that collapses somewhere, with its worst case."""
    seen, said = collapses(found), []
    points = sum(not line.is_random for line in found.lines)
    for group in found.groups:
        cases = [case for case in seen if case.group == group]
        if not cases:
            continue
        worst = max(cases, key=lambda case: case.group_lost - case.mean_lost)
        methods = listed(f"`{name}`" for name in dict.fromkeys(case.line.name for case in cases))
        said.append(
            f"The mean hides a loss in {group} at {len(cases)} of {points} points ({methods}). Worst: {worst.line.label}, "
            f"where the mean loses {100 * worst.mean_lost:.1f} points and {group} loses {100 * worst.group_lost:.1f}."
        )
    return said


def losing(found: Comparison) -> list[str]:
    """One sentence for each method that loses to random on the mean at some budget."""
    return [
        f"`{name}` loses to random tokens at the same layers and counts {_at(lines)}; worst: {_worst(lines)} points."
        for name, lines in by_verdict(found, "loses").items()
    ]


def _worst(lines: Sequence[Line]) -> str:
    """The largest loss to random, with its interval where the file has it."""
    line = min(lines, key=_over)
    return str(line.over_random["mean"]) if line.over_random else f"{100 * _over(line):+.1f}"


def by_verdict(found: Comparison, verdict: str) -> dict[str, list[Line]]:
    """The lines of every method on which the mean gets this verdict against random."""
    chosen = {name: [line for line in lines if verdict_of(line) == verdict] for name, lines in found.methods.items()}
    return {name: lines for name, lines in chosen.items() if lines}


def verdict_of(line: Line) -> str:
    """What the file says about the mean against random. Where it has no paired difference: by intervals that do not overlap."""
    if line.over_random:
        return line.over_random["mean"].verdict
    if line.random is None:
        return ""
    if line.mean.low > line.random.high:
        return "beats"
    return "loses" if line.mean.high < line.random.low else "ties"


def findings(found: Comparison) -> list[str]:
    """What the numbers say: against random, and the highest means."""
    return [*_against_random(found), *_highest(found)]


def _against_random(found: Comparison) -> list[str]:
    verdicts = [verdict for line in found.lines if (verdict := verdict_of(line))]
    if not verdicts:
        return []
    paired = any(line.over_random for line in found.lines)
    how = "paired differences" if paired else "intervals that do not overlap, because the file has no paired differences"
    count = {verdict: verdicts.count(verdict) for verdict in ("beats", "ties", "loses")}
    said = [
        f"Of {len(verdicts)} points (a method at a budget), {count['beats']} beat random tokens at the same layers and counts, "
        f"{count['ties']} tie and {count['loses']} lose, by {how}."
    ]
    if tied := by_verdict(found, "ties"):
        said.append(f"Ties with random: {'; '.join(f'`{name}` {_at(lines)}' for name, lines in tied.items())}.")
    return said


def _highest(found: Comparison) -> list[str]:
    """The highest mean at every budget, where budgets are costs, and who may be as good: those whose intervals overlap."""
    said = []
    for budget in found.budgets if found.equal_cost else []:
        lines = sorted((line for line in found.lines if line.budget == budget), key=lambda line: -line.mean.value)
        best, *others = lines
        if not others:
            continue
        near = [f"`{line.name}` {100 * line.mean.value:.1f}" for line in others if line.mean.high >= best.mean.low]
        also = f"; its interval overlaps with {'those' if len(near) > 1 else 'that'} of {listed(near)}" if near else ""
        said.append(f"Highest mean at {percent_of(budget)}: `{best.name}` {best.mean}{also}.")
    return said


def _at(lines: Sequence[Line]) -> str:
    budgets = [line.budget for line in lines if line.budget is not None]
    return f"at {shares(budgets)}" if budgets else "at its only budget"


def best_names(found: Comparison, most: int = 4) -> list[str]:
    """Methods with the highest mean at some budget, without random; those of the smallest budgets first."""
    names: dict[str, None] = {}
    for budget in reversed(found.budgets):
        lines = [line for line in found.lines if line.budget == budget and not line.is_random]
        if lines:
            names.setdefault(max(lines, key=lambda line: line.mean.value).name)
    return list(names)[:most]


def worst_names(found: Comparison, most: int = 2) -> list[str]:
    """Methods that lose to random somewhere, those that lose most first."""
    lost = by_verdict(found, "loses")

    def least(name: str) -> float:
        return min(_over(line) for line in lost[name])

    return sorted(lost, key=least)[:most]


def _over(line: Line) -> float:
    if line.over_random:
        return line.over_random["mean"].value
    return line.mean.value - (line.random.value if line.random else line.mean.value)
