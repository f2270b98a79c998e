"""PyramidDrop: the method against the loops of its paper. `test_schedules.py` has its layers and budgets."""

from __future__ import annotations

import pytest
from methods.comparing import quantised, select, sizes
from methods.loops.pdrop import pdrop
from methods.views import random_view

import vlmprune as vp


@sizes
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_pdrop(ties, seed, visual, keep, text):
    """The mean over heads of one row of attention; ties go to the lower index."""
    see = random_view(seed, visual=visual, text=text)
    see = quantised(see) if ties else see
    expected = [pdrop(heads.tolist(), keep) for heads in see.probes["attention_of_layer"]]
    assert select(vp.PDrop(), see, keep)[0] == expected
