"""What happened in one call: the state while it runs, the record afterwards, and the report a person reads."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune.cost import DecoderShape
from vlmprune.errors import UsageError
from vlmprune.layout import Layout
from vlmprune.reduction import Reduction


@dataclass(eq=False)
class Clock:
    """Elapsed time on the device the work runs on: GPU events are read only when somebody asks."""

    start: Any = None
    end: Any = None

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
class Kept:
    """What one stage kept of one picture.

    Attributes:
        layer: first decoder layer that sees these tokens only.
        method: name of the method that chose.
        sample, ordinal: batch row, and n-th picture of that row.
        original: tokens the picture had before any pruning.
        index: `[kept]` rising indices into the picture's tokens.
    """

    layer: int
    method: str
    sample: int
    ordinal: int
    original: int
    index: Tensor


@dataclass(eq=False)
class Prefill:
    """The record of one prefill.

    Attributes:
        kept: every stage's choice for every picture, in the order of stages.
        keep: per stage's layer, `[batch, sequence]` bool: positions that the layers from there on still compute (real text and
            kept visual tokens). A stage that kept everything leaves the sequence as it was.
        batch, sequence: shape of the call.
        past: tokens that were in the cache before.
        visual: visual tokens of the whole batch.
        entering: per decoder layer, tokens that entered it per row, padding that was computed included.
        stored: per decoder layer, entries per row in the KV cache after it.
        itemsize: bytes per number.
        prefill, selection: time in the language model, and in deciding and shortening within it.
    """

    batch: int
    sequence: int
    past: int
    visual: int
    shape: DecoderShape
    itemsize: int
    kept: list[Kept] = field(default_factory=list)
    keep: dict[int, Tensor] = field(default_factory=dict)
    entering: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    prefill: Clock = field(default_factory=Clock)
    selection: list[Clock] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    """State of one forward pass; travels from hook to hook as a keyword argument, so that threads never share it.

    Attributes:
        tail: tokens at the end that are not part of the prompt (candidates of assisted decoding).
        layout: where visual tokens are; None if this call prunes nothing.
        ids: `[batch, sequence]` input ids.
        mask: 2-D attention mask over all tokens so far, or None.
        past: tokens in the cache before this call.
        remaining: per picture, indices that are still there.
        reduction: what the current layer computes; None while nothing was dropped.
        attention: per decoder layer, `[batch, head, key]` attention of the last prompt token to this call's rows.
        text: the prompt's text after its last picture, as rows of the call's sequence.
        text_attention: per decoder layer, `[batch, head, text, key]` attention of these rows.
        masks: per group of layers between two stages, the mask of that group.
        rotary: gathered rotary embeddings, by the identity of the full ones (models may have several).
        chosen: per stage's layer, what remains of every picture; filled from the start when generation without a cache runs
            the same prompt again.
        every_row: all rows of a turn that cuts nothing.
    """

    tail: int = 0
    layout: Layout | None = None
    ids: Tensor | None = None
    mask: Tensor | None = None
    past: int = 0
    batch: int = 0
    sequence: int = 0
    prompt_end: Tensor | None = None
    cls: list[Tensor] = field(default_factory=list)
    remaining: list[Tensor] = field(default_factory=list)
    reduction: Reduction | None = None
    attention: dict[int, Tensor] = field(default_factory=dict)
    text: Reduction | None = None
    text_attention: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[int, Tensor | None] = field(default_factory=dict)
    rotary: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    chosen: dict[int, list[Tensor]] = field(default_factory=dict)
    every_row: Reduction | None = None
    record: Prefill | None = None


@dataclass(frozen=True)
class StageReport:
    """One stage: per picture, how many of the original tokens were kept."""

    layer: int
    method: str
    kept: tuple[int, ...]
    original: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """The last prefill in numbers. FLOPs and bytes are of the language model's prefill, for the whole batch (`vlmprune.cost`
    has the formula); the un-pruned figures are of the same prompt. `print` shows it as a table."""

    recipe: str
    batch: int
    prompt_tokens: int
    visual_tokens: int
    stages: tuple[StageReport, ...]
    entering: tuple[int, ...]
    visual_compute_average: float
    visual_nominal_average: float
    flops: int
    flops_unpruned: int
    kv_bytes: int
    kv_bytes_unpruned: int
    prefill_ms: float
    selection_ms: float

    @staticmethod
    def of(record: Prefill, recipe: str) -> Report:
        shape, batch = record.shape, record.batch
        full = record.sequence
        layers = {
            layer: [kept for kept in record.kept if kept.layer == layer]
            for layer in dict.fromkeys(k.layer for k in record.kept)
        }
        entering_visual, after = [], record.visual
        for layer in range(shape.layers):
            if layer in layers:
                after = sum(len(kept.index) for kept in layers[layer])
            entering_visual.append(after)
        # A stage at layer l shortens the output of layer l − 1: that is the "nominal" way of counting.
        leaving_visual = [*entering_visual[1:], entering_visual[-1]]
        return Report(
            recipe=recipe,
            batch=batch,
            prompt_tokens=full,
            visual_tokens=record.visual,
            stages=tuple(
                StageReport(layer, kept[0].method, tuple(len(k.index) for k in kept), tuple(k.original for k in kept))
                for layer, kept in layers.items()
            ),
            entering=tuple(record.entering),
            visual_compute_average=sum(entering_visual) / shape.layers / batch,
            visual_nominal_average=sum(leaving_visual) / shape.layers / batch,
            flops=batch * sum(map(shape.layer_flops, record.entering, record.stored)),
            flops_unpruned=batch * shape.layers * shape.layer_flops(full, record.past + full),
            kv_bytes=batch * sum(shape.layer_kv_bytes(keys, record.itemsize) for keys in record.stored),
            kv_bytes_unpruned=batch * shape.layers * shape.layer_kv_bytes(record.past + full, record.itemsize),
            prefill_ms=record.prefill.ms,
            selection_ms=sum(clock.ms for clock in record.selection),
        )

    def rows(self) -> list[tuple[str, str]]:
        """The report as labelled lines."""
        kept = [(f"kept at layer {s.layer} ({s.method})", _each(s.kept, s.original)) for s in self.stages]
        return [
            ("recipe", self.recipe),
            ("prompt", f"{self.batch} × {self.prompt_tokens} tokens, {self.visual_tokens} visual"),
            *kept,
            (
                "visual tokens per layer",
                f"{self.visual_compute_average:.1f} entering on average, {self.visual_nominal_average:.1f} leaving",
            ),
            ("prefill FLOPs", _share(self.flops / 1e9, self.flops_unpruned / 1e9, "G")),
            ("KV cache", _share(self.kv_bytes / 1024, self.kv_bytes_unpruned / 1024, "KiB")),
            ("prefill time", f"{self.prefill_ms:.2f} ms, of which choosing and shortening {self.selection_ms:.2f} ms"),
        ]

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        return "\n".join(f"{label:<{width}}  {value}" for label, value in self.rows())


def _share(pruned: float, unpruned: float, unit: str) -> str:
    return f"{pruned:.4g} {unit} of {unpruned:.4g} {unit} ({pruned / unpruned:.1%})"


def _each(kept: tuple[int, ...], original: tuple[int, ...]) -> str:
    pairs = list(zip(kept, original, strict=True))
    if len(set(pairs)) == 1:
        return f"{kept[0]} of {original[0]}" + (f" in each of {len(pairs)} pictures" if len(pairs) > 1 else "")
    return ", ".join(f"{k} of {n}" for k, n in pairs[:8]) + (", …" if len(pairs) > 8 else "")


def no_prefill() -> UsageError:
    return UsageError("nothing to report yet: run the wrapped model on a prompt with a picture first.")
