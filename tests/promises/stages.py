"""Batches and recipes with one or more stages."""

from __future__ import annotations

import pytest
from tiny_models import FAMILIES, LAYERS, implementations_of

BATCHES = {
    "one image": [["text5", "image", "text4"]],
    "two images": [["text2", "image", "text3", "image", "text5"]],
    "ragged": [["text7", "image", "text4"], ["text2", "image", "image", "text3"], ["text3", "image", "text9"]],
    "with text row": [["text2", "image", "image", "text3"], ["text30"], ["text1", "image", "text12"]],
}

STAGES = {
    "0": ("random:layer=0,fraction=0.5,seed=0", {0: 0.5}),
    "2": ("random:layer=2,fraction=0.5,seed=0", {2: 0.5}),
    "1+3": ("random:layer=1|3,fraction=0.6|0.3,seed=0", {1: 0.6, 3: 0.3}),
}

METHODS = {
    "fastv": "fastv:layer=2,fraction=0.5",
    "fastv deep": "fastv:layer=1|4,fraction=0.5|0.2",
    "divprune": "divprune:layer=0,fraction=0.4",
    "divprune deep": "divprune:layer=3,tokens=5",
    "cls": "cls:layer=0,fraction=0.5",
    "cls deep": "cls:layer=2,fraction=0.5",
    "sum": "divprune:layer=0,fraction=0.75 + fastv:layer=2,fraction=0.5 + random:layer=4,fraction=0.2,seed=3",
    "nothing left": "random:layer=2,tokens=0",
    "last layer": f"random:layer={LAYERS - 1},fraction=0.25",
}

families = pytest.mark.parametrize("family", FAMILIES)

implementations = pytest.mark.parametrize(("family", "attn"), implementations_of(FAMILIES))
