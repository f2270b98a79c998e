"""Every family × way of generating × stages: exact, or refused in a sentence.

`make test` runs a fixed sixteenth of the cells, `make test-generation` all. Both print how many were refused, by reason.
"""

from __future__ import annotations

import pytest
from families.running import not_wrapped
from generation.running import RUN, run
from generation.ways import CELLS, WAYS, Cell, refusal_of, selected

import vlmprune as vp


def test_cells_are_enough_and_differ():
    assert len(CELLS) == len({cell.id for cell in CELLS})
    assert set(RUN) == set(WAYS)
    part = [cell for cell in CELLS if cell.part]
    assert 0.04 < len(part) / len(CELLS) < 0.09
    assert {cell.way for cell in part} == set(WAYS)


@pytest.mark.parametrize("cell", selected(), ids=lambda cell: cell.id)
def test_cell(cell: Cell, record_property):
    """Red: what a way of generating computes differs from the stock model with the same tokens masked or cut out; or it is
    refused, and nothing says why."""
    record_property("way", cell.id)
    expected = refusal_of(cell)
    if expected is None:
        return run(cell, vp.wrap)
    if expected.words:
        with pytest.raises(vp.UsageError) as refusal:
            run(cell, vp.wrap)
        assert expected.words in str(refusal.value)
        assert "\n" not in str(refusal.value)
    else:
        with pytest.raises((ValueError, RuntimeError, AttributeError, AssertionError)) as refusal:
            run(cell, not_wrapped)
        assert expected.theirs in str(refusal.value)
    record_property("reason", expected.reason)
    pytest.skip(expected.reason)
