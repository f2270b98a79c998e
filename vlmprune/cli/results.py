"""The folder for a study's result, and the result's way out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from vlmprune.cli import terminal

if TYPE_CHECKING:
    from vlmprune.evals.results import Result


def prepare(out: Path | None) -> None:
    """Before anything is computed: make the folder for results, and check that the figure can be drawn.

    Raises:
        UsageError: the folder cannot be made or written to, or matplotlib is missing.
    """
    from vlmprune.loading.outputs import check_packages, make_folder

    if out is not None:
        check_packages(["matplotlib"])
        make_folder(out)


def check_intervals() -> None:
    """Before anything is computed: check that the intervals of few or equal answers can be.

    Raises:
        UsageError: scipy is missing.
    """
    from vlmprune.loading.outputs import check_packages

    check_packages(["scipy"], "measuring accuracy", extra="evals")


def publish(result: Result, name: str, out: Path | None, as_json: bool) -> None:
    """Write the files `name`.json, .md and .png if a folder was given, then print; and say how to see the folder as a page."""
    result.deliver(terminal.console, None if out is None else out / name, as_json)
    if out is not None and not as_json:
        terminal.say_unwrapped(f"`vlmprune report {shlex.quote(str(out))}` shows this folder as a page.")
