"""`vlmprune report`: a folder of results as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmprune.cli import terminal
from vlmprune.errors import UsageError
from vlmprune.loading.environment import quiet

ENDINGS = (".html", ".md", ".json")


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What eval, sweep, bench, horizon or tune wrote with --out.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The file to write: .html, .md or .json. If not given: report.html, report.md and report.json in the folder.",
        ),
    ] = None,
    pictures: Annotated[
        bool,
        typer.Option(
            "--pictures",
            help="First draw which tokens each method keeps, with the embedded model, into kept.json of the folder; later "
            "reports show them, too.",
        ),
    ] = False,
) -> None:
    """Show a folder of results as one HTML page, which needs no network and no script; and as Markdown and JSON."""
    from vlmprune.loading.outputs import check_packages

    check_packages(["jinja2", "matplotlib"], "a report", extra="evals")
    from vlmprune.evals import report_read

    sources, notes = report_read.read(folder)
    targets = _targets(folder, out)
    from vlmprune.evals import report as evals

    if pictures:
        quiet()
        with terminal.progress() as progress:
            task = progress.add_task("pictures", total=None)
            evals.draw(folder, sources, lambda done, total: progress.update(task, completed=done, total=total))
        sources, notes = report_read.read(folder)
    terminal.note(notes)
    texts = evals.texts(folder, sources)
    for path in targets:
        try:
            path.write_text(texts[path.suffix.lower()], encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {path} ({error.strerror}): give the name of a file that can be written.") from error
    terminal.say(f"The report is {targets[0]}")


def _targets(folder: Path, out: Path | None) -> list[Path]:
    """The files to write; their folder is made.

    Raises:
        UsageError: a file of another kind, or one that cannot be written there.
    """
    from vlmprune.loading.outputs import make_folder

    if out is None:
        make_folder(folder)
        return [folder / f"report{ending}" for ending in ENDINGS]
    if out.suffix.lower() not in ENDINGS or out.is_dir():
        raise UsageError(f"cannot write a report to {out}: give the name of a file that ends in .html, .md or .json.")
    make_folder(out.parent)
    return [out]
