"""Every method × every family that takes videos: it keeps its contract there, or is refused in a sentence that says why.

`make test` runs a fixed part of the pairs, `make test-video` all.
"""

from __future__ import annotations

import os
import zlib

import pytest
from cases import PRUNING, REDISTRIBUTION
from families.pairs import FULL, REFUSED, Pair, prunes, redistributes
from families.table import BATCHES
from video.cells import NAMES

pytestmark = pytest.mark.usefixtures("no_grad")

WHOLE = os.environ.get("VLMPRUNE_VIDEO") == "all"
OF_VIDEOS = [
    (
        "squares of a video's patches become one token",
        lambda pair: pair.family == "llava_next_video" and pair.method in ("evit", "flowcut", "mustdrop", "pixelprune"),
    ),
    *REFUSED,
    ("followed for pictures only, found a video", lambda pair: pair.method == "pixelprune" and "qwen" in pair.family),
]
"""Pairs that are refused, and words of the sentence."""
FITTING = {"evs": "layer=0,fraction=0.6"}
"""Arguments of methods for which those for pictures are no budget of a video: the first frame is half of some."""
STRONGER = {("gemma4_moe", "var"): "p=0.6,sink_dims=5|20|3|7"}
"""Arguments with which a pair moves the logits far enough to compare."""


def pairs(rows) -> list[Pair]:
    found = [Pair(family, row.name) for family in NAMES for row in rows]
    if rows is REDISTRIBUTION:
        found += [Pair(family, row.name, FULL[family]) for family in NAMES if family in FULL for row in rows]
    return [pair for pair in found if WHOLE or zlib.crc32(pair.id.encode()) % 12 == 0 or _by_the_tower(pair)]


def _by_the_tower(pair: Pair) -> bool:
    """Pairs that look at the tower of videos, two of them in every run."""
    return (pair.family, pair.method) in (("llava_next_video", "visionzip"), ("qwen2_5_vl", "flowcut"))


@pytest.mark.parametrize("pair", pairs(PRUNING), ids=lambda pair: pair.id)
def test_pruning(pair, record_property):
    """Red: of a video, what is kept is not what the budget says, a row of a batch is decided otherwise than alone, keep-all or
    removing is not bit-identical, or the model computes something else than what was chosen."""
    prunes(pair, BATCHES["videos, ragged"], BATCHES["two videos"], record_property, OF_VIDEOS, FITTING.get(pair.method))


@pytest.mark.parametrize("pair", pairs(REDISTRIBUTION), ids=lambda pair: pair.id)
def test_redistribution(pair, record_property):
    """Red: attention that is computed for the edit of a prompt with videos is not the model's own; a row of a batch is edited
    otherwise than alone; removing is not bit-identical."""
    stronger = STRONGER.get((pair.family, pair.method))
    redistributes(pair, BATCHES["videos, ragged"], record_property, OF_VIDEOS, stronger)
