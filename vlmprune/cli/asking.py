"""One picture or video and one question to a model, un-pruned and under a recipe: answers, costs, and kept tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from vlmprune.cli.why import check_tokens, explained
from vlmprune.errors import UsageError
from vlmprune.live.handle import wrap
from vlmprune.live.report import Report
from vlmprune.loading.outputs import check_target
from vlmprune.loading.questions import ReadyQuestion, open_question
from vlmprune.loading.recipes import read_recipe
from vlmprune.recipe import Recipe
from vlmprune.show import draw

if TYPE_CHECKING:
    from PIL import Image

    from vlmprune.loading.shown import Shown

KEEP_ALL = "random:layer=0,fraction=1"
"""Computes exactly what the un-pruned model does, and is measured by the same clock as a pruned one."""
ROUNDS = 7
"""Prefills in a median."""
WIDTH, FRAME_WIDTH = 384, 256
"""Of a drawn picture, and of a frame, in pixels."""


@dataclass(frozen=True)
class KeptCrop:
    """The kept tokens of one raster of the picture or the video (`loading.questions.Crop`).

    Attributes:
        name, row: of the crop.
        rows, columns: of its raster.
        tokens: cells that have a token; the others are padding.
        kept: raster numbers of the cells whose token was kept.
    """

    name: str
    row: int
    rows: int
    columns: int
    tokens: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """An answer under one recipe.

    Attributes:
        text: what the model said.
        index: indices of the picture's kept tokens; of the video's, if there is no picture.
        crops: the kept tokens by crop and frame; of a picture and a video, those of both.
        report: of the run.
        why: of each token that was asked about, why it was kept or dropped.
        visual_tokens: how many visual tokens were kept.
    """

    text: str
    index: list[int]
    crops: list[KeptCrop]
    report: Report
    why: list[dict[str, Any]]
    visual_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """What `vlmprune run --json` prints of it."""
        return {
            "answer": self.text,
            "visual_tokens": self.visual_tokens,
            "mflops": self.report.flops / 1e6,
            "kv_kib": self.report.kv_bytes / 1024,
        }


class _Counter:
    """A streamer of `generate`, which puts the prompt first and then token after token; it counts the tokens."""

    def __init__(self, tick: Callable[[int, bool], None]) -> None:
        self.tick, self.tokens = tick, -1

    def put(self, value: Any) -> None:
        self.tokens += 1
        self.tick(self.tokens, False)

    def end(self) -> None:
        self.tick(self.tokens, True)


def ask(
    question: ReadyQuestion,
    recipe: Recipe,
    max_new_tokens: int,
    tick: Callable[[int, bool], None] = lambda tokens, done: None,
    why: Sequence[int] = (),
) -> Answer:
    """Answer a question under a recipe, by greedy decoding.

    Args:
        tick: called after every token with the number of tokens so far, and at the end.
        why: tokens of the picture to explain.
    """
    model, inputs = question.model, question.inputs
    with wrap(model, recipe, explain=bool(why)) as run, torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, streamer=_Counter(tick))
        report, record, reasons = run.report(), run.last, explained(run, question, why)
    assert record is not None
    new = tokens[0, inputs["input_ids"].shape[1] :]
    left = _left(question, record)
    text = question.processor.decode(new, skip_special_tokens=True).strip()
    kept = sum(map(len, left.values())) if record.kept else record.visual
    return Answer(text, left[0], _by_crop(question, left), report, reasons, kept)


def _left(question: ReadyQuestion, record: Any) -> dict[int, list[int]]:
    """Indices of the tokens that the last stage left, of the picture or video 0, and of the video behind a picture, 1."""
    left = {crop.ordinal: list(range(record.visual)) for crop in question.crops()}
    for kept in record.kept:  # stage by stage
        if kept.sample == 0 and kept.ordinal in left:
            left[kept.ordinal] = kept.index.tolist()
    return left


def _by_crop(question: ReadyQuestion, left: dict[int, list[int]]) -> list[KeptCrop]:
    kept = {ordinal: set(index) for ordinal, index in left.items()}
    return [
        KeptCrop(
            crop.name,
            crop.row,
            crop.cells.shape[0],
            crop.cells.shape[1],
            crop.tokens,
            tuple(cell for cell, token in enumerate(crop.cells.flatten().tolist()) if token in kept[crop.ordinal]),
        )
        for crop in question.crops()
    ]


def compare(question: ReadyQuestion, recipe: Recipe, max_new_tokens: int) -> tuple[tuple[Answer, float], tuple[Answer, float]]:
    """The answers without and with a recipe, each with the time of its prefill in ms: a median of interleaved rounds."""
    recipes = (Recipe.of(KEEP_ALL), recipe)
    answers = [ask(question, recipe, max_new_tokens) for recipe in recipes]
    times = [[answer.report.prefill_ms] for answer in answers]
    for _ in range(ROUNDS - 1):
        for taken, recipe in zip(times, recipes, strict=True):
            with wrap(question.model, recipe) as run, torch.inference_mode():
                question.model.generate(**question.inputs, do_sample=False, max_new_tokens=1)
                taken.append(run.report().prefill_ms)
    plain, pruned = zip(answers, map(median, times), strict=True)
    return plain, pruned


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
    image: Path | Shown,
    prompt: str,
    recipe: str,
    max_new_tokens: int,
    device: str,
    target: Path | None,
    progress: Callable[[str, int, bool], None] = lambda step, tokens, done: None,
    why: Sequence[int] = (),
    device_map: str | None = None,
) -> tuple[dict[str, Any], Image.Image | None]:
    """One question about a picture or a video, to any supported model: one un-pruned answer and one under the recipe.

    Args:
        model_name: path of a folder, hub id, or 'tiny' for the embedded model.
        image: path of a picture; or what is shown, a video among it.
        prompt: the question; or the whole prompt, if it has the image or the video token.
        recipe: a string, or the path or hub id of a recipe file.
        max_new_tokens: the longest answer.
        device: where the model goes.
        target: where the caller will write the picture with the kept tokens; None if it is not wanted.
        progress: called with the present step, the number of tokens that its answer has so far, and whether it is done.
        why: tokens of the picture to explain.
        device_map: how to spread a large model over several devices instead.

    Returns:
        What `vlmprune run --json` prints, and the picture. The caller writes it, so that the answers can be printed first.

    Raises:
        UsageError: the recipe, the picture, the model, the prompt or the target cannot be used, or a token to explain does not
            exist; says why.
    """
    plan = read_recipe(recipe)
    if why and not plan.pruners:
        raise UsageError(f"the recipe {plan} drops no visual tokens, so that there is nothing to explain: leave out --why.")
    if target is not None:
        check_target(target, "kept.png")
    loading = partial(progress, "loading the model", 0, False)
    question = open_question(model_name, image, prompt, device, loading, device_map)
    check_tokens(question, why)
    changed = "pruned" if plan.pruners else "redistributed"
    # The answer under the recipe comes first: if the recipe is refused, no time was spent on the un-pruned answer.
    pruned = ask(question, plan, max_new_tokens, partial(progress, f"{changed} answer"), why)
    plain = ask(question, Recipe.of(KEEP_ALL), max_new_tokens, partial(progress, "un-pruned answer"))
    result = {
        "model": model_name,
        "recipe": str(plan),
        **_seen(question),
        "unpruned": plain.to_dict(),
        "pruned": pruned.to_dict(),
        "kept": pruned.index,
        "views": [asdict(crop) for crop in pruned.crops],  # crops; the key keeps its name, which scripts read
        "edits": [{**asdict(edit), "summary": str(edit)} for edit in pruned.report.edits],
        **({"why": pruned.why} if why else {}),
    }
    return result, None if target is None else draw_kept(question, pruned.crops)


def _seen(question: ReadyQuestion) -> dict[str, Any]:
    """What `vlmprune run --json` prints of the picture and of the video."""
    found: dict[str, Any] = {}
    if (picture := question.picture) is not None:
        found["picture"] = {"width": picture.width, "height": picture.height, "notes": question.notes}
    if (video := question.video) is not None:
        width, height = video.frames[0].size
        of_video = {"width": width, "height": height, "frames": video.index, "total": video.total, "times": video.times}
        found["video"] = {**of_video, "notes": [] if picture is not None else question.notes}
    return found


def notes_of(result: dict[str, Any]) -> list[str]:
    """What was lost when the picture and the video were read."""
    return [note for shown in ("picture", "video") if shown in result for note in result[shown]["notes"]]


def keep_and_draw(
    model_name: str, shown: Shown, prompt: str, recipe: str, device: str, device_map: str | None, target: Path
) -> tuple[list[KeptCrop], Image.Image, list[str]]:
    """What a recipe keeps of a picture or a video, in one prefill: by crop and frame, drawn, and what was lost in reading.

    Raises:
        UsageError: as `ask_and_draw`; or the recipe drops nothing.
    """
    plan = read_recipe(recipe)
    if not plan.pruners:
        raise UsageError(f"the recipe {plan} drops no visual tokens, so that there is nothing to draw: give one that prunes.")
    check_target(target, "kept.png")
    question = open_question(model_name, shown, prompt, device, device_map=device_map)
    with wrap(question.model, plan) as run, torch.inference_mode():
        question.model(**question.inputs)
    crops = _by_crop(question, _left(question, run.last))
    return crops, draw_kept(question, crops), question.notes


def draw_kept(question: ReadyQuestion, crops: list[KeptCrop], width: int = WIDTH) -> Image.Image:
    """The picture with its kept tokens; where there are several crops or frames, each of them with a caption."""
    width = width if question.video is None else min(width, FRAME_WIDTH)
    drawn = [
        draw.kept_patches(seen, (crop.rows, crop.columns), crop.kept, width)
        for seen, crop in zip(question.seen(), crops, strict=True)
    ]
    if len(drawn) == 1:
        return drawn[0]
    rows: dict[int, list[Image.Image]] = {}
    for picture, crop in zip(drawn, crops, strict=True):
        caption = [(f"{crop.name}: {len(crop.kept)} of {crop.tokens} tokens", "black")]
        rows.setdefault(crop.row, []).append(draw.captioned(picture, caption))
    return draw.stacked([draw.side_by_side(row) for row in rows.values()])
