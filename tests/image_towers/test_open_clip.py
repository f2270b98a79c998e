"""Image towers of open_clip: its own ViT in all forms, and those of timm."""

from __future__ import annotations

import open_clip
import pytest
import torch
from image_towers.open_clip_towers import TOWERS
from image_towers.promises import RECIPES, WITHOUT_CLS, compare, keeps_all
from image_towers.towers import build, pictures

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")

ALL = ("ViT-B-32", "ViT-B-16, averages", "EVA02", "SigLIP")
"""Towers that have every recipe; the others one that pads between blocks, one that merges, and one that pads up to the end."""
SOME = ("between blocks", "merging", "before the tower")
CELLS = [
    (name, what)
    for name, tower in TOWERS.items()
    for what in (RECIPES if tower.before else WITHOUT_CLS)
    if name in ALL or (what in SOME and (name, what) != ("MobileCLIP", "before the tower"))  # its stem has several convolutions
]


def made(name, dtype=torch.float32):
    return build(name, TOWERS[name], dtype)


@pytest.mark.parametrize(("name", "what"), CELLS)
def test_exact(name, what):
    """Red: padding is averaged or pooled, rotary angles are not those of the patches that are left, a batch is no batch of
    singles, or removing leaves something."""
    record = compare(*made(name, torch.float64), RECIPES[what])
    if what in ("between blocks", "before the tower"):
        assert any(left.valid is not None for left in record.left), "no picture was padded: the test shows too little"


@pytest.mark.parametrize("name", TOWERS)
def test_exact_in_single_precision(name):
    compare(*made(name), RECIPES["between blocks" if TOWERS[name].before else "two stages"])


@pytest.mark.parametrize("name", TOWERS)
def test_keeps_all(name):
    keeps_all(*made(name), "flowcut:fraction=1" if TOWERS[name].before else "tome:layer=2,fraction=1")


def test_pair_of_features():
    """CoCa's tower returns a pair: pooled features, and one token for each learned query, however many patches are left."""
    model = made("CoCa")[1]
    pixels = pictures(3)
    with vp.wrap(model, "flowcut:tokens=6"):
        pooled, tokens = model.visual(pixels)
        singles = [model.visual(picture[None]) for picture in pixels]
    assert tokens.shape[1] == 4  # of 5 queries, the first is the pooled one
    torch.testing.assert_close(tokens, torch.cat([single[1] for single in singles]), rtol=0, atol=5e-6)
    torch.testing.assert_close(pooled, torch.cat([single[0] for single in singles]), rtol=0, atol=5e-6)


def test_own_functions_stay():
    """`create_model_and_transforms` and `zero_shot_classifier` work as before; the text tower is not touched."""
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=None, load_weights=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    names, templates = ["cat", "dog"], (lambda name: f"a photo of a {name}.",)
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    with vp.wrap(model.eval(), "flowcut:tokens=12") as run:
        again = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
        features = model.encode_image(preprocess(picture())[None])
        assert run.report().stages[0].kept == (12,)
    assert torch.equal(classifier, again)
    assert features.shape == (1, 512)


def picture():
    from PIL import Image

    return Image.effect_noise((300, 200), 80).convert("RGB")
