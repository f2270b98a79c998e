"""PAINT: a whole model against the loops of its paper, and its formula at the ends of its range."""

from __future__ import annotations

import pytest
from redistribution.comparing import assert_equals_the_loops
from redistribution.loops.paint import edited
from redistribution.recipes import RECIPES
from tiny_models import implementations_of


@pytest.mark.parametrize(("family", "attn"), implementations_of(("llava",)))
def test_paint_equals_the_loops(family, attn):
    assert_equals_the_loops(RECIPES["paint"], family, attn, edited)
