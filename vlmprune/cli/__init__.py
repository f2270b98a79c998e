"""The command line: `vlmprune demo | run | eval | sweep | bench | horizon | tune | methods | sinks | view | env`.

Names are looked up, and pictures read, before torch is imported: a mistyped one is answered at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from vlmprune import __version__, names
from vlmprune.errors import UsageError, first_line, unknown
from vlmprune.show import units

if TYPE_CHECKING:
    from rich.progress import Progress

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make vision-language models cheaper and more truthful without training them.",
)
console = Console()
DEMO_RECIPE = "divprune:fraction=0.1"

LOOKS_AT = {
    "features": "token features",
    "normed_features": "token features",
    "embeddings": "embeddings of tokens and words",
    "text_embeddings": "embeddings of tokens and words",
    "text_features": "embeddings of words",
    "attention_from_last": "attention of the last prompt token",
    "attention_from_text": "attention of the text",
    "attention_among_text": "attention within the text",
    "attention_of_layer": "attention of the last prompt token, one layer on",
    "keys": "keys",
    "values": "values",
    "query_of_last": "attention of the last prompt token",
    "attention_from_cls": "attention of the tower's CLS token",
    "attention_from_cls_early": "attention of the tower's CLS token",
    "attention_from_cls_final": "attention of the tower's CLS token",
    "tower_keys": "keys of the tower",
    "flow": "attention and values in the tower",
}
"""Probes in a reader's words; what only helps to read another probe is left out."""

ModelName = Annotated[str, typer.Option(help="Folder or hub id of a VLM; 'tiny' is the embedded one.")]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder with questions.jsonl and its pictures (docs/tuning.md). Default: scenes of the embedded model."),
]
Images = Annotated[int | None, typer.Option(min=2, help="Questions to take. Default: all of --data, or 40 scenes.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Out = Annotated[Path | None, typer.Option(help="Folder for the table, the figure and the numbers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


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
            _stop(f"{' '.join(message.split()).rstrip('.')}; `{' '.join(['vlmprune', *command])} -h` lists what it takes.")
        code = 0  # no command: the help was printed
    sys.exit(code or 0)


def _stop(sentence: str) -> None:
    print(f"vlmprune: {sentence}", file=sys.stderr)
    sys.exit(2)


def _command(arguments: Sequence[str]) -> list[str]:
    """The command that was asked for, if any.

    Raises:
        UsageError: there is none of this name.
    """
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    commands = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    if name is None:
        return []
    if name in commands:
        return [name]
    if name in names.method_names():
        raise UsageError(
            f"{name} is a method, not a command: `vlmprune methods {name}` tells of it, `vlmprune run --recipe {name}` runs it."
        )
    raise unknown("command", name, commands)


def _quiet() -> None:
    """No bars and warnings of transformers; of downloads, which may take minutes, the bars stay."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    enable_progress_bars()


def _note(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        print(f"vlmprune: note: {sentence}", file=sys.stderr)


def _progress() -> Progress:
    from rich.progress import Progress

    error = Console(stderr=True)
    return Progress(console=error, transient=True, disable=not error.is_terminal)  # in a file it would leave an empty line


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vlmprune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make vision-language models cheaper and more truthful without training them."""


@app.command()
def demo(
    recipe: Annotated[str, typer.Option(help="What to prune.")] = DEMO_RECIPE,
    images: Annotated[int, typer.Option(min=1, help="Held-out pictures to ask about.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for the drawn pictures.")] = Path("demo"),
    as_json: AsJson = False,
) -> None:
    """Ask the embedded VLM about a few held-out pictures, un-pruned and pruned, and draw what was kept."""
    names.check_recipe(recipe)
    from vlmprune.cli.demo import run_demo

    _quiet()
    result = run_demo(recipe, images, out)
    if as_json:
        _print_json(result)
        return
    table = Table("picture", "question", "truth", "un-pruned", _changed(recipe), title=f"embedded VLM, {recipe}")
    for row in result["answers"]:
        cells = [_judged(row[which], row["truth"]) for which in ("unpruned", "pruned")]
        table.add_row(str(row["picture"]), row["question"], row["truth"], *cells)
    console.print(table)
    console.print(_cost_table(result["unpruned"], result["pruned"], _changed(recipe)))
    console.print(
        f"Right: un-pruned {result['unpruned']['right']} of {len(result['answers'])}, "
        f"{_changed(recipe)} {result['pruned']['right']} of {len(result['answers'])}. "
        f"The picture with the kept patches is {result['picture']}"
    )


@app.command()
def run(
    model: Annotated[str, typer.Option(help="Folder or hub id of a VLM; 'tiny' is the embedded one.")],
    image: Annotated[Path, typer.Option(help="A picture.")],
    prompt: Annotated[str, typer.Option(help="The question; or, with the image token in it, the whole prompt.")],
    recipe: Annotated[str, typer.Option(help="A recipe string, or a JSON file or folder of one.")] = DEMO_RECIPE,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    draw: Annotated[Path | None, typer.Option(help="Write the picture with the kept patches here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model about one picture, un-pruned and pruned: one answer each. (`vlmprune bench` measures time.)"""
    _check_question(image, prompt, recipe)
    from vlmprune.cli.demo import ask_and_draw

    _quiet()
    with _progress() as progress:
        task = progress.add_task("", total=None)

        def tell(what: str, tokens: int, done: bool) -> None:
            progress.update(task, description=what, completed=tokens, total=max_new_tokens if tokens else None)
            if done and not progress.console.is_terminal:  # no bar there
                print(f"vlmprune: {what}: {tokens} tokens", file=sys.stderr)

        result, drawn = ask_and_draw(model, image, prompt, recipe, max_new_tokens, device, draw, tell)
    _note(result["picture"]["notes"])
    if as_json:
        _print_json(result)
        _save_drawn(drawn, draw)
        return
    label = _changed(result["recipe"])
    for name, side in (("un-pruned", "unpruned"), (label, "pruned")):
        console.print(f"{name:<{max(len(label), 9)}}  {result[side]['answer']}", highlight=False)
    console.print(_cost_table(result["unpruned"], result["pruned"], label))
    for view in result["views"] if len(result["views"]) > 1 else []:
        console.print(f"{view['name']:<11}{len(view['kept'])} of {view['tokens']} tokens kept", highlight=False)
    for edit in result["edits"]:
        console.print(f"redistributed ({edit['method']})  {edit['summary']}", highlight=False)
    if draw:
        _save_drawn(drawn, draw)
        console.print(f"The picture with the kept patches is {draw}")


def _save_drawn(drawn: Any, path: Path | None) -> None:
    """Comes after the answers are printed, so that they are not lost with the picture."""
    if drawn is None or path is None:
        return
    try:
        drawn.save(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot draw to {path} ({first_line(error)}); the answers stand above.") from error


@app.command("eval")
def evaluate(
    recipe: Annotated[list[str] | None, typer.Option(help="A recipe; may be repeated. Default: 4 methods × 4 budgets.")] = None,
    images: Annotated[int, typer.Option(min=2, help="Held-out scenes; each asks about a dozen questions.")] = 150,
    split: Annotated[str, typer.Option(help="test, or dev for choosing settings.")] = "test",
    out: Annotated[Path | None, typer.Option(help="Folder for the table, the figure and the numbers.")] = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy of recipes on the embedded VLM, per skill, beside the un-pruned model."""
    for text in recipe or ():
        names.check_recipe(text)
    from vlmprune import tiny
    from vlmprune.evals import offline
    from vlmprune.tiny.scenes import SPLITS

    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    _prepare_folder(out)
    _quiet()
    model, processor = tiny.load()
    recipes = recipe or list(offline.DEFAULT)
    with _progress() as progress:
        task = progress.add_task("recipes", total=len(recipes) + 1)
        rows = offline.evaluate(model, processor, recipes, images, split, lambda: progress.advance(task))
    numbers = {"images": images, "split": split, "environment": environment(), "rows": [row.to_dict() for row in rows]}
    if out:
        (out / "accuracy.json").write_text(json.dumps(numbers, indent=1) + "\n")
        (out / "accuracy.md").write_text(offline.markdown(rows) + "\n")
        offline.plot(rows, out / "accuracy.png")
    if as_json:
        _print_json(numbers)
        return
    # Seven skills need room; a narrow terminal gets the mean, files and --json always get everything.
    skills = list(rows[0].by_skill) if console.width >= 130 else []
    title = f"accuracy in %, {images} held-out scenes ({split})"
    table = Table(Column("recipe", overflow="fold"), *skills, "mean", "lost", "same answer", title=title)
    for row in rows:
        cells = [f"{100 * row.by_skill[skill].value:.1f}" for skill in skills]
        low, high = row.lost_interval
        lost = "" if row is rows[0] else f"{100 * row.lost:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        table.add_row(row.recipe, *cells, f"{100 * row.mean:.1f}", lost, f"{100 * row.loyalty:.1f}")
    console.print(table)


@app.command()
def sweep(
    method: Annotated[list[str] | None, typer.Option(help="A method; may be repeated. Default: all.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Visual tokens, compute average over layers, as a share.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Each has other scenes, and other draws of methods that draw.")] = 3,
    images: Annotated[int, typer.Option(min=2, help="Held-out scenes per seed.")] = 100,
    split: Annotated[str, typer.Option(help="test, or dev for choosing settings.")] = "test",
    out: Annotated[Path | None, typer.Option(help="Folder for the results; an interrupted sweep goes on from it.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own choice if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """All methods at equal compute on the embedded VLM, each against random tokens at the same layers and counts."""
    for name in method or ():
        names.check_pruning(name, "sweep")
    import torch

    from vlmprune import tiny
    from vlmprune.evals import sweep as evals
    from vlmprune.tiny.scenes import SPLITS

    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    _prepare_folder(out)
    if threads:
        torch.set_num_threads(threads)
    _quiet()
    model, processor = tiny.load()
    plan = evals.make_plan(model, method, budget or evals.BUDGETS)
    with _progress() as progress:
        task = progress.add_task("", total=None)
        tell = evals.Tell(
            lambda total: progress.update(task, total=total),
            lambda recipe: progress.update(task, description=recipe),
            lambda: progress.advance(task),
        )
        result = evals.sweep(model, processor, plan, seeds, images, split, out, tell)
    numbers = {"images": images, "seeds": seeds, "split": split, "environment": environment(), **result.to_dict()}
    if out:
        evals.write(result, numbers, out)
    if as_json:
        _print_json(numbers)
        return
    title = f"accuracy in %, {seeds} × {images} held-out scenes ({split})"
    table = Table("method", "budget", "accuracy", "over random", "", title=title)
    for row in result.methods:
        table.add_row(*evals.cells(row))
    console.print(table)
    for sentence in evals.summary(result):
        console.print(sentence, highlight=False)


@app.command()
def bench(
    shape: Annotated[str, typer.Option(help="llava-1.5-7b, llava-next-7b or qwen2.5-vl-7b: random weights.")] = "llava-1.5-7b",
    recipe: Annotated[list[str] | None, typer.Option(help="A recipe; may be repeated. Default: a few of the shape's.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Pictures at once; may be repeated. Default: 1.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Measured rounds, after one that warms up.")] = 7,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer; 1 leaves out decoding.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: cuda where there is a GPU.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. Default: bfloat16 on a GPU.")] = None,
    reduce: Annotated[int | None, typer.Option(help="Divide widths by 2, 4, 8 or 16. Default: 1 on a GPU, else 8.")] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Speed and memory of recipes beside the un-pruned model, on random weights of a published shape."""
    for text in recipe or ():
        names.check_recipe(text)
    import torch

    from vlmprune.evals import bench as evals
    from vlmprune.evals.shapes import shape_named
    from vlmprune.loading.models import check_device

    found, device = shape_named(shape), device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    on_gpu = not device.startswith("cpu")
    if (dtype := dtype or ("bfloat16" if on_gpu else "float32")) not in (dtypes := ("bfloat16", "float16", "float32")):
        raise unknown("dtype", dtype, dtypes)
    reduce = reduce or (1 if on_gpu else 8)
    _prepare_folder(out)
    _quiet()
    model = found.build(device, getattr(torch, dtype), reduce)
    recipes, batches = recipe or list(found.recipes), batch or [1]
    with _progress() as progress:
        task = progress.add_task("runs", total=(rounds + 1) * (len(recipes) + 1) * len(batches))
        rows = []
        for size in batches:
            inputs = found.inputs(model, size)
            rows += evals.measure(model, inputs, recipes, rounds, new_tokens, lambda: progress.advance(task))
    layers = model.config.text_config.num_hidden_layers
    whole = "" if reduce == 1 else f", widths / {reduce}, {layers} layers"
    title = f"{shape}{whole}, {found.visual} visual tokens, {dtype}, {device}"
    numbers = {
        "title": title,
        "shape": shape,
        "reduce": reduce,
        "dtype": dtype,
        "device": device,
        "environment": environment(),
        "rows": [row.to_dict() for row in rows],
    }
    if out:
        (out / "bench.json").write_text(json.dumps(numbers, indent=1) + "\n")
        (out / "bench.md").write_text(f"{title}\n\n{evals.markdown(rows)}\n")
        evals.plot(rows, title, out / "bench.png")
    if as_json:
        _print_json(numbers)
        return
    if console.width >= 160:
        first, *others = evals.COLUMNS
        table = Table(Column(first, overflow="fold"), *(Column(name, justify="right") for name in others), title=title)
        for row in rows:
            table.add_row(*evals.cells(row))
    else:  # many columns need room
        table = Table(Column("recipe", overflow="fold"), Column("", no_wrap=True), title=title, show_lines=True)
        for row in rows:
            lines = [f"[dim]{name}[/] {cell}" for name, cell in zip(evals.COLUMNS[1:], evals.cells(row)[1:], strict=True)]
            table.add_row(row.recipe, "\n".join(lines))
    console.print(table)
    for sentence in evals.overheads(rows):
        console.print(f"Our own work, {sentence} of TTFT", markup=False, highlight=False)


@app.command()
def horizon(
    model: ModelName = "tiny",
    data: Data = None,
    images: Images = None,
    window: Annotated[int, typer.Option(min=1, help="Visual tokens are kept in windows of N × N.")] = 2,
    layer: Annotated[list[int] | None, typer.Option(help="A decoder layer to measure; may be repeated. Default: all.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Windows tried at once; less needs less memory.")] = 64,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer to measure; the paper's is the first.")] = 1,
    device: Device = "cpu",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """From which decoder layer on visual tokens tell the answer nothing any more, and recipes that use it."""
    from vlmprune.evals import horizon as evals

    with _calibration(model, data, images, device, out, answers=True) as (loaded, samples, tick, notes):
        result = evals.find_horizon(loaded, samples, layer, window, chunk, answer_tokens, tick)
    numbers = {"model": model, "data": str(data or "scenes"), "notes": notes, "environment": environment(), **result.to_dict()}
    if out:
        (out / "horizon.json").write_text(json.dumps(numbers) + "\n")
        (out / "horizon.md").write_text(evals.markdown(result) + "\n")
        evals.plot(result, out / "horizon.png")
    if as_json:
        _print_json(numbers)
        return
    recipes = [f"{made.recipe}  ({made.compute_average:.1f} visual tokens enter a layer)" for made in result.compositions()]
    _print_rows(evals.COLUMNS, evals.rows(result), [*evals.sentences(result), *recipes])


@app.command()
def tune(
    method: Annotated[str, typer.Option(help="Whose schedule: adaptinfer.")],
    model: ModelName = "tiny",
    data: Data = None,
    images: Images = None,
    tokens: Annotated[int | None, typer.Option(help="Visual tokens that leave a layer, in the mean over layers.")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Or the same as a share of the picture's tokens; 0.3 if neither.")
    ] = None,
    device: Device = "cpu",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Choose a method's layers and counts for a model, from where its attention moves on."""
    names.check_pruning(method, "tune")
    from vlmprune.evals import tune as evals
    from vlmprune.schedule import Budget

    evals.check_method(method)
    budget = Budget(fraction=0.3) if (tokens, fraction) == (None, None) else Budget(tokens, fraction)
    with _calibration(model, data, images, device, out, answers=False) as (loaded, samples, tick, notes):
        result = evals.tune(loaded, samples, budget, method, tick)
    numbers = {"model": model, "data": str(data or "scenes"), "notes": notes, "environment": environment(), **result.to_dict()}
    if out:
        result.recipe.save_pretrained(out)
        (out / "tune.json").write_text(json.dumps(numbers, indent=1) + "\n")
        (out / "tune.md").write_text(evals.markdown(result) + "\n")
        evals.plot(result, out / "tune.png")
    if as_json:
        _print_json(numbers)
        return
    _print_rows(evals.COLUMNS, evals.rows(result), [*evals.sentences(result), *([f"Saved to {out}"] if out else [])])


@contextmanager
def _calibration(
    model: str, data: Path | None, images: int | None, device: str, out: Path | None, answers: bool
) -> Iterator[tuple[Any, Iterator[Any], Callable[[float], None], list[str]]]:
    """The model, its calibration samples, a progress bar to tick, and what the pictures lost when they were read; everything is
    checked before anything is computed."""
    from vlmprune.evals import calibration
    from vlmprune.loading.models import open_model

    if data is None and model != "tiny":
        raise UsageError("the built-in scenes are for the embedded model: give --data with questions for yours.")
    questions = calibration.scenes(images or 40) if data is None else calibration.read(data, answers, images)
    notes = [*calibration.fewer(len(questions), images), *calibration.check_pictures(questions)]
    _prepare_folder(out)
    _quiet()
    processor, read_weights = open_model(model, device)
    samples = calibration.samples(processor, questions, device)
    loaded = read_weights()
    _note(notes)
    with _progress() as progress:
        task = progress.add_task("samples", total=len(questions))
        yield loaded, samples, lambda share: progress.advance(task, share), notes


def _prepare_folder(out: Path | None) -> None:
    """A folder for results and their figures, and what draws them, before anything is computed."""
    from vlmprune.loading.models import check_packages, make_folder

    if out:
        check_packages(["matplotlib"])
        make_folder(out)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its parameters; all if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """The methods there are, with their papers and defaults; or one of them, with its parameters."""
    if name is not None:
        _print_method(name, as_json)
        return
    rows, edits = method_rows(), redistribution_rows()
    if as_json:
        _print_json([*rows, *edits])
        return
    for title, columns, lines in (("dropping visual tokens", COLUMNS, rows), ("redistributing attention", EDIT_COLUMNS, edits)):
        console.print(_methods_table(title, columns, lines), highlight=False)


def _print_method(name: str, as_json: bool) -> None:
    names.check_method(name)
    from vlmprune.cli.catalogue import describe

    found = describe(name)
    if as_json:
        _print_json(found)
        return
    say = partial(console.print, markup=False, highlight=False)
    say(f"{name}: {found['what']}\n{found['paper']}" + (f"; {found['where it differs']}" if found["where it differs"] else ""))
    keys = ("parameter", "type", "allowed", "default", "meaning")
    table = Table(*(Column(key, overflow="fold", no_wrap=key == "parameter") for key in keys))
    for row in found["parameters"]:
        table.add_row(*(Text(row[key]) for key in keys))
    console.print(table)
    say(f'vlmprune run --model tiny --image cat.jpg --prompt "What is this?" --recipe "{found["example"]}"', soft_wrap=True)


def _methods_table(title: str, columns: dict[str, str], rows: list[dict[str, str]]) -> Table:
    if console.width >= 160:
        table = Table(*(Column(name, overflow="fold") for name in columns.values()), title=title)
        for row in rows:
            table.add_row(*(row[key] for key in columns))
        return table
    table = Table(columns["method"], Column("", overflow="fold"), title=title, show_lines=True)  # many columns need room
    for row in rows:
        lines = [f"[dim]{name}[/] {row[key]}" for key, name in columns.items() if key != "method" and row[key]]
        table.add_row(row["method"], "\n".join(lines))
    return table


@app.command()
def sinks(
    model: Annotated[str, typer.Option(help="Folder or hub id of a decoder or VLM; 'tiny' is the embedded VLM.")] = "tiny",
    gguf: Annotated[str | None, typer.Option(help="GGUF file in that folder (needs the package gguf).")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A text; may be repeated. Default: eight short texts.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Find the dimensions that hold a decoder's attention sinks, for `var`, with the evidence."""
    if gguf is not None and model == "tiny":
        raise UsageError(f"--gguf {gguf} is a file in the folder of a model: give that folder as --model.")
    from vlmprune.evals.sinks import PROMPTS, TINY_PROMPTS, find_sinks
    from vlmprune.loading.models import load_decoder

    _quiet()
    decoder, tokenize = load_decoder(model, gguf, device)
    found = find_sinks(decoder, [tokenize(text) for text in prompt or (TINY_PROMPTS if model == "tiny" else PROMPTS)])
    if as_json:
        _print_json(found.to_dict())
        return
    table = Table("layer", "dim", "energy", "φ", "norm of the first", "of others", "× median", "attention to the first")
    for row in found.evidence:
        cells = (f"{row.energy:.1%}", f"{row.phi:.1f}", f"{row.first_norm:.0f}", f"{row.other_norm:.0f}", f"{row.ratio:.0f}")
        table.add_row(str(row.layer), str(row.dim), *cells, f"{row.attention:.1%}")
    console.print(table)
    for label, value in found.rows():
        console.print(f"{label:<28}{value}", highlight=False)
    for sentence in (found.advice, *found.cautions):
        console.print(sentence, highlight=False)


@app.command()
def view(
    image: Annotated[Path, typer.Option(help="A picture.")],
    prompt: Annotated[str, typer.Option(help="The question; or, with the image token in it, the whole prompt.")],
    model: Annotated[str, typer.Option(help="Folder or hub id of a VLM; 'tiny' is the embedded one.")] = "tiny",
    sinks: Annotated[
        bool, typer.Option("--sinks", help="Sinks, and attention to the picture before and after: the one view so far.")
    ] = True,
    recipe: Annotated[
        str | None,
        typer.Option(help="With var; pruning may stand beside it. Default: var, with sink_dims=cosine where they are unknown."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    out: Annotated[Path, typer.Option(help="The figure.")] = Path("sinks.png"),
) -> None:
    """Draw what redistribution does to one picture and question. (`vlmprune run --draw` draws kept patches.)"""
    _check_question(image, prompt, recipe or "var")
    from vlmprune.cli.demo import prepare
    from vlmprune.evals import sink_view
    from vlmprune.loading.models import check_packages

    check_packages(["matplotlib"])
    if recipe is not None:
        sink_view.check(recipe)
    _quiet()
    made = prepare(model, image, prompt, device, out)
    _note(made.notes)
    if recipe is None:
        recipe = sink_view.default_recipe(made.model)
        console.print(f"recipe {recipe}", highlight=False)
    found = sink_view.look(made.model, made.inputs, recipe)
    before, after = float(found.before.mean()), float(found.after.mean())
    counts = found.sinks.sum(dim=1).float().mean()
    console.print(
        f"{counts:.1f} visual and {sum(found.text_sinks) / len(found.layers):.1f} text sinks per layer; attention to the "
        f"picture {before:.1%} before, {after:.1%} after."
    )
    try:
        sink_view.draw(found, made.seen, made.grid, prompt, out)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot draw to {out} ({first_line(error)}); the numbers stand above.") from error
    console.print(f"The figure is {out}")


def _check_question(image: Path, prompt: str, recipe: str) -> None:
    """What can be refused before torch is imported, is."""
    from vlmprune.loading.pictures import open_picture

    names.check_recipe(recipe)
    if not prompt.strip():
        raise UsageError("the prompt is empty: ask something about the picture.")
    open_picture(image, lambda note: None)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Versions and devices, for bug reports and result files."""
    found = environment()
    if as_json:
        _print_json(found)
        return
    table = Table(show_header=False)
    for key, value in found.items():
        table.add_row(key, str(value))
    console.print(table)


def method_rows() -> list[dict[str, str]]:
    """One row per method; the README's table is made from the same rows."""
    from vlmprune.adapters.registry import FAMILIES
    from vlmprune.methods import METHODS
    from vlmprune.methods.tower import TowerPruner
    from vlmprune.recipe import Recipe

    rows = []
    for name, method in sorted(METHODS.items()):
        recipe = Recipe((method(),))
        plans = {}
        for family in FAMILIES.values():
            try:
                plans[family.name] = [stage for stage, _ in recipe.cuts(family.facts)]
            except UsageError:
                continue
        stages = {stage.order: stage for plan in plans.values() for stage in plan}
        needs = {need for plan in plans.values() for stage in plan if stage.site == "llm" for need in method().needs_at(stage)}
        looks = {LOOKS_AT[need] for need in needs if need in LOOKS_AT}
        if issubclass(method, TowerPruner):
            looks.add(method.watches)
        rows.append(
            {
                "method": name,
                "paper": method.paper,
                "cuts": _places([stages[order] for order in sorted(stages)]),
                "families": "all" if len(plans) == len(FAMILIES) else ", ".join(plans),
                "looks_at": ", ".join(sorted(looks)) or "nothing",
                "default": str(recipe),
                "positions": method.official_positions,
                "note": method.note,
            }
        )
    return rows


def _places(stages: list[Any]) -> str:
    """Where a method cuts, in a few words."""
    layers = [stage.layer for stage in stages if stage.site == "llm"]
    inside = [str(layer) for layer in layers if layer]
    return ", ".join(
        [
            *(["in the tower"] if stages[0].site == "vision" else []),
            *(["before the LLM"] if 0 in layers else []),
            *([f"layer{'s' if len(inside) > 1 else ''} {', '.join(inside)}"] if inside else []),
            *(["cache"] if stages[-1].site == "cache" else []),
        ]
    )


COLUMNS = {
    "method": "method",
    "paper": "paper",
    "cuts": "cuts",
    "families": "families",
    "looks_at": "scored by",
    "default": "default",
    "positions": "positions in its code",
    "note": "where it differs",
}
"""Columns of the table of methods, with their titles."""


EDIT_COLUMNS = {
    "method": "method",
    "paper": "paper",
    "edits": "edits",
    "rows": "rows of a prompt",
    "layers": "layers of 32",
    "families": "families",
    "default": "parameters",
    "presets": "presets",
    "note": "where it differs",
}
"""Columns of the table of redistribution methods, with their titles."""


def redistribution_rows() -> list[dict[str, str]]:
    """One row per redistribution method."""
    from vlmprune.adapters.registry import FAMILIES
    from vlmprune.methods import REDISTRIBUTORS
    from vlmprune.methods.redistributing import spans
    from vlmprune.recipe import Recipe

    rows = {"behind": "behind the last picture", "last": "the last", "all": "all"}
    return [
        {
            "method": name,
            "paper": method.paper,
            "edits": method.edits,
            "rows": rows[method.rows],
            "layers": spans(method().layers_of(32)),
            "families": "all" if not method.needs else ", ".join(f.name for f in FAMILIES.values() if f.facts.cls),
            "default": ",".join(
                f"{key}={value}"
                for key, value in Recipe((method(),)).to_dict()["methods"][0].items()
                if value != "" and key != "method"
            ),
            "presets": ", ".join(method.presets),
            "note": method.note,
        }
        for name, method in sorted(REDISTRIBUTORS.items())
    ]


def methods_markdown() -> str:
    """The table of the README."""
    return _markdown(COLUMNS, method_rows())


def redistribution_markdown() -> str:
    """The second table of the README."""
    return _markdown(EDIT_COLUMNS, redistribution_rows())


def _markdown(columns: dict[str, str], rows: list[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = {**row, "method": f"`{row['method']}`", "default": f"`{row['default']}`".replace("|", "\\|")}
        lines.append("| " + " | ".join(cells[key] for key in columns) + " |")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """What a result depends on."""
    import platform

    import torch
    import transformers

    import vlmprune

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "vlmprune": vlmprune.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "gpu": ", ".join(gpus) or "none",
    }


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def _print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], sentences: Sequence[str]) -> None:
    table = Table(*(Column(name, justify="right") for name in columns))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False)


def _judged(given: str, truth: str) -> str:
    return f"[green]{given}[/]" if given == truth else f"[red]{given or '(nothing)'}[/]"


def _changed(recipe: str) -> str:
    """What a recipe does to a model, in a word; a file's content is not known here."""
    methods = {part.partition(":")[0].strip() for part in recipe.split("+")}
    return "redistributed" if methods <= set(names.method_names("redistribution")) else "pruned"


def _cost_table(unpruned: dict[str, Any], pruned: dict[str, Any], label: str) -> Table:
    table = Table("", "un-pruned", label, "ratio")
    rows: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("visual tokens kept per picture", "visual_tokens", "{:.0f}".format),
        ("language-model prefill, medians of 7", "prefill_ms", units.duration),
        ("language-model prefill", "mflops", lambda mflops: units.operations(mflops * 1e6)),
        ("KV cache after prefill", "kv_kib", lambda kib: units.size(kib * 1024)),
    )
    for label, key, form in rows:
        if key in unpruned:  # `run` takes no times
            share = unpruned[key] / pruned[key] if pruned[key] else float("inf")
            table.add_row(label, form(unpruned[key]), form(pruned[key]), f"{share:.2f}×")
    return table


if __name__ == "__main__":
    main()
