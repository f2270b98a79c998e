"""`vlmprune lmms`: lmms-eval's benchmarks on any model, un-pruned and under recipes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmprune import names
from vlmprune.cli import options, terminal

SUITE = "vlmprune_suite"


def lmms(
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A task, group or tag of lmms-eval or of --include; may be repeated. Our own, which need no network, begin "
            f"with vlmprune_; if not given: {SUITE}.",
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE",
            help="A recipe, or a file, folder or hub repository with one; 'none' is the un-pruned model. May be repeated. If "
            f"not given: none and {options.DEMO_RECIPE}.",
        ),
    ] = None,
    model: options.Model = "tiny",
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts at once.")] = 8,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many documents of each task. If not given: all.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Where answers and results go; an interrupted run continues from this folder."),
    ] = Path("lmms"),
    processes: Annotated[int, typer.Option(metavar="N", min=1, help="Processes that share the documents, by torchrun.")] = 1,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, … If not given: a GPU for each process, else cpu.")
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(metavar="NAME", help="Spread a large model over several devices: auto, balanced, …")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="bfloat16, float16 or float32. If not given: as the weights are stored.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="The longest answer, in tokens, where the task states none.")
    ] = 128,
    system: Annotated[str, typer.Option(metavar="TEXT", help="A system text for the chat template.")] = "",
    include: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A folder with further tasks.")] = None,
    force_simple: Annotated[
        bool, typer.Option("--force-simple", help="For tasks that are scored by likelihood: take the simple class.")
    ] = False,
    show_command: Annotated[
        bool, typer.Option("--show-command", help="Check everything, print lmms-eval's own commands, and run nothing.")
    ] = False,
    as_json: options.AsJson = False,
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="-- OPTIONS", help="Further options of `lmms-eval eval`, after a --.")
    ] = None,
) -> None:
    """Run benchmarks of lmms-eval on a model, un-pruned and under recipes (needs lmms-eval, docs/lmms.md)."""
    from vlmprune.evals.lmms_tasks import stock_folder

    stock_folder()
    recipes = list(dict.fromkeys(recipe or ("none", options.DEMO_RECIPE)))
    for text in recipes:
        if text != "none":
            names.check_recipe(text)
    from vlmprune.evals.lmms_arguments import Arguments
    from vlmprune.evals.lmms_results import numbers_of, result
    from vlmprune.evals.lmms_run import NoResultsError, Plan, run
    from vlmprune.evals.results import stamp
    from vlmprune.loading.outputs import make_folder

    arguments = Arguments(
        pretrained=model,
        dtype=dtype,
        device=device,
        device_map=device_map,
        max_new_tokens=max_new_tokens,
        system=system,
        batch_size=batch,
    )
    plan = Plan(
        arguments, tuple(recipes), tuple(task or (SUITE,)), out, limit, include, force_simple, processes, tuple(extra or ())
    )
    tasks = plan.check()
    if show_command:
        for text in recipes:
            terminal.say_unwrapped(shlex.join(plan.command(text, tasks)))
        return
    make_folder(out)
    try:
        runs = run(plan, tasks, lambda piece: print(piece, end="", file=sys.stderr, flush=True))
    except NoResultsError as error:
        print(f"vlmprune: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    numbers = {"model": model, "batch": batch, "processes": processes, **stamp(), "rows": numbers_of(runs)}
    result(numbers).deliver(terminal.console, out / "lmms", as_json)
