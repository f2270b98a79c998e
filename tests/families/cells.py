"""The cells of the matrix: family × attention × batch × stages × kind of method × way of running.

Every cell either passes or is refused. Which are refused, and by which words, is written down in `REFUSALS`: a cell that is
refused without standing there fails, and so does one that stands there and runs. A family that vlmprune does not know yet has
the same cells; they are skipped as "not supported yet".
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from families.table import NAMES, TINY

STAGES = {"0": {0: 0.5}, "2": {2: 0.3}, "1+3": {1: 0.6, 3: 0.3}, "4": {4: 0.4}}
"""Layers of the stages, and the share of each picture that stays. `4` is behind the layers into which DeepStack injects."""

KINDS = {
    "blind": "random",
    "features": "divprune",
    "attention": "fastv",
    "ahead": "pdrop",
}
"""One method for each kind of what is looked at: nothing, features, attention of the layer before, and of the layer itself."""

WAYS = ("greedy", "second turn", "beams", "sampling", "no cache", "prompt lookup", "keep all", "removed")


@dataclass(frozen=True)
class Cell:
    """One combination."""

    family: str
    attention: str
    batch: str
    stages: str
    kind: str
    way: str

    @property
    def id(self) -> str:
        return "-".join((self.family, self.attention, self.batch, self.stages, self.kind, self.way)).replace(" ", "_")

    @property
    def seed(self) -> int:
        """Of the weights, beside the family's own."""
        return 0

    @property
    def third(self) -> bool:
        """Whether `make test` runs it: about one in three, the same ones always."""
        return zlib.crc32(self.id.encode()) % 3 == 0

    @property
    def oldest(self) -> bool:
        """Whether it also runs on the oldest supported transformers: two for each family."""
        own = self.attention == TINY[self.family].attentions[0]
        return own and (self.batch, self.kind, self.way) == ("ragged", "blind", "greedy") and self.stages in ("0", "1+3")

    @property
    def recipe(self) -> str:
        method = KINDS[self.kind]
        layers, shares = ("|".join(str(x) for x in values) for values in zip(*STAGES[self.stages].items(), strict=True))
        if self.way == "keep all":
            shares = "|".join("1.0" for _ in STAGES[self.stages])
        return f"{method}:layer={layers},fraction={shares}" + (",seed=0" if method == "random" else "")


def _of(family: str) -> list[Cell]:
    tiny, found = TINY[family], []
    own = tiny.attentions[0]
    for attention in tiny.attentions:
        batches = ("one", "long", "pictures", "ragged", "text row") if attention == own else ("long", "ragged")
        stages = ("0", "2", "1+3") + (("4",) if tiny.injected else ())
        found += [Cell(family, attention, batch, stage, "blind", "greedy") for batch in batches for stage in stages]
    found += [Cell(family, own, batch, stage, "blind", way) for way, stage, batch in _OTHER_WAYS]
    found += [Cell(family, own, batch, stage, kind, "greedy") for kind, stage, batch in _OTHER_KINDS]
    return found


_OTHER_WAYS = [
    *(("second turn", stage, batch) for stage in ("0", "2", "1+3") for batch in ("one", "ragged")),
    *((way, stage, "ragged") for way in ("beams", "sampling") for stage in ("0", "1+3")),
    *(("no cache", stage, batch) for stage, batch in (("0", "long"), ("1+3", "ragged"))),
    *(("prompt lookup", stage, "one") for stage in ("0", "2")),
    *(("keep all", stage, batch) for stage, batch in (("0", "long"), ("0", "ragged"), ("1+3", "ragged"), ("2", "text row"))),
    *(("removed", stage, "ragged") for stage in ("2",)),
]
_OTHER_KINDS = [
    *(("features", stage, batch) for stage in ("0", "2") for batch in ("long", "ragged")),
    *(("attention", "2", batch) for batch in ("one", "ragged")),
    ("attention", "1+3", "ragged"),
    *(("ahead", "2", batch) for batch in ("long", "ragged")),
]

CELLS = [cell for name in NAMES for cell in _of(name)]


def selected() -> list[Cell]:
    """The cells that a test run has: a third; all, or those of the oldest transformers, where VLMPRUNE_FAMILIES says so."""
    wanted = os.environ.get("VLMPRUNE_FAMILIES", "third")
    return CELLS if wanted == "all" else [cell for cell in CELLS if getattr(cell, wanted)]


# -- what is refused ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """Cells that vlmprune refuses, or that the stock model itself does not compute.

    Attributes:
        reason: why, in short, for the tables.
        applies: whether a cell is meant.
        words: part of vlmprune's sentence; empty if the stock model, without vlmprune, fails the same comparison.
    """

    reason: str
    applies: Callable[[Cell], bool]
    words: str = ""


def _layers(cell: Cell) -> set[int]:
    return set(STAGES[cell.stages])


_GLM = ("glm4v", "glm4v_moe", "glm46v")

REFUSALS = [
    Refusal(
        "the model's forward takes no logits_to_keep, so that guessed tokens cannot be told from the prompt",
        lambda cell: cell.family == "video_llama_3" and cell.way == "prompt lookup",
        "assisted decoding is not supported",
    ),
    Refusal(
        "transformers refuses assisted decoding of models with a state",
        lambda cell: cell.way == "prompt lookup" and cell.family in ("qwen3_5", "qwen3_5_moe"),
    ),
    Refusal(
        "transformers gives the copies of a sample with several pictures another sample's",
        lambda cell: cell.way in ("beams", "sampling") and cell.family in _GLM,
    ),
    Refusal(
        "the layer whose attention the method reads has none",
        lambda cell: TINY[cell.family].recurrent and ((cell.kind, cell.stages) in (("attention", "1+3"), ("ahead", "2"))),
        "has no attention",
    ),
    Refusal(
        "the method computes attention without the soft cap of the model",
        lambda cell: cell.family == "paligemma2" and cell.kind in ("attention", "ahead"),
        "adds softcap",
    ),
    Refusal(
        "later layers see the keys that an earlier one stored before the stage",
        lambda cell: cell.family == "gemma4_e" and max(_layers(cell)) > 2,
        "but later layers see the keys that layer 2 stores",
    ),
]


def refusal_of(cell: Cell) -> Refusal | None:
    """The refusal that a cell must meet, or None if it must pass."""
    return next((refusal for refusal in REFUSALS if refusal.applies(cell)), None)
