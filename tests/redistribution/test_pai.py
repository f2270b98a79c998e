"""PAI: a whole model against the loops of its paper, and its formula at the ends of its range."""

from __future__ import annotations

import pytest
from redistribution.comparing import assert_equals_the_loops
from redistribution.loops.pai import edited
from redistribution.recipes import RECIPES
from tiny_models import implementations_of


@pytest.mark.parametrize(("family", "attn"), implementations_of(("llava", "qwen2_5_vl")))
def test_pai_equals_the_loops(family, attn):
    assert_equals_the_loops(RECIPES["pai"], family, attn, edited)
