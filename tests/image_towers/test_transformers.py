"""Image towers of transformers: CLIP and SigLIP, alone or with their text towers."""

from __future__ import annotations

import pytest
import torch
from image_towers.promises import RECIPES, WITHOUT_CLS, compare, keeps_all
from image_towers.towers import TRANSFORMERS, build

pytestmark = pytest.mark.usefixtures("no_grad")

CELLS = [
    (name, what)
    for name in TRANSFORMERS
    for what in (RECIPES if TRANSFORMERS[name].before else WITHOUT_CLS)
    if name in ("clip", "siglip") or what in ("between blocks", "merging", "before the tower")
]


@pytest.mark.parametrize(("name", "what"), CELLS)
def test_exact(name, what):
    """Red: a hidden patch is seen, a picture sees its batch, padding is averaged, or removing leaves something."""
    record = compare(*build(name, dtype=torch.float64), RECIPES[what])
    if what in ("between blocks", "before the tower"):
        assert any(left.valid is not None for left in record.left), "no picture was padded: the test shows too little"


@pytest.mark.parametrize(("name", "what"), [("clip", "between blocks"), ("siglip", "before the tower")])
def test_exact_in_single_precision(name, what):
    compare(*build(name), RECIPES[what])


@pytest.mark.parametrize("recipe", ["flowcut:fraction=1", "tome:layer=2,fraction=1", "random:layer=0,tokens=1000"])
def test_keeps_all(recipe):
    keeps_all(*build("clip"), recipe)


@pytest.mark.parametrize("recipe", ["tome:layer=2,fraction=1", "divprune:layer=0,tokens=36"])
def test_keeps_all_without_cls(recipe):
    keeps_all(*build("siglip"), recipe)
