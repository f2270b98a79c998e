"""The cells of this matrix: family × way of generating × stages.

As in `families/cells.py`, a cell either passes or is refused, and `REFUSALS` says which are refused, and by which words. The
ways that need more than one batch shape (greedy, beams, sampling, no cache, prompt lookup, second turns of text) are cells of
the family matrix.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from families.table import NAMES, TINY

STAGES = {"0": {0: 0.5}, "1+3": {1: 0.6, 3: 0.3}}
"""Layers of the stages, and the share of each picture that stays."""

WAYS = (
    "prefix",
    "prefix, batch",
    "shared cache",
    "later picture",
    "embeddings",
    "quantised",
    "offloaded",
    "chunked",
    "assistant",
    "pruned assistant",
    "streaming",
    "guidance",
)


@dataclass(frozen=True)
class Cell:
    """One combination."""

    family: str
    stages: str
    way: str

    @property
    def id(self) -> str:
        return "-".join((self.family, self.stages, self.way)).replace(", ", "_").replace(" ", "_")

    @property
    def attention(self) -> str:
        return TINY[self.family].attentions[0]

    @property
    def part(self) -> bool:
        """Whether `make test` runs it: about one in sixteen, the same ones always."""
        return zlib.crc32(self.id.encode()) % 16 == 0

    @property
    def recipe(self) -> str:
        layers, shares = ("|".join(str(x) for x in values) for values in zip(*STAGES[self.stages].items(), strict=True))
        return f"divprune:layer={layers},fraction={shares}"


CELLS = [Cell(name, stage, way) for name in NAMES for way in WAYS for stage in STAGES]


def selected() -> list[Cell]:
    """The cells that a test run has: a sixteenth, or all where VLMPRUNE_GENERATION says so."""
    return CELLS if os.environ.get("VLMPRUNE_GENERATION") == "all" else [cell for cell in CELLS if cell.part]


# -- what is refused ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """Cells that vlmprune refuses, or that transformers itself refuses or computes wrongly.

    Attributes:
        reason: why, in short, for the tables.
        applies: whether a cell is meant.
        words: part of vlmprune's sentence; empty if the stock model, without vlmprune, does the same.
        theirs: part of transformers' own sentence, where the stock model refuses.
    """

    reason: str
    applies: Callable[[Cell], bool]
    words: str = ""
    theirs: str = ""


_M_ROPE = tuple(name for name in NAMES if name.startswith(("qwen", "glm")))
_WHOLE_PROMPT = ("paligemma", "paligemma2")
_GUESSING = ("assistant", "pruned assistant")

REFUSALS = [
    Refusal(
        "later layers see the keys that an earlier one stored before the stage",
        lambda cell: cell.family == "gemma4_e" and cell.stages == "1+3",
        words="but later layers see the keys that layer 2 stores",
    ),
    Refusal(
        "the features of a picture come in pieces, which do not say what picture they are of",
        lambda cell: cell.way == "chunked",
        words="leave prefill_chunk_size out",
    ),
    Refusal(
        "the tokens of the whole prompt see each other, so that a picture is computed with the question",
        lambda cell: cell.way.startswith("prefix") and cell.family in _WHOLE_PROMPT,
        words="the tokens of the whole prompt see each other",
    ),
    Refusal(
        "the tokens of the whole prompt see each other; in transformers, those of earlier turns do not see a later picture",
        lambda cell: cell.way == "later picture" and cell.family in _WHOLE_PROMPT,
    ),
    Refusal(
        "transformers takes no embeddings as the prompt of this model",
        lambda cell: cell.way == "embeddings" and cell.family.startswith(("gemma", "paligemma")),
        theirs="doesn't have its forwarding implemented",
    ),
    Refusal(
        "transformers quantises caches of models with full attention in all layers only",
        lambda cell: cell.way == "quantised" and (TINY[cell.family].recurrent or TINY[cell.family].window > 0),
        theirs="only supported for models with only full attention layers",
    ),
    Refusal(
        "transformers does not repeat the state of recurrent layers (a prefix does)",
        lambda cell: cell.way == "shared cache" and TINY[cell.family].recurrent,
        theirs="batch_repeat_interleave",
    ),
    Refusal(
        "transformers refuses assisted decoding of models with a state",
        lambda cell: cell.way in _GUESSING and cell.family.startswith("qwen3_5"),
        theirs="assisted generation is not supported with stateful models",
    ),
    Refusal(
        "the model's forward takes no logits_to_keep, so that guessed tokens cannot be told from the prompt",
        lambda cell: cell.way in _GUESSING and cell.family == "video_llama_3",
        words="assisted decoding is not supported",
    ),
    Refusal(
        "transformers shows the prompt its guessed tokens, so that assisted decoding says something else than greedy decoding",
        lambda cell: cell.way in _GUESSING and cell.family in _WHOLE_PROMPT,
    ),
    Refusal(
        "transformers' guidance gives models with M-RoPE positions of a wrong shape",
        lambda cell: cell.way == "guidance" and cell.family in _M_ROPE,
    ),
]


def refusal_of(cell: Cell) -> Refusal | None:
    """The refusal that a cell must meet, or None if it must pass."""
    return next((refusal for refusal in REFUSALS if refusal.applies(cell)), None)
