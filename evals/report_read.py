"""What commands left in a folder, recognised by what the files hold, and refused where it does not belong together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError, first_line, shown
from vlmprune.evals.report_parts import listed

FORMAT = "vlmprune report"
KEPT = "vlmprune kept pictures"
"""The values of "format" in files that reports write and read themselves."""
COMMANDS = "eval, sweep, bench, lmms, horizon, tune and power"


@dataclass(frozen=True)
class Source:
    """One file of results.

    Attributes:
        path: of the file.
        kind: one of `KINDS`.
        numbers: what it holds.
    """

    path: Path
    kind: str
    numbers: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name


@contextmanager
def shown_from(source: Source) -> Iterator[None]:
    """While the numbers of a file are read.

    Raises:
        UsageError: it lacks some, or has others: it is of another version, or was edited.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise UsageError(
            f"cannot show {source.path} ({why}): another version of vlmprune wrote it, or it was edited; write it again, or "
            "move it out of the folder."
        ) from error


def _first(numbers: Mapping[str, Any]) -> Mapping[str, Any]:
    rows = numbers.get("rows")
    return rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}


KINDS = {
    "report": lambda numbers: numbers.get("format") == FORMAT,
    "kept": lambda numbers: numbers.get("format") == KEPT,
    "sweep": lambda numbers: {"unpruned", "rows", "controls"} <= set(numbers),
    "accuracy": lambda numbers: {"recipe", "by_skill", "mean"} <= set(_first(numbers)),
    "bench": lambda numbers: "title" in numbers and {"recipe", "times", "faster"} <= set(_first(numbers)),
    "horizon": lambda numbers: {"metric", "proxy", "layers", "samples"} <= set(numbers),
    "tune": lambda numbers: {"histogram", "peaks", "recipe"} <= set(numbers),
    "recipe": lambda numbers: {"schema", "methods"} <= set(numbers),
    "lmms": lambda numbers: {"recipe", "task", "scores", "columns"} <= set(_first(numbers)),
    "lmms-eval": lambda numbers: {"results", "configs"} <= set(numbers),
    "power": lambda numbers: {"power", "alpha", "comparisons", "rows"} <= set(numbers),
    "max_drop": lambda numbers: {"max_drop", "trials", "finalists", "winner"} <= set(numbers),
}
"""How each kind of file is recognised."""
SHOWN = ("sweep", "accuracy", "bench", "horizon", "tune", "lmms", "lmms-eval", "power", "max_drop")
"""Kinds that are results."""
SETTINGS = "settings.json"
"""Settings of the answers beside it."""


def read(folder: Path) -> tuple[list[Source], list[str]]:
    """The results of a folder, and a sentence for each file that is none.

    Raises:
        UsageError: there is no such folder, it has no results, one cannot be read, or they do not belong together.
    """
    if not folder.is_dir():
        what = "it is a file" if folder.exists() else "there is no such folder"
        raise UsageError(f"cannot report {folder} ({what}): give a folder that `--out` of {COMMANDS} wrote.")
    sources, unknown = [], []
    for path in sorted({*folder.glob("*.json"), *folder.rglob("*_results.json")}):
        if path.name == SETTINGS:
            continue
        numbers = _parsed(path)
        kind = _kind(numbers)
        if kind is None:
            unknown.append(path)
        elif kind != "report":
            sources.append(Source(path, kind, numbers))
    if not any(source.kind in SHOWN for source in sources):
        raise UsageError(_nothing(folder, sources, unknown))
    _check_together(folder, sources)
    if any(source.kind == "lmms" for source in sources):  # it sums up the files that lmms-eval wrote
        sources = [source for source in sources if source.kind != "lmms-eval"]
    return sources, [f"{path} is left out: it is no result of {COMMANDS}." for path in unknown]


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise UsageError(
            f"cannot read {path} ({why}): run the command that writes it again, or move the file out of the folder."
        ) from error


def _kind(numbers: Any) -> str | None:
    if not isinstance(numbers, dict):
        return None
    return next((kind for kind, matches in KINDS.items() if matches(numbers)), None)


def _nothing(folder: Path, sources: list[Source], unknown: list[Path]) -> str:
    """Why there is nothing to report."""
    if any(path.name != "questions.jsonl" for path in folder.rglob("*.jsonl")):
        return f"{folder} has answers but no result yet: finish with the command that began it, `--out {folder}`."
    if unknown:
        names = f"{listed(path.name for path in unknown)} {'are' if len(unknown) > 1 else 'is'}"
        return f"{folder} has no results: {names} no result of {COMMANDS}; give a folder that their `--out` wrote."
    if sources:
        names = listed(source.name for source in sources)
        return f"{folder} has no results, only {names}: give a folder that `--out` of {COMMANDS} wrote."
    return f"{folder} has no results (no JSON file): give a folder that `--out` of {COMMANDS} wrote."


def _check_together(folder: Path, sources: list[Source]) -> None:
    """Refuse results of different models, and accuracies on different questions, which no table should show together."""
    _check_lmms(folder, sources)
    for what, default, kinds in (
        ("model", "tiny", ("sweep", "accuracy", "horizon", "tune")),
        ("data", "scenes", ("sweep", "accuracy")),
        ("split", "test", ("sweep", "accuracy")),
    ):
        found = {source.name: str(source.numbers.get(what, default)) for source in sources if source.kind in kinds}
        if len(set(found.values())) > 1:
            (one, first), (other, second) = next((a, b) for a in found.items() for b in found.items() if a[1] != b[1])
            raise UsageError(
                f"{folder} mixes settings: {what} is {shown(first)} in {one} and {shown(second)} in {other}: put them into "
                "folders of their own."
            )


def _check_lmms(folder: Path, sources: list[Source]) -> None:
    """Refuse results of lmms-eval on different models."""
    models = {source.name: pretrained(source.numbers) for source in sources if source.kind == "lmms-eval"}
    if len(set(models.values())) > 1:
        (one, first), *_ = models.items()
        other, second = next((name, model) for name, model in models.items() if model != first)
        raise UsageError(
            f"{folder} mixes settings: the model is {shown(first)} in {one} and {shown(second)} in {other}: put them into "
            "folders of their own."
        )


def pretrained(numbers: Mapping[str, Any]) -> str:
    """The model of a result of lmms-eval."""
    found = re.search(r"pretrained=([^,]+)", arguments(numbers))
    return found[1] if found else ""


def arguments(numbers: Mapping[str, Any]) -> str:
    """What a result of lmms-eval says about `--model_args`."""
    given = numbers.get("config", {}).get("model_args") or ""
    return ",".join(f"{name}={value}" for name, value in given.items()) if isinstance(given, dict) else str(given)
