"""Commands that compare methods and recipes: `vlmprune eval | sweep | bench`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from vlmprune import names
from vlmprune.cli import options, terminal
from vlmprune.cli.results import Found, prepare, publish
from vlmprune.errors import unknown
from vlmprune.loading.environment import environment, quiet
from vlmprune.show.table import code, table

SHAPES = "llava-1.5-7b, llava-next-7b or qwen2.5-vl-7b"
DTYPES = ("bfloat16", "float16", "float32")


def evaluate(
    recipe: options.Recipes = None,
    images: Annotated[int, typer.Option(metavar="N", min=2, help="How many scenes; about ten questions about each.")] = 150,
    split: options.Split = "test",
    out: options.Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure the accuracy of recipes on the embedded model, by skill, beside the un-pruned model."""
    _check(recipe, split)
    prepare(out)
    quiet()
    from vlmprune import tiny
    from vlmprune.evals import offline

    model, processor = tiny.load()
    recipes = recipe or list(offline.DEFAULT)
    with terminal.progress() as progress:
        task = progress.add_task("recipes", total=len(recipes) + 1)
        rows = offline.evaluate(model, processor, recipes, images, split, lambda: progress.advance(task))
    skills = list(rows[0].by_skill)
    cells: list[tuple[str | Text, ...]] = [
        (
            code(row.recipe),
            *(f"{100 * row.by_skill[skill].value:.1f}" for skill in skills),
            f"{100 * row.mean:.1f}",
            "" if row is rows[0] else f"{100 * row.lost:.1f} {offline.percent(row.lost_interval)}",
            f"{100 * row.loyalty:.1f}",
        )
        for row in rows
    ]
    title = f"accuracy in %, {images} held-out scenes ({split})"
    found = Found(
        name="accuracy",
        numbers={"images": images, "split": split, "environment": environment(), "rows": [row.to_dict() for row in rows]},
        table=table(("recipe", *skills, "mean", "lost", "same answer"), cells, title=title),
        sentences=(),
        markdown=offline.markdown(rows),
        plot=partial(offline.plot, rows),
    )
    publish(found, out, as_json)


def sweep(
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A pruning method; may be repeated. If not given: all.")
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the visual tokens that enter a decoder layer, on average over layers; may be repeated. If not "
            "given: 0.5, 0.35, 0.25, 0.15 and 0.1.",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(metavar="N", min=1, help="How often; each time with other scenes and random draws.")
    ] = 3,
    images: Annotated[int, typer.Option(metavar="N", min=2, help="How many scenes for each seed.")] = 100,
    split: options.Split = "test",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also write numbers, tables and figure here; an interrupted sweep continues from this folder.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads. If not given: torch decides.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare all pruning methods at equal compute on the embedded model, each with random tokens as its control."""
    for name in method or ():
        names.check_pruning(name, "sweep")
    _check(None, split)
    prepare(out)
    quiet()
    import torch

    from vlmprune import tiny
    from vlmprune.evals import sweep as evals

    if threads:
        torch.set_num_threads(threads)
    model, processor = tiny.load()
    plan = evals.make_plan(model, method, budget or evals.BUDGETS)
    with terminal.progress() as progress:
        task = progress.add_task("", total=None)
        tell = evals.Tell(
            lambda total: progress.update(task, total=total),
            lambda recipe: progress.update(task, description=recipe),
            lambda: progress.advance(task),
        )
        result = evals.sweep(model, processor, plan, seeds, images, split, out, tell)
    columns = ("method", "budget", "accuracy", "over random", "")
    title = f"accuracy in %, {seeds} × {images} held-out scenes ({split})"
    found = Found(
        name="sweep",
        numbers={"images": images, "seeds": seeds, "split": split, "environment": environment(), **result.to_dict()},
        table=table(columns, [evals.cells(row) for row in result.methods], title=title),
        sentences=evals.summary(result),
        markdown=evals.markdown(result),
        plot=partial(evals.plot, result),
    )
    publish(found, out, as_json)


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
    from vlmprune.evals.shapes import shape_named
    from vlmprune.loading.models import check_device

    chosen, device = shape_named(shape), device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    on_gpu = not device.startswith("cpu")
    if (dtype := dtype or ("bfloat16" if on_gpu else "float32")) not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    reduce = reduce or (1 if on_gpu else 8)
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
    found = Found(
        name="bench",
        numbers={**settings, "environment": environment(), "rows": [row.to_dict() for row in rows]},
        table=table(evals.COLUMNS, [evals.cells(row) for row in rows], title=title),
        sentences=[f"Share of vlmprune's own work in TTFT: {sentence}" for sentence in evals.overheads(rows)],
        markdown=f"{title}\n\n{evals.markdown(rows)}",
        plot=partial(evals.plot, rows, title),
    )
    publish(found, out, as_json)


def _check(recipes: list[str] | None, split: str | None = None) -> None:
    """Refuse a mistyped name before torch is imported."""
    for text in recipes or ():
        names.check_recipe(text)
    if split is not None:
        from vlmprune.tiny.scenes import SPLITS

        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
