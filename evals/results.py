"""What a command measured, and its one way out: JSON, Markdown, a figure and the terminal.

Every command builds its `Result` from plain data alone, so that the Markdown of a stored JSON file can be written again.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmprune.evals.files import written_whole
from vlmprune.loading.environment import environment
from vlmprune.show.table import markdown, show

Part = Table | tuple[Table, ...] | str | list[str]
"""A table, or a table and others for a narrower terminal; a paragraph; or sentences of which each is an item of a list."""


def stamp(command: str = "") -> dict[str, Any]:
    """When, by which command and with which versions something is measured: the first entries of a result's numbers.

    Args:
        command: what to type to get the same again. Default: the running `vlmprune` command.
    """
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command or shlex.join(["vlmprune", *sys.argv[1:]]),
        "environment": environment(),
    }


@dataclass(frozen=True)
class Result:
    """The numbers of one command, and how they are shown.

    Attributes:
        numbers: plain data: everything that was measured, `stamp` included.
        parts: tables, paragraphs and lists of sentences, in the order in which they are read.
        screen: what a terminal shows instead of `parts`, where that is less.
        draw: draws the figure into a file.
        indent: spaces per level of the JSON file; None is one line, for long lists of numbers.
    """

    numbers: Mapping[str, Any]
    parts: Sequence[Part]
    screen: Sequence[Part] | None = None
    draw: Callable[[Path], None] | None = None
    indent: int | None = 1

    def json(self, indent: int | None = 2) -> str:
        """The numbers as JSON."""
        return json.dumps(self.numbers, indent=indent)

    def markdown(self) -> str:
        """The parts as Markdown, with date, command and versions in the last line where the numbers have them."""
        blocks = [_markdown(part) for part in self.parts if part]
        return "\n\n".join([*blocks, *stamped(self.numbers)])

    def write(self, stem: Path) -> None:
        """Write `stem`.json, `stem`.md and, if there is a figure, `stem`.png; the folder must exist.

        Raises:
            UsageError: a file cannot be written, for example because the disk is full; one of an earlier run is still there.
        """
        for ending, text in (("json", self.json(self.indent)), ("md", self.markdown())):
            with written_whole(stem.with_name(f"{stem.name}.{ending}")) as draft:
                draft.write_text(text + "\n")
        if self.draw is not None:
            with written_whole(stem.with_name(f"{stem.name}.png")) as draft:
                self.draw(draft)

    def show(self, console: Console) -> None:
        """Print the parts."""
        for part in filter(None, self.parts if self.screen is None else self.screen):
            if isinstance(part, Table | tuple):
                wide, *narrower = part if isinstance(part, tuple) else (part,)
                show(wide, console, *narrower)
            else:
                for line in part if isinstance(part, list) else [part]:
                    console.print(line, markup=False, highlight=False)

    def deliver(self, console: Console, stem: Path | None = None, as_json: bool = False) -> None:
        """Write the files if a `stem` is given; then print the numbers as JSON, or show them."""
        if stem is not None:
            self.write(stem)
        if as_json:
            print(self.json())
        else:
            self.show(console)


def _markdown(part: Part) -> str:
    if isinstance(part, Table | tuple):
        return markdown(part[0] if isinstance(part, tuple) else part)
    return part if isinstance(part, str) else "\n".join(f"- {sentence}" for sentence in part)


def stamped(numbers: Mapping[str, Any]) -> list[str]:
    """Date, command and versions as one sentence; nothing if the numbers have no date."""
    if "date" not in numbers:
        return []
    versions, command = numbers["environment"], numbers.get("command")
    threads = f"{versions['threads']} thread{'s' if versions['threads'] > 1 else ''}"
    machine = threads if versions["gpu"] == "none" else f"{threads}, {versions['gpu']}"
    parts = [numbers["date"], *([f"`{command}`"] if command else [])]
    return [f"{', '.join(parts)}, torch {versions['torch']}, transformers {versions['transformers']}, {machine}."]
