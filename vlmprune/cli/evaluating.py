"""Recipes measured on one set of questions: what `vlmprune eval` computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmprune import names
from vlmprune.cli import terminal
from vlmprune.cli.data import Data
from vlmprune.evals import accuracy
from vlmprune.evals.answering import settings_of
from vlmprune.evals.asking import BATCH_SIZE, Asking
from vlmprune.evals.fingerprints import code_fingerprint
from vlmprune.evals.questions import CLIPS, SCENES
from vlmprune.evals.results import stamp
from vlmprune.evals.shards import Shard
from vlmprune.evals.store import Store
from vlmprune.loading.models import open_model
from vlmprune.loading.recipes import read_recipe
from vlmprune.recipe import Recipe

STORE = "eval-answers"
"""Folder of the store, in that of the results."""


def measure(
    model: str,
    data: Data,
    recipes: Sequence[str] | None,
    batch: int | None,
    shard: Shard,
    device: str,
    device_map: str | None,
    out: Path | None,
    wait: float,
) -> dict[str, Any] | None:
    """Ask what has no answer yet.

    Args:
        model: its name.
        data: the questions.
        recipes: None for the usual ones.
        batch: questions at once; None for the usual number.
        shard, wait: which process this is, and how many minutes it waits for the others.
        device, device_map: where the model goes.
        out: folder of the results.

    Returns:
        The numbers; None for another rank than 0.

    Raises:
        UsageError: a recipe, the questions or the model cannot be used; says why.
    """
    chosen, notes = _recipes(recipes or accuracy.DEFAULT)
    scenes = data.name is None
    questions = data.open()
    kinds = ("video",) if any(question.videos for question in questions) else ("picture",)
    processor, read_weights = open_model(model, shard.device(device), device_map, shown=kinds)
    size = batch or (accuracy.SCENES_AT_ONCE if scenes else BATCH_SIZE)
    asking = Asking(processor, questions, size, encode_once=scenes or (data.name == CLIPS and model == "tiny-clips"))
    loaded = read_weights()
    terminal.note([*notes, *questions.notes])
    split = data.split or ("test" if scenes else None)
    settings = settings_of(model, loaded, processor, questions, size, split=split)
    with (
        Store(None if out is None else out / STORE, settings, code_fingerprint()) as store,
        terminal.steps(shard.speaks) as tick,
    ):
        keep = (lambda answered: None) if out is None else (lambda answered: answered.write(out))
        rows = accuracy.measure(loaded, asking, chosen, store, shard, wait, tick, keep)
    if rows is None:
        terminal.note([shard.answered])
        return None
    units = len({question.unit for question in questions})
    return {
        "images": units,
        "split": split,
        "model": model,
        "data": data.name or SCENES,
        "questions": len(questions),
        "pictures": units,
        "scorers": questions.scorers,
        "fingerprint": questions.fingerprint,
        "batch": size,
        "max_new_tokens": questions.max_new_tokens,
        "notes": list(questions.notes),
        "skipped": list(questions.skipped),
        **stamp(),
        "rows": [row.to_dict() for row in rows],
    }


def _recipes(texts: Sequence[str]) -> tuple[dict[str, Recipe], list[str]]:
    """Recipes by what their rows are called, and which files they came from, as sentences.

    A row says the recipe itself where it came from a file: the file may change, and the result is to say what was measured.

    Raises:
        UsageError: one cannot be read; says why.
    """
    chosen, notes = {}, []
    for text in texts:
        recipe = read_recipe(text)
        if names.is_file(text):
            notes.append(f"the recipe in {text} is {recipe}")
        chosen[str(recipe) if names.is_file(text) else text] = recipe
    return chosen, notes
