"""What is promised of an image tower under a recipe."""

from __future__ import annotations

from typing import Any

import torch
from image_towers.towers import Tower, masked, pictures
from torch import Tensor, nn

import vlmprune as vp

EXACT = {torch.float32: 5e-6, torch.float64: 1e-10}
"""Absolute, for features of about 1."""
MOVED = 1e-3
"""Less than this is no change that a recipe made."""
RECIPES = {
    "between blocks": "flowcut:tokens=6",
    "by CLS attention": "cls:layer=2,tokens=6",
    "before the first block": "divprune:layer=0,tokens=7",
    "merging": "tome:layer=2,tokens=6",
    "two stages": "random:layer=1|3,tokens=9|5",
    "before the tower": "pixelprune",
    "before and between": "pixelprune:tokens=24 + flowcut:tokens=9",
    "fusing": "pixelprune + evit:tokens=6",
    "two methods": "flowcut:tokens=12 + divprune:layer=3,tokens=9",
}
WITHOUT_CLS = {name: RECIPES[name] for name in ("before the tower", "before the first block", "merging", "two stages")}


def compare(tower: Tower, model: nn.Module, recipe: str, count: int = 4) -> Any:
    """A pruned batch against the un-pruned tower with the same patches masked, against pictures one by one, and against what
    the model computed before it was wrapped.

    Returns:
        The record of the batch.
    """
    pixels = pictures(count, tower.side).to(next(model.parameters()).dtype)
    plain = tower.encode(model, pixels)
    with vp.wrap(model, recipe) as run:
        pruned = tower.encode(model, pixels)
        record = run.last
        singles = torch.cat([tower.encode(model, picture[None]) for picture in pixels])
        with run.override(enabled=False):
            assert torch.equal(tower.encode(model, pixels), plain)
    expected = masked(tower, model, pixels, kept_by(record))
    close(pruned, expected)
    close(pruned, singles)
    assert (pruned - plain).abs().max() > MOVED, "the recipe changed nothing"
    assert torch.equal(tower.encode(model, pixels), plain)
    return record


def kept_by(record: Any) -> list[Any]:
    """What a record says about each place where patches were dropped, as the oracle takes it."""
    return [
        (left.block, left.of_pictures(left.cells), None if left.features is None else left.of_pictures(left.features))
        for left in record.left
    ]


def close(found: Tensor, expected: Tensor) -> None:
    assert (distance := float((found - expected).abs().max())) < EXACT[found.dtype], distance


def keeps_all(tower: Tower, model: nn.Module, recipe: str) -> None:
    """A recipe whose budget is every patch changes no bit."""
    pixels = pictures(3, tower.side)
    plain = tower.encode(model, pixels)
    with vp.wrap(model, recipe) as run:
        assert torch.equal(tower.encode(model, pixels), plain)
        assert run.report().flops == run.report().flops_unpruned
