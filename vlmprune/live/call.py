"""What happened in one call: the state while it runs, the record afterwards, and the report a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vlmprune.live.cache import MarkedLayer
from vlmprune.live.edits import Edits
from vlmprune.live.layout import Bools, Layout, Prompt
from vlmprune.live.record import Prefill
from vlmprune.live.rows import Reduction
from vlmprune.schedule import Budget


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
        edits: what redistribution carries.
        again: without a cache, the prompt that this call runs again; an `attach.Uncached`.
        uncached: per layer, the empty cache layer that keeps redistribution's marks, where there is no cache.
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
    edits: Edits = field(default_factory=Edits)
    again: Any = None
    uncached: dict[int, MarkedLayer] = field(default_factory=dict)
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
        copied.edits = replace(self.edits, rows=dict(self.edits.rows))
        if (record := self.record) is not None:
            copied.record = replace(
                record, kept=[*record.kept], keep=dict(record.keep), entering=[*record.entering], stored=[*record.stored],
                selection=[*record.selection],
            )  # fmt: skip
        return copied
