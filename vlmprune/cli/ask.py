"""Commands that ask a model about pictures: `vlmprune demo | run | view`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from vlmprune import names
from vlmprune.cli import options, terminal
from vlmprune.cli import why as why_option
from vlmprune.errors import UsageError, first_line
from vlmprune.show import units
from vlmprune.show.table import table


def demo(
    recipe: options.Recipe = options.DEMO_RECIPE,
    images: Annotated[int, typer.Option(metavar="N", min=1, help="How many pictures; three questions about each.")] = 4,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the drawing of the kept patches goes.")] = Path("demo"),
    as_json: options.AsJson = False,
) -> None:
    """Try it: the embedded model answers questions about a few pictures, without and with a recipe."""
    names.check_recipe(recipe)
    from vlmprune.cli.demo import run_demo
    from vlmprune.loading.environment import quiet

    quiet()
    with terminal.progress() as progress:
        task = progress.add_task("asking", total=images)
        result = run_demo(recipe, images, out, lambda: progress.advance(task))
    if as_json:
        terminal.print_json(result)
        return
    label = _label(recipe)
    columns = ("picture", "question", "truth", "un-pruned", label)
    rows = [
        (str(row["picture"]), row["question"], row["truth"], _judged(row, "unpruned"), _judged(row, "pruned"))
        for row in result["answers"]
    ]
    terminal.print_table(table(columns, rows, text_columns=5, title=f"embedded model, {recipe}"))
    _print_costs(result["unpruned"], result["pruned"], label)
    right = [f"{name} {result[side]['right']} of {len(rows)}" for name, side in (("un-pruned", "unpruned"), (label, "pruned"))]
    terminal.say(f"Right: {', '.join(right)}. The kept patches are drawn in {result['picture']}")


def run(
    model: options.Model,
    image: options.Image,
    prompt: options.Prompt,
    recipe: options.Recipe = options.DEMO_RECIPE,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="The longest answer, in tokens.")] = 64,
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    draw: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the kept patches on the picture, into this file.")
    ] = None,
    why: why_option.Why = None,
    as_json: options.AsJson = False,
) -> None:
    """Ask a model about one picture: the answers without and with a recipe, and their costs (`bench` measures time)."""
    _check_question(image, prompt, recipe)
    from vlmprune.cli.asking import ask_and_draw
    from vlmprune.loading.environment import quiet

    quiet()
    with _steps(max_new_tokens) as show_step:
        result, drawn = ask_and_draw(
            model, image, prompt, recipe, max_new_tokens, device, draw, show_step, why or (), device_map
        )
    terminal.note(result["picture"]["notes"])
    if as_json:
        terminal.print_json(result)
    else:
        _print_answers(result)
    if drawn is not None and draw is not None:
        _save(lambda: drawn.save(draw), draw, "answers")  # they are printed by now: a full disk must not lose them
        if not as_json:
            terminal.say(f"The kept patches are drawn in {draw}")


def view(
    image: options.Image,
    prompt: options.Prompt,
    model: options.Model = "tiny",
    sinks: Annotated[
        bool, typer.Option("--sinks", help="Which figure: there is only this one so far, and it is the default.")
    ] = True,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="A recipe with var; it may prune as well. If not given: var, with sink_dims=cosine where the model's sink "
            "dimensions are unknown.",
        ),
    ] = None,
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figure goes.")] = Path("sinks.png"),
) -> None:
    """Draw what redistribution does: attention sinks, and attention to the picture before and after."""
    _check_question(image, prompt, recipe or "var")
    from vlmprune.evals import sink_view
    from vlmprune.loading.environment import quiet
    from vlmprune.loading.outputs import check_packages, check_target
    from vlmprune.loading.questions import open_question

    check_packages(["matplotlib"])
    if recipe is not None:
        sink_view.check(recipe)
    check_target(out, "sinks.png", figure=True)
    quiet()
    question = open_question(model, image, prompt, device, device_map=device_map)
    terminal.note(question.notes)
    if recipe is None:
        recipe = sink_view.default_recipe(question.model)
        terminal.say(f"recipe {recipe}")
    found = sink_view.look(question.model, question.inputs, recipe)
    visual, text = float(found.sinks.sum(dim=1).float().mean()), sum(found.text_sinks) / len(found.layers)
    terminal.say(
        f"{visual:.1f} visual and {text:.1f} text sinks per layer; attention to the picture {float(found.before.mean()):.1%} "
        f"before, {float(found.after.mean()):.1%} after."
    )
    first, *others = question.crops()
    grid = None if others else (first.cells.shape[0], first.cells.shape[1])
    _save(lambda: sink_view.draw(found, question.seen()[0], grid, prompt, out), out, "numbers")
    terminal.say(f"The figure is {out}")


def _check_question(image: Path, prompt: str, recipe: str) -> None:
    """Refuse before torch is imported what can be refused without it."""
    from vlmprune.loading.pictures import open_picture
    from vlmprune.loading.prompts import check_prompt

    names.check_recipe(recipe)
    check_prompt(prompt)
    open_picture(image, lambda note: None)


@contextmanager
def _steps(most: int) -> Iterator[Callable[[str, int, bool], None]]:
    """A progress bar for answers of at most so many tokens; where stderr is a file, a line for each finished answer."""
    with terminal.progress() as progress:
        task = progress.add_task("", total=None)

        def show(step: str, tokens: int, done: bool) -> None:
            progress.update(task, description=step, completed=tokens, total=most if tokens else None)
            if done and not progress.console.is_terminal:
                print(f"vlmprune: {step}: {tokens} tokens", file=sys.stderr)

        yield show


def _print_answers(result: dict[str, Any]) -> None:
    label = _label(result["recipe"])
    for name, side in (("un-pruned", "unpruned"), (label, "pruned")):
        terminal.say(f"{name:<{max(len(label), 9)}}  {result[side]['answer']}")
    _print_costs(result["unpruned"], result["pruned"], label)
    crops = result["views"]
    width = max(len(crop["name"]) for crop in crops)
    for crop in crops if len(crops) > 1 else []:
        terminal.say(f"{crop['name']:<{width}}  {len(crop['kept'])} of {crop['tokens']} tokens kept")
    for edit in result["edits"]:
        terminal.say(f"redistributed ({edit['method']})  {edit['summary']}")
    for explanation in result.get("why", ()):
        terminal.say(*why_option.lines(explanation))


def _save(write: Callable[[], object], path: Path, printed: str) -> None:
    try:
        write()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot draw to {path} ({first_line(error)}); the {printed} are printed above.") from error


def _judged(row: dict[str, str], side: str) -> Text:
    """An answer, green if it is right."""
    return Text(row[side] or "(nothing)", style="green" if row[side] == row["truth"] else "red")


def _label(recipe: str) -> str:
    """What a recipe does to a model, in a word. The content of a recipe file is not read: it counts as pruning."""
    methods = {part.partition(":")[0].strip() for part in recipe.split("+")}
    return "redistributed" if methods <= set(names.method_names("redistribution")) else "pruned"


COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("visual tokens kept per picture", "visual_tokens", "{:.0f}".format),
    ("language model's prefill, time (median of 7)", "prefill_ms", units.duration),
    ("language model's prefill, operations", "mflops", lambda mflops: units.operations(mflops * 1e6)),
    ("KV cache after prefill", "kv_kib", lambda kib: units.size(kib * 1024)),
)
"""Rows of the table of costs: title, key, and the function that writes the quantity."""


def _print_costs(unpruned: dict[str, Any], pruned: dict[str, Any], label: str) -> None:
    rows = []
    for title, key, form in COSTS:
        if key in unpruned:  # `run` takes no times
            ratio = unpruned[key] / pruned[key] if pruned[key] else float("inf")
            rows.append((title, form(unpruned[key]), form(pruned[key]), f"{ratio:.2f}×"))
    terminal.print_table(table(("", "un-pruned", label, "ratio"), rows))
