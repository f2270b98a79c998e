"""Commands that ask a model about pictures and videos: `vlmprune demo | run | view`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from vlmprune import names
from vlmprune.cli import options, terminal
from vlmprune.cli import why as why_option
from vlmprune.errors import UsageError, first_line
from vlmprune.show import units
from vlmprune.show.table import table

if TYPE_CHECKING:
    from vlmprune.loading.shown import Shown


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
    prompt: options.Prompt,
    image: options.Image = None,
    video: options.Video = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
    recipe: options.Recipe = options.DEMO_RECIPE,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="The longest answer, in tokens.")] = 64,
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    draw: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the kept patches on the picture, or on the frames, into this file."),
    ] = None,
    why: why_option.Why = None,
    as_json: options.AsJson = False,
) -> None:
    """Ask a model about a picture or a video: answers without and with a recipe, and their costs (`bench` measures time)."""
    shown = _check_question(image, video, frames, fps, prompt, recipe)
    from vlmprune.cli.asking import ask_and_draw, notes_of
    from vlmprune.loading.environment import quiet

    quiet()
    with _steps(max_new_tokens) as show_step:
        result, drawn = ask_and_draw(
            model, shown, prompt, recipe, max_new_tokens, device, draw, show_step, why or (), device_map
        )
    terminal.note(notes_of(result))
    if as_json:
        terminal.print_json(result)
    else:
        _print_answers(result)
    if drawn is not None and draw is not None:
        _save(lambda: drawn.save(draw), draw, "answers")  # they are printed by now: a full disk must not lose them
        if not as_json:
            terminal.say(f"The kept patches are drawn in {draw}")


def view(
    prompt: options.Prompt,
    image: options.Image = None,
    video: options.Video = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
    model: options.Model = "tiny",
    sinks: Annotated[bool, typer.Option("--sinks", help="Draw attention sinks: the default for a picture.")] = False,
    kept: Annotated[
        bool,
        typer.Option(
            "--kept", help="Draw what a recipe keeps; of a video, on a sheet with its frames: the default for a video."
        ),
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="With --kept: any recipe that prunes; if not given: evs:fraction=0.25 for a video, divprune:fraction=0.1 for "
            "a picture. With --sinks: a recipe with var, which may prune as well; if not given: var, with sink_dims=cosine "
            "where the model's sink dimensions are unknown.",
        ),
    ] = None,
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the figure goes. If not given: sinks.png, or kept.png.")
    ] = None,
) -> None:
    """Draw what a recipe does: the kept tokens of a picture or of a video's frames; or attention sinks of a picture."""
    if sinks and kept:
        raise UsageError("found --sinks and --kept, which are two figures: give one of them.")
    if sinks and video is not None:
        raise UsageError("the view of sinks is of a picture: give --image without --video, or --kept.")
    keeps = kept or (video is not None and not sinks)
    usual = "evs:fraction=0.25" if video is not None else options.DEMO_RECIPE
    shown = _check_question(image, video, frames, fps, prompt, recipe or (usual if keeps else "var"))
    if keeps:
        _view_kept(model, shown, prompt, recipe or usual, device, device_map, out or Path("kept.png"))
    else:
        _view_sinks(model, shown, prompt, recipe, device, device_map, out or Path("sinks.png"))


def _view_kept(model: str, shown: Shown, prompt: str, recipe: str, device: str, device_map: str | None, out: Path) -> None:
    from vlmprune.cli.asking import keep_and_draw
    from vlmprune.loading.environment import quiet

    quiet()
    crops, drawn, notes = keep_and_draw(model, shown, prompt, recipe, device, device_map, out)
    terminal.note(notes)
    terminal.say(f"recipe {recipe}")
    for crop in crops:
        terminal.say(f"{crop.name}: {len(crop.kept)} of {crop.tokens} tokens kept")
    _save(lambda: drawn.save(out), out, "numbers")
    terminal.say(f"The figure is {out}")


def _view_sinks(
    model: str, shown: Shown, prompt: str, recipe: str | None, device: str, device_map: str | None, out: Path
) -> None:
    from vlmprune.evals import sink_view
    from vlmprune.loading.environment import quiet
    from vlmprune.loading.outputs import check_packages, check_target
    from vlmprune.loading.questions import open_question

    check_packages(["matplotlib"])
    if recipe is not None:
        sink_view.check(recipe)
    check_target(out, "sinks.png", figure=True)
    quiet()
    question = open_question(model, shown, prompt, device, device_map=device_map)
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


def _check_question(
    image: Path | None, video: Path | None, frames: int | None, fps: float | None, prompt: str, recipe: str
) -> Shown:
    """What is shown; what can be refused without torch is refused before it is imported."""
    from vlmprune.loading.prompts import check_prompt
    from vlmprune.loading.shown import Shown

    names.check_recipe(recipe)
    check_prompt(prompt)
    shown = Shown(image, video, frames, fps)
    shown.check()
    return shown


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
