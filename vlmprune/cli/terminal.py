"""What the commands print: tables and sentences to stdout, notes and progress to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vlmprune.show import table

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

console = Console()


def print_json(data: Any) -> None:
    """Print data for programs, and nothing else."""
    print(json.dumps(data, indent=2))


def print_table(made: Table) -> None:
    """Print a table that `show.table` made, in the form that fits the width of the terminal."""
    table.show(made, console)


def say(*sentences: str) -> None:
    """Print sentences as they are; long ones are wrapped."""
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False)


def say_unwrapped(line: str) -> None:
    """Print a line that is to be copied, without line breaks."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def note(sentences: Iterable[str]) -> None:
    """Print sentences that do not belong to the result, to stderr."""
    for sentence in sentences:
        print(f"vlmprune: note: {sentence}", file=sys.stderr)


def progress() -> Progress:
    """A progress bar on stderr. Where stderr is a file it is switched off, because it would leave an empty line there."""
    from rich.progress import Progress

    error = Console(stderr=True)
    return Progress(console=error, transient=True, disable=not error.is_terminal)


@contextmanager
def steps(visible: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar of named steps: a function to be called with the step that begins, how many are done, and of how many."""
    with progress() as bar:
        task = bar.add_task("", visible=visible)

        def tick(step: str, done: int, total: int) -> None:
            bar.update(task, description=step, completed=done, total=total)

        yield tick
