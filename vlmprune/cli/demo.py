"""The main job end to end: a picture, a question, an answer with fewer visual tokens, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from vlmprune import names, tiny
from vlmprune.adapters.registry import family_of
from vlmprune.errors import UsageError
from vlmprune.live.handle import Run, wrap
from vlmprune.live.report import Report
from vlmprune.loading.models import check_target, make_folder, make_inputs, open_model, prompt_text
from vlmprune.loading.pictures import open_picture
from vlmprune.recipe import Recipe
from vlmprune.show import draw

KEEP_ALL = "random:layer=0,fraction=1"
"""Runs exactly as the un-pruned model does, but is measured by the same clock as the pruned one."""

ROUNDS = 7


def run_demo(recipe: str, images: int, out: Path) -> dict[str, Any]:
    """Ask the embedded VLM one question of each skill in turn, about `images` held-out scenes, and draw what was kept.

    Raises:
        UsageError: the recipe cannot be read or applied.
    """
    from rich.console import Console
    from rich.progress import track

    from vlmprune.tiny.scenes import held_out

    plan = read_recipe(recipe)
    make_folder(out)
    model, processor = tiny.load()
    answers, drawings, costs = [], [], []
    scenes, error = list(held_out(images, "test")), Console(stderr=True)
    for number, scene in enumerate(track(scenes, "asking", console=error, transient=True, disable=not error.is_terminal)):
        whole = draw.kept_patches(scene.image, (1, 1), [0], width=300)
        cells = [draw.captioned(whole, [("what the model sees", "black"), (recipe, "grey")])]
        for question in _one_per_skill(scene.questions, number):
            inputs = processor(images=scene.image, text=tiny.prompt(question.text), return_tensors="pt")
            plain, pruned, kept = compare(model, processor, inputs, plan, max_new_tokens=4)
            answers.append(
                {
                    "picture": number,
                    "question": question.text,
                    "truth": question.answer,
                    "unpruned": plain["answer"],
                    "pruned": pruned["answer"],
                }
            )
            costs.append((plain, pruned))
            (view,) = kept.views
            picture = draw.kept_patches(scene.image, (view.rows, view.columns), view.kept, width=300)
            right = pruned["answer"] == question.answer
            lines = [(question.text, "black"), (f"pruned: {pruned['answer']}", "darkgreen" if right else "firebrick")]
            cells.append(draw.captioned(picture, lines))
        drawings.append(draw.side_by_side(cells))
    target = out / "kept.png"
    draw.stacked(drawings).save(target)
    totals = [
        {
            **{key: mean(cost[side][key] for cost in costs) for key in ("visual_tokens", "prefill_ms", "mflops", "kv_kib")},
            "right": sum(row[name] == row["truth"] for row in answers),
        }
        for side, name in enumerate(("unpruned", "pruned"))
    ]
    return {"recipe": recipe, "answers": answers, "unpruned": totals[0], "pruned": totals[1], "picture": str(target)}


def ask_once(
    model_name: str, image: Path, prompt: str, recipe: str, max_new_tokens: int, device: str, target: Path | None
) -> dict[str, Any]:
    """`ask_and_draw`, with the picture written to `target`."""
    result, drawn = ask_and_draw(model_name, image, prompt, recipe, max_new_tokens, device, target)
    if drawn is not None and target is not None:
        drawn.save(target)
    return result


def ask_and_draw(
    model_name: str,
    image: Path,
    prompt: str,
    recipe: str,
    max_new_tokens: int,
    device: str,
    target: Path | None,
    tell: Callable[[str, int, bool], None] = lambda what, tokens, done: None,
) -> tuple[dict[str, Any], Image.Image | None]:
    """One picture, one question, any supported model: two generations, one un-pruned and one pruned. Also returns the picture
    with the kept patches, for `target`, where the caller writes it once the answers are told.

    Args:
        tell: called with what is being done, how many tokens of an answer there are so far, and whether it is complete.

    Raises:
        UsageError: the picture, the model, the prompt or the recipe cannot be used; says why.
    """
    plan = read_recipe(recipe)
    if not prompt.strip():
        raise UsageError("the prompt is empty: ask something about the picture.")
    if target is not None:
        check_target(target, "kept.png")
    notes: list[str] = []
    picture = open_picture(image, notes.append)
    tell("loading the model", 0, False)
    processor, read_weights = open_model(model_name, device)
    inputs = make_inputs(processor, picture, prompt_text(processor, prompt), device)
    model = read_weights()
    changed = "pruned" if plan.pruners else "redistributed"
    # The pruned answer comes first: what cannot be pruned is refused before the un-pruned model works for nothing.
    pruned, kept = ask(model, processor, inputs, plan, max_new_tokens, partial(tell, f"{changed} answer"))
    plain, _ = ask(model, processor, inputs, Recipe.of(KEEP_ALL), max_new_tokens, partial(tell, "un-pruned answer"))
    drawn = None if target is None else draw_views(processor, inputs, picture, kept.views)
    result = {
        "model": model_name,
        "recipe": str(plan),
        "picture": {"width": picture.width, "height": picture.height, "notes": notes},
        "unpruned": plain,
        "pruned": pruned,
        "kept": kept.index,
        "views": [asdict(view) for view in kept.views],
        "edits": [{**asdict(edit), "summary": str(edit)} for edit in kept.report.edits],
    }
    return result, drawn


def read_recipe(text: str) -> Recipe:
    """A recipe string; or a JSON file, a folder or a hub repository of one.

    Raises:
        UsageError: it is none of these, or cannot be read.
    """
    return Recipe.from_pretrained(text) if names.is_file(text) else Recipe.of(text)


@dataclass(frozen=True)
class View:
    """One grid of a picture's tokens.

    Attributes:
        name: "picture"; or, where a picture is packed from several views, "base view" and "crop 1, 1" (row, column), …
        row: of the views.
        rows, columns: of the grid.
        tokens: cells that became a token; the others are padding.
        kept: raster indices of the cells whose token is left.
    """

    name: str
    row: int
    rows: int
    columns: int
    tokens: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class KeptHere:
    """What is left of the first picture: indices into its tokens, the same by view, and the report."""

    index: list[int]
    views: list[View]
    report: Report

    @staticmethod
    def of(run: Run, inputs: Any) -> KeptHere:
        config: Any = run.model.config
        report, record = run.report(), run.last
        assert record is not None
        stages = [kept for kept in record.kept if kept.ordinal == 0 and kept.sample == 0]
        index = stages[-1].index.tolist() if stages else list(range(record.visual))
        grids = family_of(config).cells(inputs, config)[0]
        left, views = set(index), []
        for row, beside in enumerate(grids):
            for column, grid in enumerate(beside):
                name = "picture" if len(grids) == 1 else f"crop {row}, {column + 1}" if row else "base view"
                kept = tuple(cell for cell, token in enumerate(grid.flatten().tolist()) if token in left)
                rows, columns = grid.shape
                views.append(View(name, row, rows, columns, int((grid >= 0).sum()), kept))
        return KeptHere(index, views, report)


class _Counter(BaseStreamer):
    """Counts what `generate` puts: the prompt first, then token after token."""

    def __init__(self, tick: Callable[[int, bool], None] | None) -> None:
        self.tick, self.tokens = tick, -1

    def put(self, value: Any) -> None:
        self.tokens += 1
        if self.tick is not None:
            self.tick(self.tokens, False)

    def end(self) -> None:
        if self.tick is not None:
            self.tick(self.tokens, True)


def ask(
    model: Any,
    processor: Any,
    inputs: Any,
    recipe: Recipe,
    max_new_tokens: int,
    tick: Callable[[int, bool], None] | None = None,
) -> tuple[dict[str, Any], KeptHere]:
    """One greedy answer under a recipe, what its prefill cost, and what was kept."""
    counter = _Counter(tick)
    with wrap(model, recipe) as run, torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, streamer=counter)
        kept = KeptHere.of(run, inputs)
    report = kept.report
    answer = {
        "answer": processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(),
        "visual_tokens": len(kept.index),
        "mflops": report.flops / 1e6,
        "kv_kib": report.kv_bytes / 1024,
    }
    return answer, kept


def compare(
    model: Any, processor: Any, inputs: Any, recipe: Recipe, max_new_tokens: int
) -> tuple[dict[str, Any], dict[str, Any], KeptHere]:
    """Answer un-pruned and pruned, and time the prefill of both: `prefill_ms` are medians of interleaved rounds."""
    plans = (Recipe.of(KEEP_ALL), recipe)
    sides, times = [], []
    for plan in plans:
        answer, kept = ask(model, processor, inputs, plan, max_new_tokens)
        sides.append(answer)
        times.append([kept.report.prefill_ms])
    for _ in range(ROUNDS - 1):
        for side, plan in enumerate(plans):
            with wrap(model, plan) as run, torch.inference_mode():
                model.generate(**inputs, do_sample=False, max_new_tokens=1)
                times[side].append(run.report().prefill_ms)
    for answer, taken in zip(sides, times, strict=True):
        answer["prefill_ms"] = median(taken)
    return sides[0], sides[1], kept


@dataclass(frozen=True)
class Prepared:
    """A model, one picture and question as its inputs, and how to show them.

    Attributes:
        seen: the picture as the model sees it.
        grid: rows and columns of its tokens; None if it is packed from several views.
        notes: what the picture's values lost when it was read.
    """

    model: Any
    inputs: Any
    seen: Image.Image
    grid: tuple[int, int] | None
    notes: list[str]


def prepare(model_name: str, image: Path, prompt: str, device: str, target: Path) -> Prepared:
    """Everything a figure of one picture and question needs.

    Raises:
        UsageError: the picture, the model, the prompt or the target cannot be used; says why.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty: ask something about the picture.")
    check_target(target, "sinks.png", figure=True)
    notes: list[str] = []
    picture = open_picture(image, notes.append)
    processor, read_weights = open_model(model_name, device)
    inputs = make_inputs(processor, picture, prompt_text(processor, prompt), device)
    model = read_weights()
    (first, *_), *others = family_of(model.config).cells(inputs, model.config)[0]
    grid = None if others else (first.shape[0], first.shape[1])
    return Prepared(model, inputs, as_seen(processor, inputs, picture)[0], grid, notes)


def draw_views(processor: Any, inputs: Any, picture: Image.Image, views: Sequence[View]) -> Image.Image:
    """Each view of a picture with its kept tokens; a picture of one view without a caption."""
    seen = as_seen(processor, inputs, picture)
    drawn = [draw.kept_patches(shown, (v.rows, v.columns), v.kept) for shown, v in zip(seen, views, strict=True)]
    if len(drawn) == 1:
        return drawn[0]
    rows: dict[int, list[Image.Image]] = {}
    for picture, view in zip(drawn, views, strict=True):
        caption = [(f"{view.name}: {len(view.kept)} of {view.tokens} tokens", "black")]
        rows.setdefault(view.row, []).append(draw.captioned(picture, caption))
    return draw.stacked([draw.side_by_side(row) for row in rows.values()])


def as_seen(processor: Any, inputs: Any, picture: Image.Image) -> list[Image.Image]:
    """Each view of the picture as the model saw it: cropped and resized, where the pixels still form a picture."""
    pixels = inputs["pixel_values"]
    if pixels.ndim < 4:  # patches of a picture that was only resized
        return [picture]
    settings = processor.image_processor
    shown = []
    for view in pixels.flatten(0, -4):
        colours = view.float().cpu()
        if settings.do_normalize:
            middle, spread = (torch.tensor(values).view(3, 1, 1) for values in (settings.image_mean, settings.image_std))
            colours = colours * spread + middle
        colours = colours.clamp(0, 1) * 255 if settings.do_rescale else colours.clamp(0, 255)
        shown.append(Image.fromarray(colours.round().byte().permute(1, 2, 0).numpy()))
    return shown


def _one_per_skill(questions: Sequence[Any], start: int) -> list[Any]:
    """Three questions of different skills, other ones for every picture."""
    first = {question.skill: question for question in reversed(questions)}
    skills = sorted(first)
    return [first[skills[(3 * start + offset) % len(skills)]] for offset in range(min(3, len(skills)))]
