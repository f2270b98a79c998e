"""The cells of the video matrix: family × batch × stages × way of running, of the families that take videos.

They are cells of the family matrix (`families/cells.py`) whose batches have videos: models, oracles and ways of running are
those of `tests/families`. Every cell passes, or is refused in words that stand in `REFUSALS`.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass

from families.cells import REFUSALS as OF_FAMILIES
from families.cells import Cell, Refusal
from families.table import BATCHES, TINY

NAMES = tuple(name for name in TINY if TINY[name].video is not None)
WITH_VIDEO = tuple(name for name in BATCHES if "video" in name)
"""Batches with a video, two in a row, ragged rows, a picture before and behind a video, and a row without either."""
ONE_ROW = ("video", "two videos")
ONLY_VIDEOS = ("video", "two videos", "videos, ragged", "video, text row")
CUTS = ("0", "2", "1+3")

WAYS = ("greedy", "beams", "sampling", "prompt lookup", "no cache", "static", "second turn", "per frame", "keep all", "removed")


@dataclass(frozen=True)
class VideoCell(Cell):
    """One combination; `make test` runs a fixed part: one of each family with a picture beside the video, and one in 30."""

    @property
    def seed(self) -> int:
        """With some weights, rounding between rows of a batch exceeds the tolerance where experts follow recurrent layers."""
        return 2 if self.family == "qwen3_5_moe" else 0

    @property
    def part(self) -> bool:
        fixed = (self.batch, self.stages, self.way) == ("picture, video", "1+3", "greedy")
        return fixed or zlib.crc32(self.id.encode()) % 30 == 0

    @property
    def oldest(self) -> bool:
        """Whether it also runs on the oldest supported transformers: two for each family."""
        return self.way == "greedy" and (self.batch, self.stages) in (("videos, ragged", "0"), ("picture, video", "2"))

    @property
    def recipe(self) -> str:
        return super().recipe + (",per=frame" if self.way == "per frame" else "")


def _of(family: str) -> list[VideoCell]:
    def cells(ways: tuple[str, ...], batches: tuple[str, ...], cuts: tuple[str, ...] = CUTS) -> list[VideoCell]:
        own = TINY[family].attentions[0]
        return [VideoCell(family, own, batch, cut, "blind", way) for way in ways for batch in batches for cut in cuts]

    return [
        *cells(("greedy", "beams", "sampling", "no cache", "static"), WITH_VIDEO),
        *cells(("prompt lookup",), ONE_ROW),
        *cells(("second turn",), ("videos, ragged", "picture, video")),
        *cells(("per frame",), ONLY_VIDEOS),
        *cells(("keep all",), ("videos, ragged", "picture, video"), ("0", "1+3")),
        *cells(("removed",), ("videos, ragged",), ("2",)),
    ]


CELLS = [cell for name in NAMES for cell in _of(name)]


def selected() -> list[VideoCell]:
    """The cells that a test run has: a part; all, or those of the oldest transformers, where VLMPRUNE_VIDEO says so."""
    wanted = os.environ.get("VLMPRUNE_VIDEO", "part")
    return CELLS if wanted == "all" else [cell for cell in CELLS if getattr(cell, wanted)]


_GLM = ("glm4v", "glm4v_moe", "glm46v")

REFUSALS = [
    *(refusal for refusal in OF_FAMILIES if "several pictures" not in refusal.reason),
    Refusal(
        "transformers does not copy the videos of a sample, whose placeholder it takes for pictures'",
        lambda cell: cell.family in _GLM and cell.way in ("beams", "sampling"),
    ),
    Refusal(
        "pictures and videos have the same placeholder: transformers cannot take both in one call",
        lambda cell: cell.family in _GLM and "picture" in cell.batch and cell.way != "keep all",
        "have the same placeholder",
    ),
    Refusal(  # where nothing is dropped, the plain model itself says so
        "pictures and videos have the same placeholder: transformers cannot take both in one call",
        lambda cell: cell.family in _GLM and "picture" in cell.batch,
    ),
]


def refusal_of(cell: VideoCell) -> Refusal | None:
    """The refusal that a cell must meet, or None if it must pass."""
    return next((refusal for refusal in REFUSALS if refusal.applies(cell)), None)
