"""Every family that takes videos × batch × stages × way of running: exact, or refused in a sentence.

`make test` runs a fixed part of the cells, `make test-video` all.
"""

from __future__ import annotations

import pytest
from families.running import run_or_refuse
from families.table import TINY
from video.cells import CELLS, NAMES, WAYS, VideoCell, refusal_of, selected

from vlmprune.adapters.registry import FAMILIES


def test_every_family_with_videos_is_here():
    """Red: a family takes videos, and has no cells."""
    assert {TINY[name].model_type for name in NAMES} == {name for name, family in FAMILIES.items() if family.videos is not None}


def test_cells_are_enough_and_differ():
    assert len(CELLS) == len({cell.id for cell in CELLS})
    assert len(CELLS) >= 1500
    assert {cell.way for cell in CELLS} == set(WAYS)
    assert {cell.family for cell in CELLS if cell.part} == set(NAMES)
    assert sum(cell.part for cell in CELLS) < 100


@pytest.mark.parametrize("cell", selected(), ids=lambda cell: cell.id)
def test_cell(cell: VideoCell, record_property):
    """Red: pruned differs from un-pruned with the same tokens masked or dropped; or it is refused, and nothing says why."""
    record_property("video cell", cell.id)
    run_or_refuse(cell, refusal_of(cell), record_property)
