"""`vlmprune eval` on a model of pictures and texts: zero-shot classification, or retrieval by captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmprune import names
from vlmprune.cli import terminal
from vlmprune.errors import UsageError
from vlmprune.evals.fingerprints import code_fingerprint, versions, weights_fingerprint
from vlmprune.evals.results import stamp
from vlmprune.evals.store import Store
from vlmprune.evals.zero_shot import BATCH, TEMPLATES, measure, usual_recipes
from vlmprune.evals.zero_shot_data import PictureSet, open_pictures
from vlmprune.loading.image_text import load_image_text
from vlmprune.loading.recipes import read_recipe

STORE = "zero-shot-batches"
"""Folder of the store, in that of the results."""


def check_options(given: Mapping[str, Any], templates: Sequence[str]) -> None:
    """Refuse options that are about questions, and templates without a place for the class.

    Args:
        given: values of those options by their names; None, False or empty where they were not given.

    Raises:
        UsageError: says which.
    """
    if wrong := [option for option, value in given.items() if value]:
        raise UsageError(
            f"{' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} about questions, but --data has pictures by class or "
            "caption: leave out what does not apply."
        )
    for template in templates:
        try:
            good = template.format("cat") != template.format("dog")
        except (AttributeError, IndexError, KeyError, ValueError):
            good = False
        if not good:
            raise UsageError(f'--template {template!r} has no single place for the class: write one as "a photo of a {{}}."')


def evaluate(
    model: str,
    data: str,
    recipes: Sequence[str] | None,
    count: int | None,
    templates: Sequence[str] | None,
    batch: int | None,
    device: str,
    out: Path | None,
) -> dict[str, Any]:
    """Classify or retrieve what has no result yet.

    Args:
        model: its name.
        data: folder of the pictures.
        recipes: None for the usual ones.
        count: pictures to use; None for all.
        templates: texts with {} in the place of the class; None for the usual one.
        batch: pictures at once; None for the usual number.
        device: where the model goes.
        out: folder of the results.

    Returns:
        The numbers.

    Raises:
        UsageError: a recipe, the pictures or the model cannot be used; says why.
    """
    if model == "tiny":
        raise UsageError(
            "the embedded model answers questions, and --data has pictures by class or caption: give --model "
            "open_clip:NAME/PRETRAINED, or a folder with a CLIP or SigLIP model of transformers."
        )
    chosen = None if recipes is None else {text: read_recipe(text) for text in recipes}
    pictures = open_pictures(data, count)
    loaded = load_image_text(model, device)
    notes: list[str] = []
    if chosen is None:
        usual, notes = usual_recipes(loaded.model)
        chosen = {text: read_recipe(text) for text in usual}
    terminal.note(notes)
    written, size = tuple(templates or TEMPLATES) if pictures.classes else (), batch or BATCH
    settings = _settings(model, loaded.model, device, pictures, written, size)
    code = code_fingerprint("zero_shot")
    with Store(None if out is None else out / STORE, settings, code) as store, terminal.steps(True) as tick:
        rows = measure(loaded, pictures, chosen, written or TEMPLATES, size, store, tick)
    return {
        "model": model,
        "data": data,
        "pictures": len(pictures),
        "classes": len(pictures.classes),
        "captions": sum(map(len, pictures.captions)),
        "fingerprint": pictures.fingerprint,
        "templates": list(written),
        "batch": size,
        "device": device,
        "notes": [*notes, *(f"the recipe in {text} is {recipe}" for text, recipe in chosen.items() if names.is_file(text))],
        **stamp(),
        "rows": [row.to_dict() for row in rows],
    }


def _settings(name: str, model: Any, device: str, pictures: PictureSet, templates: Sequence[str], batch: int) -> dict[str, Any]:
    """Everything beside the recipe and the code that a result depends on."""
    return {
        "model": Path(name).name,
        "weights": weights_fingerprint(model),
        "device": device,
        "pictures": pictures.fingerprint,
        "templates": list(templates),
        "batch": batch,
        "versions": versions(),
    }
