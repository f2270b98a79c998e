"""The state of one forward pass. It travels from hook to hook as a keyword argument, so that threads never share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from vlmprune.live.cache_layer import Marked
from vlmprune.live.edits import Edits
from vlmprune.live.entries import Entries
from vlmprune.live.injected import Injections
from vlmprune.live.kinds import Kind
from vlmprune.live.layout import Bools, Layout, Tokens
from vlmprune.live.record import Judged, Prefill
from vlmprune.live.rows import Reduction
from vlmprune.live.section import Section
from vlmprune.schedule import Budget


class Projections(NamedTuple):
    """What an attention layer computed: of the last prompt token (of each sample of a row) `[batch, segment, head, dim]` and
    `[batch, segment, kv_head, dim]`, and of all rows of this call `[batch, kv_head, key, dim]`."""

    query_of_last: Tensor
    value_of_last: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class StageResult:
    """What one stage left.

    Attributes:
        remaining: per image, `[kept]` indices of its tokens that are still there.
        features: per image, `[kept, dim]` what took the places of these, or None.
        merges: tokens of some image were merged.
        emptied: places of others are left without a token.
        judged: per image, what was decided together, for `run.explain`; or None.
    """

    remaining: tuple[Tensor, ...]
    features: tuple[Tensor | None, ...]
    merges: bool = False
    emptied: bool = False
    judged: Sequence[tuple[Judged, ...]] | None = None

    def detached(self) -> StageResult:
        """The same, to be kept: nothing that outlives a layer may hold the graph that a backward pass runs through."""
        if not self.merges:
            return self
        return replace(self, features=tuple([None if x is None else x.detach() for x in self.features]))


@dataclass(eq=False)
class Prompt:
    """What a call with images has beside what every call has.

    Attributes:
        tokens: the call's tokens, on the host.
        layout: where visual tokens are.
        end: `[batch]` place of the prompt's last token.
        candidates: per image, how many of its tokens the call's mask does not hide: what budgets count from.
        entered: per image, how many of its tokens entered the language model.
        newlines: `[batch, sequence]` row separators among the image placeholders, on the host; None if there are none.
        tower: per image, what was recorded in the vision tower of each token, `[visual, …]` by probe.
        crops: per image `[visual, 2]`, number and side of the crop each token belongs to, −1 where it was dropped inside the
            tower, on the host; empty where no method needs it or the tower has no crops.
        embeddings: `[batch, sequence, dim]` what entered the language model, where a method looks back at it.
        attention: per decoder layer, `[batch, head, segment, key]` attention of the last prompt token to this call's rows; of
            each sample, where several are packed into a row.
        projections: per decoder layer, queries, keys and values.
        text: the prompt's text after its last image, as rows of the call's sequence.
        text_attention: per decoder layer, `[batch, head, text, key]` attention of these rows.
        chosen: per stage, what it left; filled from the start when generation without a cache runs the same prompt again.
        replayed: the choices are those of an earlier run of the same prompt.
        injections: what is to be added to visual tokens between decoder layers; None if the model adds all of it.
    """

    tokens: Tokens
    layout: Layout
    end: Tensor
    candidates: list[int] = field(default_factory=list)
    entered: list[int] = field(default_factory=list)
    newlines: Bools | None = None
    tower: list[dict[str, Tensor]] = field(default_factory=list)
    crops: list[Any] = field(default_factory=list)
    embeddings: Tensor | None = None
    attention: dict[int, Tensor] = field(default_factory=dict)
    projections: dict[int, Projections] = field(default_factory=dict)
    text: Reduction | None = None
    text_attention: dict[int, Tensor] = field(default_factory=dict)
    chosen: dict[int, StageResult] = field(default_factory=dict)
    replayed: bool = False
    injections: Injections | None = None

    def by_frame(self, image: int) -> list[int]:
        """Of each frame of a video, how many of its tokens the call's mask does not hide."""
        video = self.layout.images[image]
        assert video.frame is not None
        there = self.tokens.real[video.sample, video.places]
        counts: list[int] = np.bincount(video.frame[there], minlength=video.frames).tolist()
        return counts


@dataclass(eq=False)
class Call:
    """One forward pass.

    Attributes:
        owner, plan: whose conversation this is, and what is done to it: the plan that the conversation began with, or None.
        enabled, budget, blocks: the caller's settings when the call began.
        labels: copies of the labels that were given, each with how many rows before it a label is predicted from.
        recomputes: gradient checkpointing runs layers of this call again, in the backward pass.
        tail: tokens at the end that are not part of the prompt (candidates of assisted decoding; tokens generated without a
            cache).
        positions: position ids that the language model was given, or None.
        logits_wanted: tokens at the end whose logits were asked for, or 0.
        generation: settings of the `generate` that makes this call with images which it has not encoded beforehand, or None.
        images: visual tokens of each image that the call brings, or None.
        mask: 2-D attention mask over all tokens so far, or None.
        custom: layers are given a mask of which every cell counts (4-D, block mask, or one for packed samples).
        given_masks: the language model is given finished masks, in which tokens may see later ones.
        past: tokens in the cache before this call.
        batch, sequence: shape of the call, where it is a prompt.
        prompt: what a call with images has beside; None for any other, and where nothing is done.
        record: what is recorded of a prompt.
        sections: the sections so far, in order; the first begins before all layers.
        section: that of the layer that runs.
        autocast: whether the model was called inside `torch.autocast`, and its dtype.
        idle: nothing is left to do for this call.
        padded_step: a decoding step whose token some samples hide.
        every_row, complete: made by sections once for all.
        edits: what redistribution carries.
        again: without a cache, the prompt that this call runs again; a `prefill.Uncached`.
        uncached: per layer, the empty cache layer that keeps the marks of redistribution, where there is no cache.
        resumed: `uncached` is that of an earlier run of the same prompt.
    """

    owner: Any = None
    plan: Any = None
    enabled: bool = True
    budget: Budget | None = None
    blocks: tuple[Any, ...] = ()
    labels: tuple[tuple[Tensor, int], ...] = ()
    recomputes: bool = False
    tail: int = 0
    positions: Tensor | None = None
    logits_wanted: int = 0
    generation: Any = None
    images: Sequence[int] | None = None
    mask: Tensor | None = None
    custom: bool = False
    given_masks: bool = False
    past: int = 0
    batch: int = 0
    sequence: int = 0
    prompt: Prompt | None = None
    record: Prefill | None = None
    section: Section = field(default_factory=Section)
    sections: list[Section] = field(default_factory=list)
    autocast: tuple[bool, Any] = (False, None)
    idle: bool = False
    padded_step: bool = False
    every_row: Reduction | None = None
    complete: Entries | None = None
    edits: Edits = field(default_factory=Edits)
    again: Any = None
    uncached: dict[int, Marked] = field(default_factory=dict)
    resumed: bool = False

    def keeps_masks(self, kind: Kind) -> bool:
        """Whether a mask that layers of a kind are given says more than which tokens are hidden, so that it is gathered and not
        made anew."""
        return self.custom or self.given_masks or not kind.causal

    def begin_sections(self, remaining: tuple[Tensor, ...], alive: Tensor, counts: tuple[int, ...]) -> None:
        """A prompt enters the language model: the first section begins, before all stages."""
        self.section = Section(remaining=remaining, alive=alive, counts=counts)
        self.sections = [self.section]

    def section_of(self, layer: int) -> Section:
        """The section that a layer belongs to."""
        if not self.sections:
            self.sections.append(self.section)
        for section in reversed(self.sections):
            if section.start <= layer:
                return section
        raise IndexError(layer)

    def layers_by_section(self, layers: int) -> list[tuple[Section, int]]:
        """The sections in order, each with its number of layers, of `layers` in all."""
        sections = self.sections or [self.section]
        ends = [*(section.start for section in sections[1:]), layers]
        return [(section, end - max(section.start, 0)) for section, end in zip(sections, ends, strict=True)]
