"""The record of one prompt: what every stage kept, what redistribution edited, and how long both took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmprune.cost import DecoderShape, TowerShape
from vlmprune.device import on_host
from vlmprune.errors import Renamed
from vlmprune.schedule import Site


@dataclass(eq=False)
class Clock:
    """Time on the device that does the work. Events of a GPU are read only when `ms` is.

    `begin` and `end_now`, or use `with`.

    Attributes:
        start, end: seconds of the host's clock, or GPU events.
        what: what was timed, in words.
        device: where it is done.
    """

    start: Any = None
    end: Any = None
    what: str = ""
    device: torch.device | None = None

    def begin(self) -> Clock:
        """Take the time of the start."""
        on_gpu = self.device is not None and self.device.type == "cuda"
        self.start = _event(self.device) if on_gpu else time.perf_counter()
        return self

    def end_now(self, *_: object) -> None:
        """Take the time of the end."""
        on_gpu = self.device is not None and self.device.type == "cuda"
        self.end = _event(self.device) if on_gpu else time.perf_counter()

    __enter__, __exit__ = begin, end_now

    @property
    def ms(self) -> float:
        """Milliseconds between start and end."""
        if isinstance(self.start, float):
            return (self.end - self.start) * 1e3
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


def place_of(site: Site, layer: int) -> str:
    """Where a stage prunes, in words."""
    if site == "llm":
        return f"before layer {layer}" if layer else "before the language model"
    if site == "pixels":
        return "before the vision tower"
    return "inside the vision tower" if site == "vision" else f"in the KV cache from layer {layer} on"


def _event(device: torch.device | None) -> Any:
    """The present time in the GPU's queue."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


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
    """What one stage kept of one picture, or of one video.

    Attributes:
        layer: first decoder layer that computes these tokens only.
        method: name of the method, with the variant that ran where there are several.
        site: "pixels" (before the vision tower), "vision" (inside it), "llm", or "cache" (decoding steps only).
        sample, ordinal: row of the batch, and number of the picture or video in that row; both are counted together.
        original: tokens of the picture before any pruning.
        index: `[kept]` indices of the kept tokens in their picture, rising.
        features: `[kept, dim]` hidden states that replaced those of the kept tokens (merging), or None.
        judged: what was decided together, crops in their order; empty unless the model was wrapped with `explain=True`.
        how: how the method decides, in words; empty likewise.
        in_place: False where `index` is no place in the picture: a vision tower without crops merges the patches that are left
            wherever they were, and their tokens are numbered from 0.
        frame: `[original]` the frame that each token of a video shows, rising from 0; None of a picture.
        times: seconds at which each frame of a video is shown, NaN where unknown; empty of a picture.
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
    in_place: bool = True
    frame: Tensor | None = None
    times: tuple[float, ...] = ()

    @property
    def frames(self) -> int:
        """Frames of a video; 0 of a picture."""
        return len(self.times)

    @property
    def by_frame(self) -> tuple[int, ...]:
        """Tokens that stayed of each frame of a video; empty of a picture. Waits for the device."""
        if self.frame is None:
            return ()
        return tuple(torch.bincount(self.frame[self.index.cpu()], minlength=self.frames).tolist())


@dataclass(frozen=True, eq=False)
class Edit(Renamed):
    """What a redistribution method edited in one decoder layer of a prompt.

    Attributes:
        layer, method: number of the layer, and name of the method.
        groups: `[batch, 1 or head, key]` the group in which the method put each cached token, 0 for ordinary ones; None if it
            marks no tokens.
        factors, masses: `[batch, head, row, 1 + group]` factor on the attention of a row to a group, and that attention before
            the edit; None if the method edits no attention.
        valid: `[batch, row]` bool, False on rows that pad a shorter text; None if there are none.
        heads: `[batch, head]` factors on the outputs of heads; None if the method scales none.
    """

    layer: int
    method: str
    groups: Tensor | None = None
    factors: Tensor | None = None
    masses: Tensor | None = None
    valid: Tensor | None = None
    heads: Tensor | None = None

    _former: ClassVar[Mapping[str, str]] = {"codes": "groups"}

    @property
    def changed(self) -> Tensor | None:
        """`[batch, head, row]` bool, True where a row was edited in a head."""
        return None if self.factors is None else (self.factors != 1).any(dim=-1)

    @property
    def moved(self) -> Tensor | None:
        """`[batch, head, row]` share of the row's attention that the edit moved to other tokens, at most 1."""
        if self.factors is None or self.masses is None:
            return None
        return (self.masses * (self.factors - 1)).abs().sum(dim=-1) / 2


@dataclass(eq=False)
class TowerWork:
    """What one pass through a vision tower computed.

    Attributes:
        shape: sizes of the tower.
        patches: patches that were embedded.
        entered, left: per block, the lengths of what attends to itself, without the recipe and with it; or where it begins
            and ends, `[segment + 1]`, on the device.
        tokens: visual tokens that left the projector.
    """

    shape: TowerShape
    patches: int
    entered: list[Tensor | list[int]] = field(default_factory=list)
    left: list[Tensor | list[int]] = field(default_factory=list)
    tokens: int = 0

    def flops(self) -> tuple[int, int]:
        """FLOPs with the recipe, and without it. Waits for the device."""
        left, entered = (list(map(_lengths, segments)) for segments in (self.left, self.entered))
        return self.shape.flops(self.patches, left, self.tokens), self.shape.flops(self.patches, entered)


def _lengths(segments: Tensor | list[int]) -> list[int]:
    return on_host(segments.diff()).tolist() if isinstance(segments, Tensor) else segments


@dataclass(eq=False)
class Prefill(Renamed):
    """The record of one prompt's forward pass, the *prefill*; decoding steps are not recorded.

    The whole batch:

    Attributes:
        batch, sequence: rows of the batch, and tokens of a row, padding included.
        past: tokens that were in the KV cache before the prompt.
        visual: visual tokens of all pictures.
        hidden: those of them that the call's attention mask hides: no method may keep them, and budgets do not count them.
        newlines: row separators of LLaVA-NeXT, which count as text.
        newlines_kept: False if a method dropped them.
        shape, itemsize: sizes of the language model, and bytes per number.

    What stages did:

    Attributes:
        kept: what every stage kept of every picture, in the order of stages.
        keep: by layer of a stage, `[batch, sequence]` bool: tokens of the prompt that the layers from there on compute. A stage
            that kept everything leaves them as they were.
        keep_cache: the same for decoding steps, where a cache stage forgot more.

    What that costs, each a number per row and decoder layer:

    Attributes:
        entering: tokens that entered the layer, padding included where it was computed.
        stored: keys that these attend to: entries in the layer's KV cache, before any of them leaves its window.
        resident: entries after the prompt; fewer where a cache stage forgot some.
        places, places_unpruned: in a static cache, entries that each layer has places for, and that it would have places for
            without the recipe; empty for another cache.
        held: what the layers stored at several times, each as `resident`: a cache stage holds old and new entries for a moment.

    Redistribution and times:

    Attributes:
        edits: what was edited, by layer.
        neutral: redistribution methods that edit nothing with the parameters they have.
        prefill: time in the language model.
        selection: parts of it, spent on choosing and dropping tokens.
        tower: time spent on scores and on dropping inside the vision tower, before the language model.
        tower_work: what the tower computed for the prompt, where the recipe drops patches there.
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
    places: list[int] = field(default_factory=list)
    places_unpruned: list[int] = field(default_factory=list)
    held: list[list[int]] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    prefill: Clock = field(default_factory=Clock)
    selection: list[Clock] = field(default_factory=list)
    tower: list[Clock] = field(default_factory=list)
    tower_work: TowerWork | None = None

    _former: ClassVar[Mapping[str, str]] = {"steered": "edits"}

    @property
    def peak(self) -> int:
        """The most entries that all layers together stored at one time, per row."""
        return max(map(sum, self.held), default=0)

    @property
    def peak_bytes(self) -> int:
        """The same in bytes."""
        return max((self.shape.kv_bytes(entries, self.itemsize) for entries in self.held), default=0)
