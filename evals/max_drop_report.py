"""The search for the cheapest recipe for people: sentences, tables and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from vlmprune.evals.results import Result
from vlmprune.show.table import code, table

Trial = Mapping[str, Any]
"""`Trial.to_dict()`."""


def result(numbers: Mapping[str, Any]) -> Result:
    """The result of a search.

    Args:
        numbers: `Found.to_dict()`, with `questions` (of "tuning" and "held-out": `units` and `questions`), `horizon`,
            `notes`, and with `results.stamp()`.
    """
    confirmed = [*numbers["finalists"], *([numbers["best_default"]] if numbers["best_default"] else [])]
    held, tuning = numbers["questions"]["held-out"], numbers["questions"]["tuning"]
    said = sentences(numbers)
    shown: list[Any] = [said]
    if confirmed:
        shown.append(_held_out(numbers, f"held-out: {held['questions']} questions about {held['units']} pictures"))
    parts = [*shown]
    parts.append(
        f"All candidates on the tuning questions ({tuning['questions']} about {tuning['units']} pictures, the un-pruned model "
        f"{100 * numbers['unpruned']['tuning']:.1f} %), as far as they were asked:"
    )
    parts.append(_tuning(numbers))
    return Result({**numbers, "summary": said}, parts, shown, partial(plot, numbers))


def sentences(numbers: Mapping[str, Any]) -> list[str]:
    """What was found, how sure it is, and whether it was worth the search."""
    said = [*_outcome(numbers), *_against_default(numbers)]
    said.append(
        f"{len(numbers['trials'])} candidates were asked; {len(numbers['skipped'])} more keep still less than one with the "
        "same layers that lost too much."
    )
    if numbers["horizon"] is not None:
        said.append(f"By the information horizon, no visual token is needed from layer {numbers['horizon']} on.")
    return said + list(numbers["notes"])


def _outcome(numbers: Mapping[str, Any]) -> list[str]:
    budget, held = f"{numbers['max_drop']:g}", numbers["questions"]["held-out"]
    winner, finalists = numbers["winner"], numbers["finalists"]
    if winner:
        return [
            f"`{winner['recipe']}` loses {points(winner)} points on {held['units']} held-out pictures ({held['questions']} "
            f"questions), within the budget of {budget}: {100 * winner['cost']:.1f} % of the visual tokens enter a decoder "
            f"layer on average, and the language model's prefill takes {100 * winner['flops']:.1f} % of the FLOPs."
        ]
    if finalists:
        first = finalists[0]
        return [
            f"No recipe was confirmed within {budget} points: `{first['recipe']}`, the surest on the tuning questions, loses "
            f"{points(first)} points on {held['units']} held-out pictures. Ask more questions or allow a larger drop; no "
            "recipe is written."
        ]
    closest = min(numbers["trials"], key=lambda trial: (trial["drop"]["value"], trial["cost"]))
    return [
        f"No candidate stays within {budget} points on the tuning questions: `{closest['recipe']}` comes closest and loses "
        f"{points(closest)}. No recipe is written."
    ]


def _against_default(numbers: Mapping[str, Any]) -> list[str]:
    winner, best = numbers["winner"], numbers["best_default"]
    if best is None:
        return ["No method as it is published looks safe on the tuning questions."] if winner else []
    name = f"`{best['recipe']}`, the best single default"
    cost = f"it loses {points(best)} points at {100 * best['cost']:.1f} % of the visual tokens"
    if best["drop"]["high"] > numbers["max_drop"] / 100:
        cost += ", which is not confirmed to be within the budget"
    if winner is None:
        return [f"{name}: {cost}."]
    if winner["recipe"] == best["recipe"]:
        return ["This is a method as it is published: no cheaper recipe was confirmed within the budget."]
    gain = numbers["gain"]
    paired = f"their accuracy differs by {100 * gain['value']:+.1f} {_ends(gain)} points on the same questions"
    if winner["cost"] < best["cost"]:
        return [f"{name}: {cost}. The recipe costs {winner['cost'] / best['cost']:.2f} times as much; {paired}."]
    return [f"{name}: {cost}. The recipe is not cheaper; {paired}."]


def points(trial: Trial) -> str:
    """A drop in points with its interval."""
    return f"{100 * trial['drop']['value']:.1f} {_ends(trial['drop'])}"


def _ends(interval: Mapping[str, Any]) -> str:
    return f"[{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _held_out(numbers: Mapping[str, Any], title: str) -> Table:
    """Finalists in the order in which they were tried, and the best default."""
    winner, budget = numbers["winner"], numbers["max_drop"] / 100
    rows = []
    for trial in numbers["finalists"]:
        won = winner is not None and trial["recipe"] == winner["recipe"]
        verdict = "winner" if won else "within" if trial["drop"]["high"] <= budget else "not confirmed"
        rows.append([code(trial["recipe"]), trial["origin"], *_measured(trial), verdict])
    best = numbers["best_default"]
    if best and best["recipe"] not in [trial["recipe"] for trial in numbers["finalists"]]:
        verdict = "within" if best["drop"]["high"] <= budget else "not confirmed"
        rows.append([code(best["recipe"]), "best default", *_measured(best), verdict])
    heads = ["recipe", "from", "points lost", "tokens entering a layer, %", "FLOPs, %", "verdict"]
    return table(heads, rows, text_columns=2, title=title)


def _tuning(numbers: Mapping[str, Any]) -> Table:
    rows = []
    for trial in numbers["trials"]:
        left = f"{trial['left']}, rung {trial['rung']}" if trial["left"] else "stays"
        rows.append([code(trial["recipe"]), trial["origin"], *_measured(trial), f"{trial['drop']['units']}", left])
    heads = ["recipe", "from", "points lost", "tokens entering a layer, %", "FLOPs, %", "pictures", "left"]
    return table(heads, rows, text_columns=2)


def _measured(trial: Trial) -> list[str]:
    return [points(trial), f"{100 * trial['cost']:.1f}", f"{100 * trial['flops']:.1f}"]


def plot(numbers: Mapping[str, Any], path: Path) -> None:
    """Points lost against cost: candidates on the tuning questions in grey, held-out ones with intervals, the budget dashed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    stayed = [trial for trial in numbers["trials"] if trial["left"] != "too much"]
    axes.plot(*_places(stayed), "o", color="0.7", markersize=4, label="tuning questions")
    axes.axhline(numbers["max_drop"], color="0.3", linewidth=1, linestyle="--", label="budget")
    _bars(axes, numbers["finalists"], "C0", "finalists, held-out questions")
    if numbers["best_default"]:
        _bars(axes, [numbers["best_default"]], "C1", "best single default, held-out questions")
    if numbers["winner"]:
        axes.plot(*_places([numbers["winner"]]), "o", markersize=11, markerfacecolor="none", color="C0", label="winner")
    axes.set(xlabel="visual tokens entering a decoder layer (%)", ylabel="points lost against un-pruned")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _places(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    return [100 * trial["cost"] for trial in trials], [100 * trial["drop"]["value"] for trial in trials]


def _bars(axes: Any, trials: Sequence[Trial], color: str, label: str) -> None:
    if not trials:
        return
    drops = [trial["drop"] for trial in trials]
    ends = [[100 * (d["value"] - d["low"]) for d in drops], [100 * (d["high"] - d["value"]) for d in drops]]
    axes.errorbar(*_places(trials), yerr=ends, fmt="o", color=color, markersize=4, capsize=2, label=label)
