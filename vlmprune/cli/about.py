"""Commands that look things up: `vlmprune methods | env`."""

from __future__ import annotations

from typing import Annotated

import typer

from vlmprune import names
from vlmprune.cli import options, terminal
from vlmprune.show.table import table


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A method to describe. If not given: all are listed.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """List all methods with their papers and defaults; or describe one, with its parameters and their ranges."""
    if name is not None:
        names.check_method(name)
        _method(name, as_json)
        return
    from vlmprune.cli import catalogue

    if as_json:
        terminal.print_json([*catalogue.method_rows(), *catalogue.redistribution_rows()])
        return
    terminal.print_table(catalogue.methods_table("methods that drop visual tokens"))
    terminal.print_table(catalogue.redistribution_table("methods that redistribute attention"))


def _method(name: str, as_json: bool) -> None:
    from vlmprune.cli.details import describe

    found = describe(name)
    if as_json:
        terminal.print_json(found)
        return
    terminal.say(f"{name}: {found['what']}", f"Paper: {found['paper']}")
    if found["where it differs"]:
        terminal.say(f"Where it differs: {found['where it differs']}")
    columns = ("parameter", "type", "allowed", "default", "meaning")
    rows = [[row[key] for key in columns] for row in found["parameters"]]
    terminal.print_table(table(columns, rows, text_columns=5))
    if found["presets"]:
        terminal.say(f"Presets: {', '.join(found['presets'])}")
    terminal.say_unwrapped(f'vlmprune run --model tiny --image cat.jpg --prompt "What is this?" --recipe "{found["example"]}"')


def env(as_json: options.AsJson = False) -> None:
    """Print versions and devices, for bug reports."""
    from vlmprune.loading.environment import environment

    found = environment()
    if as_json:
        terminal.print_json(found)
        return
    terminal.print_table(table(("what", "found"), [(key, str(value)) for key, value in found.items()], text_columns=2))
