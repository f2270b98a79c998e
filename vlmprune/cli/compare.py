"""Commands that compare methods and recipes: `vlmprune eval | bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmprune import names
from vlmprune.cli import options, terminal
from vlmprune.cli.data import Data
from vlmprune.cli.results import check_intervals, prepare, publish
from vlmprune.errors import UsageError, unknown
from vlmprune.evals.zero_shot_data import is_picture_set
from vlmprune.loading.environment import quiet

SHAPES = "llava-1.5-7b, llava-next-7b or qwen2.5-vl-7b"
DTYPES = ("bfloat16", "float16", "float32")


def evaluate(
    recipe: options.Recipes = None,
    model: options.Model = "tiny",
    data: options.Data = None,
    images: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="How many scenes (150 if not given; about ten questions about each), or how many questions of --data at most.",
        ),
    ] = None,
    split: options.DataSplit = None,
    scorer: options.Scorer = None,
    column: options.Columns = None,
    skip_bad: options.SkipBad = False,
    batch: options.BatchSize = None,
    max_new_tokens: options.Longest = None,
    template: options.Templates = None,
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also write numbers, table, figure and answers here; an interrupted evaluation continues from this folder, "
            "and several processes share it (docs/evaluation.md).",
        ),
    ] = None,
    wait: options.Wait = 30,
    as_json: options.AsJson = False,
) -> None:
    """Measure the accuracy of recipes beside the un-pruned model, by skill or group of questions.

    On the embedded model, or on --model with your questions (--data). With --data a folder of pictures by class or with
    captions, and --model one of open_clip (open_clip:NAME/PRETRAINED), CLIP or SigLIP: zero-shot accuracy, or recall, and
    pictures per second.
    """
    _check(recipe)
    if model.startswith(names.OPEN_CLIP) or template or is_picture_set(data):
        about_questions: dict[str, Any] = {"--split": split, "--scorer": scorer, "--column": column, "--skip-bad": skip_bad}
        about_questions |= {"--max-new-tokens": max_new_tokens, "--device-map": device_map}
        _zero_shot(model, data, recipe, images, template or (), batch, device, out, as_json, about_questions)
        return
    asked = Data(data, images, split, scorer, column or (), skip_bad, max_new_tokens)
    asked.check(model)
    from vlmprune.cli.evaluating import measure
    from vlmprune.evals.shards import shard_of

    shard = shard_of()
    if out is None and shard.count > 1:
        raise UsageError("give --out FOLDER: the processes share their answers in it.")
    check_intervals()
    prepare(out)
    quiet()
    numbers = measure(model, asked, recipe, batch, shard, device, device_map, out, wait)
    if numbers is not None:
        from vlmprune.evals import accuracy

        publish(accuracy.result(numbers), "accuracy", out, as_json)


def _zero_shot(
    model: str,
    data: str | None,
    recipes: list[str] | None,
    count: int | None,
    templates: Sequence[str],
    batch: int | None,
    device: str,
    out: Path | None,
    as_json: bool,
    about_questions: Mapping[str, Any],
) -> None:
    """Classify pictures, or retrieve them and their captions."""
    if not is_picture_set(data):
        raise UsageError(
            "an image tower answers no questions: give --data a folder with a folder of pictures for each class, or with "
            f"captions.jsonl, found {'none' if data is None else repr(data)}."
        )
    from vlmprune.cli.zero_shot import check_options, evaluate

    check_options(about_questions, templates)
    check_intervals()
    prepare(out)
    quiet()
    numbers = evaluate(model, str(data), recipes, count, templates, batch, device, out)
    from vlmprune.evals import zero_shot_report

    publish(zero_shot_report.result(numbers), "zero_shot", out, as_json)


def bench(
    shape: Annotated[str, typer.Option(metavar="NAME", help=f"{SHAPES}.")] = "llava-1.5-7b",
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="RECIPE", help="A recipe to measure; may be repeated. If not given: a few that suit the shape."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(metavar="N", min=1, help="Prompts at once; may be repeated. If not given: 1.")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=3, help="Measured rounds, after one that warms up.")] = 7,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of the answer; 1 measures no decoding.")] = 16,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, … If not given: cuda where there is a GPU.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="bfloat16, float16 or float32. If not given: bfloat16 on a GPU, else float32."),
    ] = None,
    reduce: Annotated[
        int | None,
        typer.Option(metavar="N", help="Divide the widths by 2, 4, 8 or 16. If not given: 1 on a GPU, else 8."),
    ] = None,
    out: options.Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure the speed and memory of recipes, on random weights in the shape of a published model."""
    _check(recipe)
    import torch

    from vlmprune.evals import bench as evals
    from vlmprune.evals import bench_report
    from vlmprune.evals.random_models import shape_named
    from vlmprune.evals.results import stamp

    chosen = shape_named(shape)
    device, dtype, reduce = _machine(device, dtype, reduce)
    prepare(out)
    quiet()
    model = chosen.build(device, getattr(torch, dtype), reduce)
    recipes, batches = recipe or list(chosen.recipes), batch or [1]
    rows: list[evals.Measured] = []
    with terminal.progress() as progress:
        task = progress.add_task("runs", total=(rounds + 1) * (len(recipes) + 1) * len(batches))
        for size in batches:
            inputs = chosen.inputs(model, size)
            rows += evals.measure(model, inputs, recipes, rounds, new_tokens, lambda: progress.advance(task))
    layers = model.config.text_config.num_hidden_layers
    reduced = "" if reduce == 1 else f", widths / {reduce}, {layers} layers"
    title = f"{shape}{reduced}, {chosen.visual} visual tokens, {dtype}, {device}"
    settings = {"title": title, "shape": shape, "reduce": reduce, "dtype": dtype, "device": device}
    numbers = {**settings, **stamp(), "rows": [row.to_dict() for row in rows]}
    publish(bench_report.result(numbers), "bench", out, as_json)


def _machine(device: str | None, dtype: str | None, reduce: int | None) -> tuple[str, str, int]:
    """Device, dtype and divisor of the widths; where they are not given, those that suit this machine."""
    import torch

    from vlmprune.loading.models import check_device

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    on_gpu = not device.startswith("cpu")
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    return device, dtype, reduce or (1 if on_gpu else 8)


def _check(recipes: list[str] | None) -> None:
    """Refuse a mistyped name before torch is imported."""
    for text in recipes or ():
        names.check_recipe(text)
