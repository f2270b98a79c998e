"""Zero-shot classification and retrieval of models of pictures and texts, under recipes, beside the un-pruned model.

Each batch of pictures is embedded un-pruned and under every recipe, one after the other, so that speeds are compared within the
same seconds; texts are embedded once, because only the image tower is pruned. A class is the mean of its texts, one for each
template (as `open_clip.build_zero_shot_classifier`).
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import vlmprune
from vlmprune.evals.answering import recipe_name
from vlmprune.evals.answers import UNPRUNED
from vlmprune.evals.fingerprints import recipe_fingerprint
from vlmprune.evals.stats import Difference, Estimate, correct, difference, estimate
from vlmprune.evals.stopwatch import wait
from vlmprune.evals.store import Row as Stored
from vlmprune.evals.store import Store
from vlmprune.evals.zero_shot_data import PictureSet
from vlmprune.loading.image_text import ImageText
from vlmprune.loading.pictures import open_picture

TEMPLATES = ("a photo of a {}.",)
BATCH = 32
CANDIDATES = tuple(f"{method}:fraction={kept}" for method in ("evit", "flowcut", "random", "tome") for kept in (0.5, 0.25))
"""Recipes if none is given; those that a tower cannot host are left out."""
AT = (1, 5, 10)
"""The k of recall@k."""


@dataclass(frozen=True)
class Row:
    """One recipe's result.

    Attributes:
        recipe: the recipe, or "un-pruned".
        scores: by measure ("top-1", "text R@5", …): the share of pictures (of captions) with its 95 % interval.
        lost: by measure: the un-pruned model's score minus this one's, paired, corrected by Holm's method for all recipes.
        per_second: pictures per second in `encode_image`, the median over batches.
        speedup: how many times faster than un-pruned, within the same batch: median, lower and upper quartile.
        bound: how many times fewer FLOPs the blocks of the tower compute than un-pruned.
    """

    recipe: str
    scores: dict[str, Estimate]
    lost: dict[str, Difference]
    per_second: float
    speedup: tuple[float, float, float]
    bound: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Row:
        """A row from its plain data."""
        scores = {name: Estimate(**entry) for name, entry in data["scores"].items()}
        lost = {name: Difference(**entry) for name, entry in data["lost"].items()}
        return Row(**{**data, "scores": scores, "lost": lost, "speedup": tuple(data["speedup"])})


def usual_recipes(model: Any) -> tuple[list[str], list[str]]:
    """The usual recipes that a model can host, and why the others are left out."""
    chosen, reasons = [], []
    for recipe in CANDIDATES:
        try:
            vlmprune.wrap(model, recipe).remove()
        except vlmprune.UsageError as error:
            reasons.append(f"{recipe} is left out: {error}")
        else:
            chosen.append(recipe)
    return chosen, reasons


def measure(
    model: ImageText,
    pictures: PictureSet,
    recipes: Mapping[str, vlmprune.Recipe],
    templates: Sequence[str] = TEMPLATES,
    batch: int = BATCH,
    store: Store | None = None,
    tick: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> list[Row]:
    """Every recipe on all pictures; the first row is the un-pruned model.

    Args:
        model: un-wrapped.
        pictures: with their classes, or with captions.
        recipes: by the names of their rows.
        templates: sentences with {} in the place of a class's name.
        batch: pictures at once.
        store: where finished batches are kept. None: in memory.
        tick: called before each step with a word for it, and how many of how many are done.

    Raises:
        vlmprune.UsageError: a recipe cannot be applied (before anything is computed), or a picture cannot be read.
    """
    for recipe in recipes.values():
        vlmprune.wrap(model.model, recipe).remove()
    plan: dict[str, vlmprune.Recipe | None] = {UNPRUNED: None, **recipes}
    store = Store(None, {}) if store is None else store
    texts = class_texts(model, pictures.classes, templates) if pictures.classes else None
    starts = range(0, len(pictures), batch)
    for number, start in enumerate(starts):
        tick("pictures", start, len(pictures))
        order = [*plan][number % len(plan) :] + [*plan][: number % len(plan)]
        left = [name for name in order if _key(plan[name], start) not in store]
        if not left:
            continue
        pixels = model.pixels([open_picture(path) for path in pictures.paths[start : start + batch]])
        embedded = {name: _embed(model, plan[name], pixels) for name in order if name in left or name == UNPRUNED}
        for name in left:
            features, row = embedded[name]
            row["seconds_unpruned"] = embedded[UNPRUNED][1]["seconds"]  # of now, also where its own row is from another day
            if texts is None:
                row["features"] = base64.b64encode(features.cpu().numpy().astype("<f4").tobytes()).decode()
            else:
                row["ranks"] = ranks(features @ texts.T, pictures.labels[start : start + batch])
            store.add(_key(plan[name], start), row)
    rows = {name: [store[_key(recipe, start)] for start in starts] for name, recipe in plan.items()}
    hits = _classified(rows) if texts is not None else _retrieved(rows, pictures, model)
    return _rows(rows, hits, pictures, batch)


def _key(recipe: vlmprune.Recipe | None, start: int) -> tuple[str | int, ...]:
    return recipe_name(recipe), recipe_fingerprint(recipe), start


@torch.no_grad()
def _embed(model: ImageText, recipe: vlmprune.Recipe | None, pixels: Tensor) -> tuple[Tensor, Stored]:
    """`[image, dim]` of one batch, and what it took."""
    with nullcontext() if recipe is None else vlmprune.wrap(model.model, recipe) as run:
        wait(pixels.device)
        begin = time.perf_counter()
        features = model.images(pixels)
        wait(pixels.device)
        row: Stored = {"images": len(pixels), "seconds": time.perf_counter() - begin, "flops": 1, "flops_unpruned": 1}
        if run is not None:
            report = run.report()
            row |= {"flops": report.flops, "flops_unpruned": report.flops_unpruned}
    return features, row


def class_texts(model: ImageText, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """`[class, dim]` unit vectors: of each class the mean of its texts, one for each template."""
    found = [normalize(model.texts([template.format(name) for template in templates]).mean(dim=0), dim=0) for name in classes]
    return torch.stack(found)


def ranks(scores: Tensor, right: Sequence[int]) -> list[int]:
    """How many columns of `[row, column]` stand before the right one of each row; of equal scores, the lower columns do."""
    own = torch.tensor(right, device=scores.device)[:, None]
    best = scores.gather(1, own)
    before = (scores > best) | ((scores == best) & (torch.arange(scores.shape[1], device=scores.device) < own))
    return before.sum(dim=1).tolist()


Hits = dict[str, dict[str, tuple[np.ndarray, list[int]]]]
"""By measure and recipe: 0 or 1 for each question, and the picture that it is about."""


def _classified(rows: Mapping[str, Sequence[Stored]]) -> Hits:
    found: Hits = {}
    for name, batches in rows.items():
        rank = np.array([one for row in batches for one in row["ranks"]])
        for k in (1, 5):
            found.setdefault(f"top-{k}", {})[name] = (rank < k).astype(float), list(range(len(rank)))
    return found


def _retrieved(rows: Mapping[str, Sequence[Stored]], pictures: PictureSet, model: ImageText) -> Hits:
    captions = [caption for own in pictures.captions for caption in own]
    owner = [number for number, own in enumerate(pictures.captions) for _ in own]
    texts = torch.cat([model.texts(captions[start : start + 256]) for start in range(0, len(captions), 256)]).cpu()
    of_picture = torch.tensor(owner)
    found: Hits = {}
    for name, batches in rows.items():
        data = b"".join(base64.b64decode(row["features"]) for row in batches)
        images = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(len(pictures), -1)
        scores = images @ texts.T
        own = of_picture == torch.arange(len(pictures))[:, None]
        best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        to_text = ((scores >= best) & ~own).sum(dim=1).numpy()  # another picture's caption wins a tie
        to_image = np.array(ranks(scores.T, owner))
        for k in AT:
            found.setdefault(f"text R@{k}", {})[name] = (to_text < k).astype(float), list(range(len(pictures)))
        for k in AT:
            found.setdefault(f"image R@{k}", {})[name] = (to_image < k).astype(float), owner
    return found


def _rows(rows: Mapping[str, Sequence[Stored]], hits: Hits, pictures: PictureSet, batch: int) -> list[Row]:
    lost: dict[str, dict[str, Difference]] = {}
    for kind, by_recipe in hits.items():
        plain, unit = by_recipe[UNPRUNED]
        found = {name: difference(plain, own, unit) for name, (own, _) in by_recipe.items() if name != UNPRUNED}
        lost[kind] = correct(found)
    whole = [number for number, row in enumerate(rows[UNPRUNED]) if row["images"] == batch]
    timed = whole[1:] or whole or [0]  # the first warms up
    made = []
    for name, batches in rows.items():
        ratios = [batches[number]["seconds_unpruned"] / batches[number]["seconds"] for number in timed]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        made.append(
            Row(
                recipe=name,
                scores={kind: estimate(*by_recipe[name]) for kind, by_recipe in hits.items()},
                lost={kind: own[name] for kind, own in lost.items() if name in own},
                per_second=float(np.median([batches[number]["images"] / batches[number]["seconds"] for number in timed])),
                speedup=(middle, low, high),
                bound=sum(row["flops_unpruned"] for row in batches) / sum(row["flops"] for row in batches),
            )
        )
    return made
