"""What happened in one prefill: the choices of every stage, the edits of every layer, and how long they took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune.cost import DecoderShape
from vlmprune.schedule import Site


@dataclass(eq=False)
class Clock:
    """Elapsed time on the device the work runs on: GPU events are read only when somebody asks.

    Attributes:
        what: what was timed, in a reader's words.
    """

    start: Any = None
    end: Any = None
    what: str = ""

    @staticmethod
    def now(device: torch.device) -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    @property
    def ms(self) -> float:
        """Milliseconds between start and end."""
        if isinstance(self.start, float):
            return (self.end - self.start) * 1e3
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


@dataclass(frozen=True, eq=False)
class Judged:
    """What one stage decided about the tokens of a picture, or of one of its crops; kept only under `wrap(…, explain=True)`.

    Attributes:
        index: `[visual]` the tokens that were there, as indices into the picture's tokens.
        asked: False where the budget keeps everything or nothing, and the method was not asked.
        score: `[visual]` the numbers the method ranked them by, or None.
        order: `[kept]` tokens in the order in which they were picked, or None.
        joined: `[visual]` the token that each was merged into, its own index for a kept one, −1 for none; or None.
    """

    index: Tensor
    asked: bool = True
    score: Tensor | None = None
    order: Tensor | None = None
    joined: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Kept:
    """What one stage kept of one picture.

    Attributes:
        layer: first decoder layer that sees these tokens only.
        method: name of the method that chose, with the variant that ran where there are several.
        site: "vision" (inside the tower), "llm", or "cache" (only what decoding steps see).
        sample, ordinal: batch row, and n-th picture of that row.
        original: tokens the picture had before any pruning.
        index: `[kept]` rising indices into the picture's tokens.
        features: `[kept, dim]` hidden states that took the places of the kept tokens (merging), or None.
        judged: what was decided together, crops in their order; empty unless the model was wrapped with `explain=True`.
        how: how the method decides, in words; empty likewise.
    """

    layer: int
    method: str
    site: Site
    sample: int
    ordinal: int
    original: int
    index: Tensor
    features: Tensor | None = None
    judged: tuple[Judged, ...] = ()
    how: str = ""


@dataclass(frozen=True, eq=False)
class Edit:
    """What a redistribution method did to a prompt in one layer.

    Attributes:
        groups: `[batch, 1 or head, key]` group of every stored token, 0 for ordinary ones; None if the method marks none.
        factors, masses: `[batch, head, row, 1 + group]` of the edited rows; None if the method has none.
        valid: `[batch, row]` bool, False on rows that pad a shorter text; None if all count.
        heads: `[batch, head]` factors on the outputs of heads; None if the method scales none.
    """

    layer: int
    method: str
    groups: Tensor | None = None
    factors: Tensor | None = None
    masses: Tensor | None = None
    valid: Tensor | None = None
    heads: Tensor | None = None

    @property
    def changed(self) -> Tensor | None:
        """`[batch, head, row]` bool, heads and rows that were edited."""
        return None if self.factors is None else (self.factors != 1).any(dim=-1)

    @property
    def moved(self) -> Tensor | None:
        """`[batch, head, row]` attention that went elsewhere, at most 1."""
        if self.factors is None or self.masses is None:
            return None
        return (self.masses * (self.factors - 1)).abs().sum(dim=-1) / 2


@dataclass(eq=False)
class Prefill:
    """The record of one prefill.

    Attributes:
        kept: every stage's choice for every picture, in the order of stages.
        keep: per stage's layer, `[batch, sequence]` bool: positions that the layers from there on still compute (real text and
            kept visual tokens). A stage that kept everything leaves the sequence as it was.
        keep_cache: the same for decoding steps, where a cache stage forgot more than prefill had dropped.
        newlines: row separators of LLaVA-NeXT among the image placeholders, which count as text; and whether they were kept.
        hidden: visual tokens that the call's own attention mask hides: no method may keep them, and budgets do not count them.
        batch, sequence: shape of the call.
        past: tokens that were in the cache before.
        visual: visual tokens of the whole batch.
        entering: per decoder layer, tokens that entered it per row, padding that was computed included.
        stored: per decoder layer, entries per row in the KV cache after it.
        resident: the same when prefill is over; smaller where a cache stage forgot some.
        peak: the most entries per row that all layers together ever stored.
        edits: what redistribution did, per layer.
        neutral: redistribution methods whose parameters are such that they change nothing.
        itemsize: bytes per number.
        prefill, selection: time in the language model, and in deciding and shortening within it.
        tower: time in looking and shortening inside the vision tower, before the language model.
    """

    batch: int
    sequence: int
    past: int
    visual: int
    shape: DecoderShape
    itemsize: int
    neutral: tuple[str, ...] = ()
    kept: list[Kept] = field(default_factory=list)
    keep: dict[int, Tensor] = field(default_factory=dict)
    keep_cache: dict[int, Tensor] = field(default_factory=dict)
    newlines: int = 0
    newlines_kept: bool = True
    hidden: int = 0
    entering: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    peak: int = 0
    edits: list[Edit] = field(default_factory=list)
    prefill: Clock = field(default_factory=Clock)
    selection: list[Clock] = field(default_factory=list)
    tower: list[Clock] = field(default_factory=list)
