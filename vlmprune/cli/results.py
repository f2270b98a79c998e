"""The result of a study, and its way out: to the terminal, as JSON, and into a folder as numbers, table and figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.cli import terminal

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Found:
    """What a study found.

    Attributes:
        name: of its files, without the ending.
        numbers: everything, for programs.
        table: for people, in a terminal.
        sentences: printed below the table.
        markdown: the content of the file for people.
        plot: draws the figure into a file.
    """

    name: str
    numbers: dict[str, Any]
    table: Table
    sentences: Sequence[str]
    markdown: str
    plot: Callable[[Path], None]


def prepare(out: Path | None) -> None:
    """Before anything is computed: make the folder for results, and check that the figure can be drawn.

    Raises:
        UsageError: the folder cannot be made or written to, or matplotlib is missing.
    """
    from vlmprune.loading.outputs import check_packages, make_folder

    if out is not None:
        check_packages(["matplotlib"])
        make_folder(out)


def publish(found: Found, out: Path | None, as_json: bool) -> None:
    """Write the files, if a folder was given, then print."""
    if out is not None:
        (out / f"{found.name}.json").write_text(json.dumps(found.numbers, indent=1) + "\n")
        (out / f"{found.name}.md").write_text(found.markdown + "\n")
        found.plot(out / f"{found.name}.png")
    if as_json:
        terminal.print_json(found.numbers)
        return
    terminal.print_table(found.table)
    terminal.say(*found.sentences)
