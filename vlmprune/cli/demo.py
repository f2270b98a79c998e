"""`vlmprune demo`: the embedded model answers questions about held-out scenes, un-pruned and under a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from vlmprune import tiny
from vlmprune.cli.asking import compare, draw_kept
from vlmprune.loading.outputs import make_folder
from vlmprune.loading.questions import ReadyQuestion
from vlmprune.loading.recipes import read_recipe
from vlmprune.show import draw
from vlmprune.tiny.scenes import held_out

if TYPE_CHECKING:
    from PIL import Image

    from vlmprune.cli.asking import Answer
    from vlmprune.recipe import Recipe
    from vlmprune.tiny.scenes import Scene

WIDTH = 300
"""Of one drawn picture, in pixels."""
LONGEST = 4
"""Tokens of an answer."""


def run_demo(recipe: str, images: int, out: Path, tick: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Ask the embedded VLM three questions of different skills about each of `images` scenes, and draw what was kept.

    Args:
        recipe: a string, or the path or hub id of a recipe file.
        images: how many scenes.
        out: folder for the drawing.
        tick: called after every scene.

    Returns:
        The answers, the mean costs, and the path of the drawing: what `vlmprune demo --json` prints.

    Raises:
        UsageError: the recipe cannot be read or applied, or the folder not be written to.
    """
    plan = read_recipe(recipe)
    make_folder(out)
    model, processor = tiny.load()
    rows, drawings, costs = [], [], []
    for number, scene in enumerate(held_out(images, "test")):
        whole = draw.kept_patches(scene.image, (1, 1), [0], WIDTH)
        cells = [draw.captioned(whole, [("what the model sees", "black"), (recipe, "grey")])]
        for asked in _one_per_skill(scene.questions, number):
            answers, cost, drawn = _ask(model, processor, scene, asked, plan)
            rows.append({"picture": number, "question": asked.text, "truth": asked.answer, **answers})
            costs.append(cost)
            cells.append(drawn)
        drawings.append(draw.side_by_side(cells))
        tick()
    target = out / "kept.png"
    draw.stacked(drawings).save(target)
    sides = {
        side: {
            **{key: mean(cost[side][key] for cost in costs) for key in ("visual_tokens", "prefill_ms", "mflops", "kv_kib")},
            "right": sum(row[side] == row["truth"] for row in rows),
        }
        for side in ("unpruned", "pruned")
    }
    return {"recipe": recipe, "answers": rows, **sides, "picture": str(target)}


def _ask(
    model: Any, processor: Any, scene: Scene, asked: Any, plan: Recipe
) -> tuple[dict[str, str], dict[str, dict[str, Any]], Image.Image]:
    """Both answers to one question, their costs, and the drawing of the kept tokens."""
    inputs = processor(images=scene.image, text=tiny.prompt(asked.text), return_tensors="pt")
    question = ReadyQuestion(model, processor, inputs, scene.image)
    timed = dict(zip(("unpruned", "pruned"), compare(question, plan, LONGEST), strict=True))
    pruned: Answer = timed["pruned"][0]
    caption = [
        (asked.text, "black"),
        (f"pruned: {pruned.text}", "darkgreen" if pruned.text == asked.answer else "firebrick"),
    ]
    drawn = draw.captioned(draw_kept(question, pruned.crops, WIDTH), caption)
    cost = {side: answer.to_dict() | {"prefill_ms": ms} for side, (answer, ms) in timed.items()}
    return {side: answer.text for side, (answer, _) in timed.items()}, cost, drawn


def _one_per_skill(questions: Sequence[Any], start: int) -> list[Any]:
    """Three questions of different skills; the next picture begins with the next skills."""
    first = {question.skill: question for question in reversed(questions)}
    skills = sorted(first)
    return [first[skills[(3 * start + offset) % len(skills)]] for offset in range(min(3, len(skills)))]
