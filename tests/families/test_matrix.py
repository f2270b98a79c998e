"""Every family × attention × batch × stages × kind of method × way of running: exact, or refused in a sentence.

`make test` runs a fixed third of the cells, `make test-families` all. Both print how many were refused, by reason.
"""

from __future__ import annotations

import pytest
from families.cells import CELLS, Cell, refusal_of, selected
from families.running import run_or_refuse
from families.table import NAMES, TINY

from vlmprune.adapters.registry import FAMILIES


def test_every_family_is_here():
    """Red: a family was added without a tiny model, and its cells are missing."""
    assert {TINY[name].model_type for name in NAMES} >= set(FAMILIES)


def test_cells_are_enough_and_differ():
    assert len(CELLS) == len({cell.id for cell in CELLS})
    assert len(CELLS) >= 500
    assert 0.28 < sum(cell.third for cell in CELLS) / len(CELLS) < 0.38


@pytest.mark.parametrize("cell", selected(), ids=lambda cell: cell.id)
def test_cell(cell: Cell, record_property):
    """Red: pruned differs from un-pruned with the same tokens masked or dropped; or it is refused, and nothing says why."""
    record_property("cell", cell.id)
    if TINY[cell.family].model_type not in FAMILIES:
        record_property("reason", "not supported yet")
        pytest.skip("not supported yet")
    run_or_refuse(cell, refusal_of(cell), record_property)
