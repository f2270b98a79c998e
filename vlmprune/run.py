"""What happened in one call: the state while it runs, the record afterwards, and the report a person reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vlmprune import units
from vlmprune.cost import DecoderShape
from vlmprune.errors import UsageError
from vlmprune.layout import Bools, Layout, Prompt
from vlmprune.methods.redistributing import spans
from vlmprune.reduction import Reduction
from vlmprune.schedule import Budget, Site, Stage


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
    """

    layer: int
    method: str
    site: Site
    sample: int
    ordinal: int
    original: int
    index: Tensor
    features: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Steered:
    """What a redistribution method did to a prompt in one layer.

    Attributes:
        codes: `[batch, 1 or head, key]` group of every stored token, 0 for ordinary ones; None if the method marks none.
        factors, masses: `[batch, head, row, 1 + group]` of the edited rows; None if the method has none.
        valid: `[batch, row]` bool, False on rows that pad a shorter text; None if all count.
        heads: `[batch, head]` factors on the outputs of heads; None if the method scales none.
    """

    layer: int
    method: str
    codes: Tensor | None = None
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
        steered: what redistribution did, per layer.
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
    steered: list[Steered] = field(default_factory=list)
    prefill: Clock = field(default_factory=Clock)
    selection: list[Clock] = field(default_factory=list)
    tower: list[Clock] = field(default_factory=list)


class Projections(NamedTuple):
    """What an attention layer computed: of the last prompt token (of each sample of a row) `[batch, segment, head, dim]` and
    `[batch, segment, kv_head, dim]`, and of all rows of this call `[batch, kv_head, key, dim]`."""

    query_of_last: Tensor
    value_of_last: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class Chosen:
    """What one stage left: per picture, the indices that remain, and the features merged into them (or None); `emptied` where
    places of others are left without a token."""

    remaining: list[Tensor]
    features: list[Tensor | None]
    emptied: bool = False

    def detached(self) -> Chosen:
        """The same, to be kept: nothing that outlives a layer may hold the graph that a backward pass runs through."""
        return Chosen(self.remaining, [None if features is None else features.detach() for features in self.features])


@dataclass(eq=False)
class Steps:
    """What redistribution carries from hook to hook.

    Attributes:
        entered: per edited layer, what it was given and what it found. It stays until the call is over, so that gradient
            checkpointing, which runs a layer again in the backward pass, finds what the first run found.
        rows: which rows are edited, per kind of rows and number of tokens a layer computes.
        blind: the prompt without its pictures, where a method compares with it.
        of_blind: this is that prompt's own call.
        apart: the samples that are packed into rows, each in a row of its own; None if they are not.
    """

    entered: dict[int, Any] = field(default_factory=dict)
    rows: dict[tuple[str, int], Reduction | None] = field(default_factory=dict)
    blind: Any = None
    of_blind: bool = False
    apart: Any = None


@dataclass(eq=False)
class Call:
    """State of one forward pass; travels from hook to hook as a keyword argument, so that threads never share it.

    Attributes:
        owner, plan: whose conversation this is, and what is done to it: the plan that the conversation began with, or None.
        enabled, budget, blocks: what the caller had said when the call began.
        labels: copies of the labels that were given, each with how many rows before it a label is predicted from.
        recomputes: gradient checkpointing runs layers of this call again, in the backward pass.
        before: per decoder layer, the call as it was when the layer was entered, under gradient checkpointing. Before
            transformers 5.23 hooks run again when a layer is recomputed, and must start from what they started from.
        tail: tokens at the end that are not part of the prompt (candidates of assisted decoding; tokens generated without a
            cache).
        asked: tokens at the end whose logits were asked for, or 0.
        pictures: visual tokens of each picture that the call brings, or None.
        layout: where visual tokens are; None if this call prunes nothing.
        prompt: the call's tokens, on the host.
        mask: 2-D attention mask over all tokens so far, or None.
        custom: layers are given a mask of which every cell counts (4-D, block mask, or one for packed samples).
        past: tokens in the cache before this call.
        prompt_end: `[batch]` place of the prompt's last token.
        remaining: per picture, indices that are still there.
        candidates: per picture, how many of its tokens the call's mask does not hide: what budgets count from.
        entered: per picture, how many of its tokens entered the language model.
        newlines: `[batch, sequence]` row separators among the image placeholders, on the host; None if there are none.
        alive: `[batch, sequence]` bool, what was not dropped yet.
        counts: of each row, how many tokens that is, on the host.
        tower: per picture, what the vision tower knew of each token, `[visual, …]` by probe.
        views: per picture `[visual, 2]`, number and side of the view each token belongs to, −1 where it was dropped inside the
            tower, on the host; empty where nobody asks or the tower has no views.
        reduction: what the current layer computes; None while nothing was dropped.
        embeddings: `[batch, sequence, dim]` what entered the language model, where a method looks back at it.
        attention: per decoder layer, `[batch, head, segment, key]` attention of the last prompt token to this call's rows; of
            each sample, where several are packed into a row.
        projections: per decoder layer, queries, keys and values.
        text: the prompt's text after its last picture, as rows of the call's sequence.
        text_attention: per decoder layer, `[batch, head, text, key]` attention of these rows.
        masks: per group of layers between two stages, the mask of that group.
        idle: nothing is left to do for this call.
        padded_step: a decoding step whose token some samples hide.
        rotary: rotary embeddings of the rows that are computed, by the identity of the full ones (models may have several)
            and by group of layers.
        shift: `[batch, sequence]` by how many places each token moves up ("compact" positions); None if none does.
        chosen: per stage, what remains of every picture and the features that were merged into it; filled from the start when
            generation without a cache runs the same prompt again.
        autocast: whether the model was called inside `torch.autocast`, and its dtype.
        replayed: the choices are those of an earlier run of the same prompt.
        every_row: all rows of a turn that cuts nothing.
        steps: what redistribution carries.
        again: without a cache, the prompt that this call runs again; an `attach.Uncached`.
        uncached: per layer, what redistribution marked, where there is no cache to keep it.
        resumed: `uncached` is that of an earlier run of the same prompt.
    """

    owner: Any = None
    plan: Any = None
    enabled: bool = True
    budget: Budget | None = None
    blocks: tuple[Any, ...] = ()
    labels: tuple[tuple[Tensor, int], ...] = ()
    recomputes: bool = False
    before: dict[int, Call] = field(default_factory=dict)
    tail: int = 0
    asked: int = 0
    pictures: Sequence[int] | None = None
    layout: Layout | None = None
    prompt: Prompt | None = None
    mask: Tensor | None = None
    custom: bool = False
    past: int = 0
    batch: int = 0
    sequence: int = 0
    prompt_end: Tensor | None = None
    remaining: list[Tensor] = field(default_factory=list)
    candidates: list[int] = field(default_factory=list)
    entered: list[int] = field(default_factory=list)
    newlines: Bools | None = None
    alive: Tensor | None = None
    counts: list[int] = field(default_factory=list)
    tower: list[dict[str, Tensor]] = field(default_factory=list)
    views: list[Any] = field(default_factory=list)
    reduction: Reduction | None = None
    embeddings: Tensor | None = None
    attention: dict[int, Tensor] = field(default_factory=dict)
    projections: dict[int, Projections] = field(default_factory=dict)
    text: Reduction | None = None
    text_attention: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[int, Tensor | BlockMask | None] = field(default_factory=dict)
    rotary: dict[tuple[int, int], tuple[Any, Any]] = field(default_factory=dict)
    shift: Tensor | None = None
    chosen: dict[int, Chosen] = field(default_factory=dict)
    autocast: tuple[bool, Any] = (False, None)
    replayed: bool = False
    every_row: Reduction | None = None
    steps: Steps = field(default_factory=Steps)
    again: Any = None
    uncached: dict[int, Any] = field(default_factory=dict)
    resumed: bool = False
    record: Prefill | None = None
    idle: bool = False
    padded_step: bool = False

    def branch(self) -> Call:
        """The call as it is now: what happens to it later does not reach the copy, nor the other way round."""
        copied = copy(self)
        names = ("remaining", "entered", "counts", "attention", "projections", "text_attention", "masks", "rotary", "chosen")
        for name in names:
            setattr(copied, name, copy(getattr(self, name)))
        copied.steps = replace(self.steps, rows=dict(self.steps.rows))
        if (record := self.record) is not None:
            copied.record = replace(
                record, kept=[*record.kept], keep=dict(record.keep), entering=[*record.entering], stored=[*record.stored],
                selection=[*record.selection],
            )  # fmt: skip
        return copied


@dataclass(frozen=True)
class StageReport:
    """One stage: per picture, how many of the original tokens were kept."""

    layer: int
    method: str
    site: Site
    kept: tuple[int, ...]
    original: tuple[int, ...]


@dataclass(frozen=True)
class EditReport:
    """What redistribution did to the prompt, over all its layers.

    Attributes:
        layers: the layers, in order.
        marked: tokens in each of the method's groups 1, 2, …, mean over layers, samples and heads.
        edited: share of heads and rows that were edited, or None where every row of the method's kind is.
        moved: attention that went elsewhere, mean over heads and rows, edited or not; None if not known.
        scaled: share of heads whose outputs are scaled, mean over layers and samples; None if the method scales none.
    """

    method: str
    layers: tuple[int, ...]
    marked: tuple[float, ...]
    edited: float | None
    moved: float | None
    scaled: float | None = None

    @staticmethod
    def of(method: str, steered: list[Steered]) -> EditReport:
        codes = [s.codes for s in steered if s.codes is not None]
        heads = [s.heads for s in steered if s.heads is not None]
        groups = max((int(c.max()) for c in codes), default=0)
        marked = tuple(_mean([(c == group).sum(dim=-1).float().mean() for c in codes]) for group in range(1, groups + 1))
        return EditReport(
            method=method,
            layers=tuple(s.layer for s in steered),
            marked=marked,
            edited=_over_rows([(s.changed, s.valid) for s in steered]),
            moved=_over_rows([(s.moved, s.valid) for s in steered]),
            scaled=_mean([(factors != 1).float().mean() for factors in heads]) if heads else None,
        )

    def __str__(self) -> str:
        parts = [f"layers {spans(self.layers)}" if len(self.layers) > 1 else f"layer {self.layers[0]}"]
        if self.scaled is not None:
            return f"{parts[0]}, {self.scaled:.1%} of heads scaled"
        parts.append(f"{' / '.join(f'{count:.1f}' for count in self.marked) or 'no'} tokens marked")
        if self.edited is not None and self.moved is not None:
            parts.append(f"{self.edited:.1%} of heads and rows edited, {self.moved:.2%} of their attention moved")
        return ", ".join(parts)


@dataclass(frozen=True)
class Report:
    """The last prefill in numbers. FLOPs and bytes are of the language model's prefill, for the whole batch (`vlmprune.cost`
    has the formula); the un-pruned figures are of the same prompt. `print` shows it as a table.

    Attributes:
        kv_bytes, kv_bytes_peak: what the KV cache holds after prefill, and the most it held; more where a stage shortens it,
            whose old and new entries exist side by side for a moment.
        hidden: visual tokens that the call's own attention mask hid.
        neutral: redistribution methods that change nothing with the parameters they have.
        selection_ms: choosing and shortening, a part of `prefill_ms`.
        overhead: the same by place, in milliseconds; and looking and shortening inside the vision tower, which is no part of
            `prefill_ms`.
    """

    recipe: str
    batch: int
    prompt_tokens: int
    visual_tokens: int
    newlines: int
    newline_policy: str
    stages: tuple[StageReport, ...]
    entering: tuple[int, ...]
    visual_compute_average: float
    visual_nominal_average: float
    flops: int
    flops_unpruned: int
    kv_bytes: int
    kv_bytes_unpruned: int
    kv_bytes_peak: int
    prefill_ms: float
    selection_ms: float
    edits: tuple[EditReport, ...] = ()
    overhead: tuple[tuple[str, float], ...] = ()
    hidden: int = 0
    neutral: tuple[str, ...] = ()

    @staticmethod
    def of(record: Prefill, recipe: str) -> Report:
        shape, batch = record.shape, record.batch
        full = record.sequence
        stages: dict[tuple[Site, int, str], list[Kept]] = {}
        for kept in record.kept:
            stages.setdefault((kept.site, kept.layer, kept.method), []).append(kept)
        left = {layer: sum(len(k.index) for k in kept) for (site, layer, _), kept in stages.items() if site != "cache"}
        entering_visual, after = [], record.visual
        for layer in range(shape.layers):
            after = left.get(layer, after)
            entering_visual.append(after)
        # A stage at layer l shortens the output of layer l − 1: that is the "nominal" way of counting.
        leaving_visual = [*entering_visual[1:], entering_visual[-1]]
        return Report(
            recipe=recipe,
            batch=batch,
            prompt_tokens=full,
            visual_tokens=record.visual,
            newlines=record.newlines,
            newline_policy="kept" if record.newlines_kept else "dropped",
            stages=tuple(
                StageReport(layer, method, site, tuple(len(k.index) for k in kept), tuple(k.original for k in kept))
                for (site, layer, method), kept in stages.items()
            ),
            entering=tuple(record.entering),
            visual_compute_average=sum(entering_visual) / shape.layers / batch,
            visual_nominal_average=sum(leaving_visual) / shape.layers / batch,
            flops=batch * sum(map(shape.layer_flops, record.entering, record.stored)),
            flops_unpruned=batch * shape.layers * shape.layer_flops(full, record.past + full),
            kv_bytes=batch * sum(shape.layer_kv_bytes(keys, record.itemsize) for keys in record.resident),
            kv_bytes_unpruned=batch * shape.layers * shape.layer_kv_bytes(record.past + full, record.itemsize),
            kv_bytes_peak=batch * shape.layer_kv_bytes(record.peak, record.itemsize),
            prefill_ms=record.prefill.ms,
            selection_ms=sum(clock.ms for clock in record.selection),
            edits=tuple(
                EditReport.of(name, [s for s in record.steered if s.method == name])
                for name in dict.fromkeys(s.method for s in record.steered)
            ),
            overhead=_by_place([*record.tower, *record.selection]),
            hidden=record.hidden,
            neutral=record.neutral,
        )

    def rows(self) -> list[tuple[str, str]]:
        """The report as labelled lines."""
        kept = [(f"kept at {_place(s)} ({s.method})", _each(s.kept, s.original)) for s in self.stages]
        higher = self.kv_bytes_peak > self.kv_bytes
        peak = f", {units.size(self.kv_bytes_peak)} before the cache was shortened" if higher else ""
        hidden = [("hidden by the mask", f"{self.hidden} visual tokens, no candidates of any budget")] if self.hidden else []
        newlines = [("row separators", f"{self.newlines}, counted as text, {self.newline_policy}")] if self.newlines else []
        seen = f"{self.visual_tokens} visual" if self.visual_tokens else "no picture found: nothing to prune"
        return [
            ("recipe", self.recipe),
            ("prompt", f"{self.batch} × {self.prompt_tokens} tokens, {seen}"),
            *kept,
            *newlines,
            *hidden,
            *((f"redistributed ({edit.method})", str(edit)) for edit in self.edits),
            *((f"redistributed ({name})", "changes nothing with these parameters") for name in self.neutral),
            (
                "visual tokens per layer",
                f"{self.visual_compute_average:.1f} entering on average, {self.visual_nominal_average:.1f} leaving",
            ),
            ("prefill FLOPs", units.share(self.flops, self.flops_unpruned, units.operations)),
            ("KV cache", units.share(self.kv_bytes, self.kv_bytes_unpruned, units.size) + peak),
            (
                "prefill time",
                f"{units.duration(self.prefill_ms)}, of which choosing and shortening {units.duration(self.selection_ms)}",
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, texts, dicts and lists, for JSON: bytes, FLOPs and milliseconds."""
        return units.plain(asdict(self))

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        return "\n".join(f"{label:<{width}}  {value}" for label, value in self.rows())


def _by_place(clocks: list[Clock]) -> tuple[tuple[str, float], ...]:
    places = dict.fromkeys(clock.what for clock in clocks)
    return tuple((place, sum(clock.ms for clock in clocks if clock.what == place)) for place in places)


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())


def _over_rows(parts: list[tuple[Tensor | None, Tensor | None]]) -> float | None:
    """Mean over layers, samples, heads and rows that count."""
    total = count = 0.0
    for x, valid in parts:
        if x is None:
            continue
        chosen = x if valid is None else x.transpose(1, 2)[valid]
        total, count = total + float(chosen.float().sum()), count + chosen.numel()
    return total / count if count else None


def _place(stage: StageReport) -> str:
    return Stage(stage.layer, Budget(fraction=1.0), stage.site).place


def _each(kept: tuple[int, ...], original: tuple[int, ...]) -> str:
    pairs = list(zip(kept, original, strict=True))
    if len(set(pairs)) == 1:
        return f"{kept[0]} of {original[0]}" + (f" in each of {len(pairs)} pictures" if len(pairs) > 1 else "")
    return ", ".join(f"{k} of {n}" for k, n in pairs[:8]) + (", …" if len(pairs) > 8 else "")


def no_prefill() -> UsageError:
    return UsageError(
        "nothing to report here: this thread, or this override block, has run no prompt, or ran its last one switched off; run "
        "the wrapped model on a prompt first, or ask for the report in the thread that did."
    )
