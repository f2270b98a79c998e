"""The uniform grid: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import pytest
import torch
from methods.comparing import select
from methods.loops.uniform import uniform

import vlmprune as vp
from vlmprune.view import View


@pytest.mark.parametrize(("visual", "keep"), [(9, 3), (10, 4), (576, 64), (7, 6), (5, 1), (11, 10)])
def test_uniform(visual, keep):
    see = View(0, visual, torch.arange(visual).expand(2, -1), {})
    assert select(vp.Uniform(), see, keep)[0] == [uniform(visual, keep)] * 2
