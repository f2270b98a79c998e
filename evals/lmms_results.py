"""What a run of lmms-eval wrote: scores by task, and the columns of all samples from all processes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError
from vlmprune.evals.lmms_columns import mean_columns
from vlmprune.evals.results import Result
from vlmprune.evals.stats import Difference, difference
from vlmprune.show.table import code, table

SHOWN = (
    ("ttft_ms", "TTFT ms", "{:.0f}"),
    ("tpot_ms", "TPOT ms", "{:.1f}"),
    ("prefill_ms", "prefill ms", "{:.0f}"),
    ("visual_tokens", "visual tokens", "{:.0f}"),
    ("kept_tokens", "kept", "{:.0f}"),
    ("kept_entering_layers", "enter a layer", "{:.1f}"),
    ("kept_leaving_layers", "leave a layer", "{:.1f}"),
    ("selection_share_of_ttft", "selection", "{:.1%}"),
    ("prefill_gflops", "prefill GFLOPs", "{:.4g}"),
    ("kv_mib", "KV MiB", "{:.4g}"),
)
"""What the second table shows: key in `evals/lmms_columns.py`, heading, format."""


@dataclass(frozen=True)
class Sample:
    """One document.

    Attributes:
        number: of the document in its task; samples of several processes come in the order of processes.
        answer: what was given: a text, a text for each round, or the number of the likeliest choice.
        columns: of all requests of the document.
        unit: what it is about, as far as the task says so (`picture`); else its number.
        scores: by metric, where the task gives this one answer a score.
    """

    number: int
    answer: Any
    columns: tuple[Mapping[str, float], ...]
    unit: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """One run.

    Attributes:
        recipe: as given.
        file: lmms-eval's results.
        scores: by task, lmms-eval's metrics.
        samples: by task, in the order of the documents.
    """

    recipe: str
    file: Path
    scores: dict[str, dict[str, float]]
    samples: dict[str, list[Sample]]

    def columns(self, task: str) -> dict[str, float]:
        """The mean of every column over the samples of a task."""
        return mean_columns([own for sample in self.samples[task] for own in sample.columns])

    def same(self, other: Finished, task: str) -> float:
        """Share of the documents with the same answer in another run."""
        theirs = {sample.number: sample.answer for sample in other.samples[task]}
        return sum(theirs.get(own.number) == own.answer for own in self.samples[task]) / len(self.samples[task])

    def differences(self, other: Finished, task: str) -> dict[str, Difference]:
        """Scores minus those of another run on the same documents, for every metric that is a mean of scores from 0 to 1.

        Where a task gives several metrics the same scores (precision, F1), only the first is such a mean.
        """
        found: dict[str, Difference] = {}
        seen: list[list[tuple[int, float]]] = []
        for metric, value in self.scores[task].items():
            scored = [
                (own, one)
                for own, one in zip(self.samples[task], other.samples[task], strict=True)
                if metric in own.scores and metric in one.scores
            ]
            ours, theirs = (
                ([sample.scores[metric] for sample in side] for side in zip(*scored, strict=True)) if scored else ([], [])
            )
            given = [(own.number, own.scores[metric]) for own, _ in scored]
            is_mean = bool(ours) and abs(sum(ours) / len(ours) - value) < 1e-9
            if is_mean and given not in seen and all(0 <= score <= 1 for score in (*ours, *theirs)):
                seen.append(given)
                found[metric] = difference(ours, theirs, [own.unit for own, _ in scored])
        return found


def read_finished(recipe: str, file: Path, tasks: Sequence[str]) -> Finished:
    """The run of a results file.

    Raises:
        UsageError: it lacks a task, or samples of a task are missing or double.
    """
    results = json.loads(file.read_text(encoding="utf-8"))
    samples = {}
    for task in tasks:
        path = file.with_name(file.name.replace("_results.json", f"_samples_{task}.jsonl"))
        if task not in results["results"] or not path.exists():
            raise UsageError(
                f"{file} is not complete: it has no results or no samples of {task}; look into the log beside its folder."
            )
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples[task] = sorted((_sample(row) for row in rows), key=lambda sample: sample.number)
        often = Counter(sample.number for sample in samples[task])  # a task with several filters has a sample for each
        wanted = results["n-samples"][task]["effective"]
        if len(often) != wanted or len(set(often.values())) > 1:
            raise UsageError(f"{path} has {often.total()} samples about {len(often)} documents, and {wanted} were to be asked.")
        samples[task] = list({sample.number: sample for sample in reversed(samples[task])}.values())[::-1]
    return Finished(recipe, file, {task: _scores(results["results"][task]) for task in tasks}, samples)


def _sample(row: Mapping[str, Any]) -> Sample:
    columns = tuple(counts for counts in row["token_counts"] if counts)
    scores, unit = {}, row["doc_id"]
    for name, value in row.items():
        if isinstance(value, dict) and isinstance(value.get("score"), int | float):
            scores[name], unit = float(value["score"]), value.get("picture", unit)
        elif isinstance(value, int | float) and name != "doc_id":
            scores[name] = float(value)
    return Sample(row["doc_id"], _answer(row["filtered_resps"]), columns, unit, scores)


def _answer(found: Any) -> Any:
    """The answer in a samples file, which has all numbers as texts: of several judged answers, the one with the least loss."""
    judged = isinstance(found, list) and len(found) > 1 and all(isinstance(one, list) and len(one) == 2 for one in found)
    return min(range(len(found)), key=lambda number: float(found[number][0])) if judged else found


def _scores(found: Mapping[str, Any]) -> dict[str, float]:
    """Metrics without their standard errors; the name of the filter is left out where there is none."""
    scores = {}
    for key, value in found.items():
        name, _, filtered = key.partition(",")
        if isinstance(value, int | float) and "_stderr" not in name:
            scores[name if filtered in ("", "none") else key] = float(value)
    return scores


def numbers_of(runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """A row for each run and task, as plain data."""
    first = runs[0]
    return [
        {
            "recipe": run.recipe,
            "task": task,
            "documents": len(run.samples[task]),
            "scores": scores,
            "columns": run.columns(task),
            "same": run.same(first, task),
            "against": {} if run is first else {name: one.to_dict() for name, one in run.differences(first, task).items()},
            "file": str(run.file),
        }
        for run in runs
        for task, scores in run.scores.items()
    ]


def result(numbers: Mapping[str, Any]) -> Result:
    """Two tables with a column for each recipe: scores, and costs.

    Args:
        numbers: `rows` as `numbers_of` gives them, with `model`, `batch`, and with `results.stamp()`.
    """
    rows = numbers["rows"]
    recipes, tasks = ([*dict.fromkeys(row[key] for row in rows)] for key in ("recipe", "task"))
    found = {(row["task"], row["recipe"]): row for row in rows}
    scores, costs, narrow = [], [], []
    for task in tasks:
        beside = [found[task, recipe] for recipe in recipes]
        for metric in beside[0]["scores"]:
            scores.append([task, metric, *(_form("{:.4g}", row["scores"], metric) for row in beside)])
            if any(metric in row["against"] for row in beside):
                scores.append(
                    [task, f"{metric}, points more than {recipes[0]}", *(_points(row["against"], metric) for row in beside)]
                )
        if len(recipes) > 1:
            scores.append([task, f"same answer as {recipes[0]}, %", *(f"{100 * row['same']:.1f}" for row in beside)])
        scores.append([task, "documents", *(str(row["documents"]) for row in beside)])
        for recipe, row in zip(recipes, beside, strict=True):
            costs.append([task, code(recipe), *(_form(form, row["columns"], name) for name, _, form in SHOWN)])
        for name, heading, form in SHOWN:
            narrow.append([task, heading, *(_form(form, row["columns"], name) for row in beside)])
    title = f"{numbers['model']}, batch {numbers['batch']}"
    means = f"{title}, means over samples"
    compared = (
        f"Points more than {recipes[0]}: on the same documents, with 95 % intervals over pictures where a task names them, "
        "else over documents; not corrected for many tests."
    )
    wide = table(["task", "recipe", *(heading for _, heading, _ in SHOWN)], costs, title=means, text_columns=2)
    return Result(
        numbers,
        [
            table(["task", "metric", *recipes], scores, title=title, text_columns=2),
            (wide, table(["task", "", *recipes], narrow, title=means, text_columns=2)),
            [
                "Times are those of a whole batch. Recipes run one after the other: `vlmprune bench` compares speed.",
                *([compared] if len(recipes) > 1 else []),
                "GFLOPs and KV cache are a sample's share of its batch, padding included.",
            ],
        ],
    )


def _points(against: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """A difference in points with its interval; a dash where there is none."""
    if metric not in against:
        return "—"
    found = against[metric]
    return f"{100 * found['value']:+.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _form(form: str, values: Mapping[str, float], name: str) -> str:
    return form.format(values[name]) if name in values else "—"
