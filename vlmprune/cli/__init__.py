"""The command line `vlmprune`: its commands, and its answer to a mistake.

    ask.py      demo, run, view         a model answers questions about pictures
    checking.py check                   a pruned run against the un-pruned model
    compare.py  eval, bench             recipes side by side: accuracy, speed
    sweeping.py sweep                   all methods at equal compute
    lmms.py     lmms                    recipes on the benchmarks of lmms-eval
    plan.py     power                   how many questions a comparison needs
    page.py     report                  what these wrote, as one page
    choose.py   horizon, tune, sinks    settings for one model
    about.py    methods, env            what there is

Names are looked up, and pictures read, before torch is imported: a mistyped name is answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from vlmprune import __version__, names
from vlmprune.cli import about, ask, checking, choose, compare, lmms, page, plan, sweeping
from vlmprune.errors import UsageError, unknown
from vlmprune.loading.environment import environment

__all__ = ["app", "environment", "main", "method_rows", "methods_markdown", "redistribution_markdown"]

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Ask a model": {"demo": ask.demo, "run": ask.run, "view": ask.view, "check": checking.check},
    "Compare methods": {
        "eval": compare.evaluate,
        "sweep": sweeping.sweep,
        "lmms": lmms.lmms,
        "bench": compare.bench,
        "power": plan.power,
        "report": page.report,
    },
    "Find settings for your model": {"horizon": choose.horizon, "tune": choose.tune, "sinks": choose.sinks},
    "Look up": {"methods": about.methods, "env": about.env},
}
"""Commands by their names, in the groups of `vlmprune --help`."""
HELP = """Make vision-language models (VLMs) cheaper and more truthful without training: drop visual tokens, or redistribute
attention. Start with `vlmprune demo`."""
RECIPES = """A RECIPE names methods with their parameters: "divprune:fraction=0.25" keeps a quarter of the visual tokens;
"fastv:layer=2,fraction=0.5 + pai" combines two methods. `vlmprune methods` lists all, `vlmprune methods fastv` describes one.
The embedded model ('tiny') is a small VLM that comes with vlmprune; nothing is downloaded for it."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=HELP,
    epilog=RECIPES,
)
for group, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=group)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vlmprune {__version__}")
        raise typer.Exit


@app.callback(epilog=RECIPES, help=HELP)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of `vlmprune` itself."""


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2, never a traceback."""
    try:
        command = _command(sys.argv[1:])
        code = app(standalone_mode=False, prog_name="vlmprune")
    except UsageError as error:
        _stop(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        # What typer raises for wrong options has no class that all its versions share.
        if not hasattr(error, "format_message"):
            raise
        if message := error.format_message():
            _stop(f"{' '.join(message.split()).rstrip('.')}; `{' '.join(['vlmprune', *command])} -h` lists all options.")
        code = 0  # no command: the help was printed
    sys.exit(code or 0)


def _stop(sentence: str) -> None:
    print(f"vlmprune: {sentence}", file=sys.stderr)
    sys.exit(2)


def _command(arguments: Sequence[str]) -> list[str]:
    """The command among the arguments, if there is one.

    Raises:
        UsageError: there is no command of this name; names the nearest.
    """
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    known = [name for group in COMMANDS.values() for name in group]
    if name is None:
        return []
    if name in known:
        return [name]
    if name in names.method_names():
        raise UsageError(
            f"{name} is a method, not a command: `vlmprune methods {name}` describes it, `vlmprune run --recipe {name}` runs "
            "it."
        )
    raise unknown("command", name, known)


def __getattr__(name: str) -> Any:
    """The tables of README.md import torch, which the command line must not wait for."""
    if name not in ("method_rows", "methods_markdown", "redistribution_markdown"):
        raise AttributeError(f"module 'vlmprune.cli' has no attribute {name!r}")
    return getattr(import_module("vlmprune.cli.catalogue"), name)


if __name__ == "__main__":
    main()
