"""Every method × every family: it keeps its contract on the family's tiny model, or is refused in a sentence that says why.

Which pairs are refused is written down in `families/pairs.py`, by what the model lacks. Pairs that neither run nor stand there
fail.
"""

from __future__ import annotations

import os

import pytest
from cases import PRUNING, REDISTRIBUTION
from families.pairs import FULL, Pair, prunes, redistributes
from families.table import BATCHES, NAMES, TINY

from vlmprune.adapters.registry import FAMILIES

pytestmark = pytest.mark.usefixtures("no_grad")

WHOLE = os.environ.get("VLMPRUNE_FAMILIES") == "all"


def pairs(rows) -> list[Pair]:
    known = [name for name in NAMES if TINY[name].model_type in FAMILIES]
    found = [Pair(family, row.name) for family in known for row in rows]
    if rows is REDISTRIBUTION:
        found += [Pair(family, row.name, FULL[family]) for family in known if family in FULL for row in rows]
    return [pair for pair in found if WHOLE or pair.third]


@pytest.mark.parametrize("pair", pairs(PRUNING), ids=lambda pair: pair.id)
def test_pruning(pair, record_property):
    """Red: what is kept is not what the budget says, a row of a batch is decided otherwise than alone, keep-all or removing is
    not bit-identical, or the model computes something else than what was chosen."""
    prunes(pair, BATCHES["ragged"], BATCHES["pictures"], record_property)


@pytest.mark.parametrize("pair", pairs(REDISTRIBUTION), ids=lambda pair: pair.id)
def test_redistribution(pair, record_property):
    """Red: attention that is computed for the edit is not the model's own (window, block, norm, scaling); a row of a batch is
    edited otherwise than alone; removing is not bit-identical."""
    redistributes(pair, BATCHES["ragged"], record_property)
