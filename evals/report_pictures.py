"""Small pictures of the tokens that each method keeps, made with the embedded model and stored beside the results."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import vlmprune
from vlmprune import tiny
from vlmprune.errors import UsageError
from vlmprune.evals.report_lines import Comparison, Line
from vlmprune.evals.report_parts import Picture, Pictures, percent_of
from vlmprune.evals.report_read import KEPT, Source
from vlmprune.loading.questions import ReadyQuestion
from vlmprune.show.draw import kept_patches
from vlmprune.tiny.answers import LONGEST_ANSWER
from vlmprune.tiny.scenes import held_out

FILE = "kept.json"
WIDTH = 144
"""Of a picture, in pixels: twelve for each of the raster's twelve patches."""
COLOURS = 16
"""Of a picture's palette."""
ASKED = ("counting", "reading", "relation")
"""Skills of the questions: one for each scene."""
MOST = 20
"""Recipes that are drawn, at most."""


def chosen(found: Comparison) -> list[Line]:
    """The lines to draw: every method at the smallest budget that all have, else at its own smallest."""
    methods = list(found.methods.values())
    common = [budget for budget in found.budgets if all(any(line.budget == budget for line in own) for own in methods)]
    lines = [next((line for line in own if common and line.budget == common[-1]), own[-1]) for own in methods]
    return lines[:MOST]


def write(folder: Path, found: Comparison, split: str, tick: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Ask the embedded model one question about each of a few scenes under every recipe, and store what was kept.

    Args:
        folder: of the results; gets `kept.json`.
        found: whose recipes are drawn.
        split: of the scenes.
        tick: called with the number of drawn pictures and their total.
    """
    rows, lines = [], chosen(found)
    model, processor = tiny.load()
    for number, (picture, asked) in enumerate(_questions(split)):
        inputs = processor(images=picture, text=tiny.prompt(asked.text), return_tensors="pt")
        question = ReadyQuestion(model, processor, inputs, picture)
        rows.append(_row(question, asked, None, number))
        for line in lines:
            rows.append(_row(question, asked, line, number))
            tick(len(rows), len(ASKED) * (len(lines) + 1))
    text = json.dumps({"format": KEPT, "split": split, "rows": rows}, indent=1)
    (folder / FILE).write_text(text + "\n")


def _questions(split: str) -> Iterator[tuple[Any, Any]]:
    """A scene and a question about it, for each skill of `ASKED`; not one that is answered by 0 or 1."""
    scenes = iter(held_out(100, split))
    for skill in ASKED:
        yield next(
            (scene.image, asked)
            for scene in scenes
            for asked in scene.questions
            if asked.skill == skill and asked.answer not in ("0", "1")
        )


def _row(question: ReadyQuestion, asked: Any, line: Line | None, scene: int) -> dict[str, Any]:
    (crop,) = question.crops()
    kept, text = _answer(question, None if line is None else line.recipe)
    cells = [cell for cell, token in enumerate(crop.cells.flatten().tolist()) if token in kept]
    drawn = kept_patches(question.seen()[0], (crop.cells.shape[0], crop.cells.shape[1]), cells if line else [], WIDTH)
    if line is None:
        drawn = question.seen()[0].resize(drawn.size, 0)
    file = BytesIO()
    drawn.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return {
        "scene": scene,
        "question": asked.text,
        "skill": asked.skill,
        "truth": asked.answer,
        "name": "un-pruned" if line is None else line.name,
        "budget": None if line is None else line.budget,
        "recipe": None if line is None else line.recipe,
        "answer": text,
        "kept": len(kept),
        "of": crop.tokens,
        "png": base64.b64encode(file.getvalue()).decode(),
    }


def _answer(question: ReadyQuestion, recipe: str | None) -> tuple[set[int], str]:
    """Indices of the tokens left after the last stage, and the answer."""
    asked = question.inputs["input_ids"].shape[1]
    settings = {"do_sample": False, "max_new_tokens": LONGEST_ANSWER}
    with torch.inference_mode():
        if recipe is None:
            tokens, kept = question.model.generate(**question.inputs, **settings), set(range(question.crops()[0].tokens))
        else:
            with vlmprune.wrap(question.model, recipe) as run:
                tokens, record = question.model.generate(**question.inputs, **settings), run.last
            assert record is not None
            kept = set(record.kept[-1].index.tolist())
    return kept, question.processor.decode(tokens[0, asked:], skip_special_tokens=True).strip()


def stored(source: Source) -> list[Pictures]:
    """The pictures of a `kept.json`, a row for each scene."""
    rows: Sequence[dict[str, Any]] = source.numbers["rows"]
    found = []
    for scene in dict.fromkeys(row["scene"] for row in rows):
        own = [row for row in rows if row["scene"] == scene]
        title = f"“{own[0]['question']}” ({own[0]['skill']}; right answer: {own[0]['truth']})"
        found.append(Pictures(title, tuple(map(_picture, own))))
    return found


def _picture(row: dict[str, Any]) -> Picture:
    right, answer = row["answer"] == row["truth"], row["answer"] or "nothing"
    if row["recipe"] is None:
        kept, title, says = "all tokens", row["name"], "The scene as the model sees it."
    else:
        kept = f"{row['kept']} of {row['of']} tokens"
        title = f"`{row['name']}`" if row["budget"] is None else f"`{row['name']}` at {percent_of(row['budget'])}"
        says = f"The scene; the {kept} that {row['name']} keeps are framed."
    return Picture(title, row["png"], says, (kept, f"answer: {answer}"), right)


def drawn(folder: Path) -> list[Pictures]:
    """Pictures that `vlmprune run --draw` wrote into the folder as kept*.png."""
    files = sorted(folder.glob("kept*.png"))
    pictures = tuple(
        Picture(path.name, base64.b64encode(path.read_bytes()).decode(), f"Kept tokens, from the file {path.name}.")
        for path in files
    )
    return [Pictures("Pictures found in the folder", pictures)] if pictures else []


def check(found: Sequence[Comparison], model: str) -> None:
    """Refuse pictures that cannot be made.

    Raises:
        UsageError: there are no recipes to draw, or they are of another model.
    """
    if model != "tiny":
        raise UsageError(
            f"--pictures draws with the embedded model, and these results are of {model}: draw with `vlmprune run --model "
            f"{model} --draw kept-1.png` into this folder, and leave out --pictures."
        )
    if not found:
        raise UsageError("--pictures needs recipes to draw: there is neither sweep.json nor accuracy.json in this folder.")
