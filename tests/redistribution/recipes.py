"""Recipes of redistribution for the tiny models, and the batch they run on."""

from __future__ import annotations

import pytest
from cases import REDISTRIBUTION
from tiny_models import ALL_FAMILIES

SAMPLES = [["text5", "image", "text4"], ["text2", "image", "text1", "image", "text3"], ["text9"]]
DIMS = [5, 40]
TAU = 2.0
RECIPES = {name: row.recipe(row.tiny[name]) for row in REDISTRIBUTION for name in row.tiny}
VAR = RECIPES["var"]
CLS_ONLY = {row.name for row in REDISTRIBUTION if row.cls}
CASES = [
    pytest.param(family, recipe, id=f"{family}-{name}")
    for name, recipe in RECIPES.items()
    for family in ALL_FAMILIES
    if name not in CLS_ONLY or family.startswith("llava")
]
