"""What the decoder layers between two stages compute and store: decided once, and read by every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from vlmprune.device import on_host
from vlmprune.errors import UsageError
from vlmprune.live.cache import pruned_layers
from vlmprune.live.cache_layer import Pruned
from vlmprune.live.entries import Entries
from vlmprune.live.kinds import Kind, Kinds
from vlmprune.live.layout import real_tokens
from vlmprune.live.masks import part_of_mask, pruned_mask
from vlmprune.live.quantised import stored_in
from vlmprune.live.rows import Reduction

if TYPE_CHECKING:
    from vlmprune.live.call import Call

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines `[batch or 1, token, head_dim]`."""
Mask = Tensor | BlockMask | None
"""In the form that an attention implementation expects."""


@dataclass(frozen=True, eq=False)
class LayerStack:
    """What is the same in all calls of a language model.

    Attributes:
        config: of the language model.
        rotary: its rotary embedding: cosines and sines of positions `[batch, token]`.
        stages: the layers of the recipe's stages.
        kinds: what each layer sees and keeps.
    """

    config: Any
    rotary: Callable[[Tensor, Tensor], Rotary]
    stages: tuple[int, ...]
    kinds: Kinds

    @cached_property
    def storing(self) -> dict[int, dict[Kind, list[int]]]:
        """By first layer of a section and by kind, the layers of that section which store entries."""
        starts = sorted({0, *self.stages} & {*range(len(self.kinds.of))})
        ends = [*starts[1:], len(self.kinds.of)]
        return {start: self.kinds.storing(range(start, end)) for start, end in zip(starts, ends, strict=True)}


@dataclass(eq=False)
class Section:
    """The decoder layers from one stage to the next, in one call.

    A stage opens it, and decides what survives. What its layers are given follows from that: it is made at the first layer of
    each kind, and handed to the others.

    Attributes:
        start: its first layer; −1 for the layers before all stages.
        remaining: per image, `[kept]` indices of its tokens that are still there.
        alive: `[batch, sequence]` bool, the tokens of the call that are still computed; None in a call without an image.
        counts: how many these are in each row, on the host.
        rows: the same as places in the call's sequence; None while nothing was dropped.
        shift: `[batch, sequence]` by how much each position becomes smaller ("compact"), or None.
        newlines: the row separators of LLaVA-NeXT are still there.
        stored: by kind, entries per row in the KV cache of its layers; empty where they store whatever they compute.
    """

    start: int = -1
    remaining: tuple[Tensor, ...] = ()
    alive: Tensor | None = None
    counts: tuple[int, ...] = ()
    rows: Reduction | None = None
    shift: Tensor | None = None
    newlines: bool = True
    stored: dict[Kind, int] = field(default_factory=dict)
    _rotary: dict[tuple[int, int], tuple[Rotary, Rotary, Tensor | None]] = field(default_factory=dict)
    _earlier: Tensor | None = None
    _masks: dict[Kind, Mask] = field(default_factory=dict)

    def at(self, start: int) -> Section:
        """The same kept tokens from layer `start` on."""
        return Section(
            start, self.remaining, self.alive, self.counts, self.rows, self.shift, self.newlines, _rotary=self._rotary
        )

    # -- what a layer is given -------------------------------------------------------------------------------------------

    def arguments(self, index: int, call: Call, hidden: Tensor, kwargs: dict[str, Any], stack: LayerStack) -> dict[str, Any]:
        """The keyword arguments of a layer that computes fewer tokens than the conversation has.

        Args:
            index: number of the layer.
            hidden: `[batch, token, dim]` entering it.
            kwargs: as the model gives them.

        Raises:
            UsageError: the layer's kind cannot follow what was dropped.
        """
        if (kind := stack.kinds.of[index]) not in self._masks:
            self._masks[kind] = self._prepare(kind, index, call, hidden, kwargs, stack)
        made = self._rotary.get((id(kwargs["position_embeddings"][0]), id(self._earlier)))
        rotary = self.rotary(hidden, self._earlier, kwargs, stack) if made is None else made[0]
        # position_ids serve only flash attention's search for packed sequences, which gaps would mislead.
        return {**kwargs, "position_ids": None, "position_embeddings": rotary, "attention_mask": self._masks[kind]}

    def keys_by_layer(self, kinds: Kinds, layers: range, past: int, tokens: int) -> list[int]:
        """Keys per row to which each of its layers attends, where `tokens` tokens follow `past` others."""
        entries = []
        for layer in layers:
            kind = kinds.of[layer]
            every = tokens + (past if kind.window is None else min(past, kind.window - 1))  # the others left the window
            entries.append(0 if kinds.stored_at[layer] is None else self.stored.get(kind, every))
        return entries

    def rotary(self, hidden: Tensor, earlier: Tensor | None, kwargs: dict[str, Any], stack: LayerStack) -> Rotary:
        """The rotary embeddings of the rows that a layer computes; some models give different ones to different layers.

        Args:
            earlier: `[batch]` by how much positions became smaller in earlier turns, or None.
        """
        full: Rotary = kwargs["position_embeddings"]
        if self.rows is None and self.shift is None and earlier is None:
            return full
        if (made := self._rotary.get((id(full[0]), id(earlier)))) is not None:
            return made[0]
        shift = earlier if earlier is None else earlier[:, None]
        if self.shift is not None:
            shift = self.shift + (0 if shift is None else shift)
        moved = full if shift is None else stack.rotary(hidden, kwargs["position_ids"] - shift)
        own = moved if self.rows is None else (self.rows.gather(moved[0]), self.rows.gather(moved[1]))
        return self.hand_on(own, full, earlier)

    def hand_on(self, own: Rotary, full: Rotary, earlier: Tensor | None) -> Rotary:
        """Give `own` to the layers that the model gives `full`, after earlier turns that moved positions by `earlier`."""
        self._rotary[id(full[0]), id(earlier)] = own, full, earlier  # held, so that their identities stay theirs
        return own

    def _prepare(self, kind: Kind, index: int, call: Call, hidden: Tensor, kwargs: dict[str, Any], stack: LayerStack) -> Mask:
        """At the section's first layer of a kind: make their mask, and record in their cache layers what they are about to
        store."""
        cache: Cache | None = kwargs.get("past_key_values")
        if kind.recurrent:
            return self._without_padding(index, kind, call)
        layers: list[Pruned] = []
        if cache is not None:
            complete = partial(complete_entries, call)
            layers = pruned_layers(cache, stack.storing[self.start][kind], stack.stages, complete, kind.window)
            self._earlier = None if layers[0].recorded is None else layers[0].recorded.shift
        implementation = stack.config._attn_implementation
        if layers and self.rows is None and hidden.shape[1] == 1 and not (call.padded_step or call.custom):
            # A decoding step, whose token the cache appends by itself.
            keys = layers[0].entries.then(1)
            query = keys.slots[:, -1:], keys.valid[:, -1:]
            window = None if kind.window is None else window_in_slots(kind.window, keys.tokens, implementation)
            return pruned_mask(*query, keys.slots, keys.valid, keys.dense, implementation, hidden.dtype, window)
        rows = self.rows or every_row(call, hidden)
        keys = self._entries_after(call, layers[0] if layers else None, rows, hidden)
        self.stored[kind] = keys.slots.shape[1]
        for layer in layers:
            layer.record(keys)
        queries = rows.rows.shape[1]
        slots, valid = keys.slots[:, -queries:], keys.valid[:, -queries:]
        window = None if kind.window is None else window_in_slots(kind.window, keys.tokens, implementation)
        given = kwargs.get("attention_mask")
        if call.keeps_masks(kind) and given is not None and "flash" not in implementation:
            return part_of_mask(given, rows.rows.to(hidden.device), valid, keys.slots, keys.valid, keys.tokens)
        seen, dense = keys.valid, keys.dense
        if call.past and call.mask is not None and call.mask.shape[1] > call.past:
            # A later turn's 2-D mask may hide what earlier turns saw.
            place = keys.slots.clamp(max=call.mask.shape[1] - 1)
            seen = seen & (call.mask != 0).to(place.device).gather(1, place)
            dense = bool(on_host(seen.all()))
        return pruned_mask(slots, valid, keys.slots, seen, dense, implementation, hidden.dtype, window, kind.causal)

    def _without_padding(self, index: int, kind: Kind, call: Call) -> Tensor | None:
        """The mask of recurrent layers, `[batch, row]`: it takes padding out of what they compute.

        Raises:
            UsageError: padding would stand between what they remember and what they compute.
        """
        assert self.rows is not None
        if self.rows.dense:
            return None
        if call.past:
            raise UsageError(
                f"layer {index} is recurrent ({kind.name}): padding between the turns of a conversation would change what it "
                "remembers, and the samples of this turn keep different numbers of tokens: run this turn sample by sample."
            )
        return self.rows.valid

    def _entries_after(self, call: Call, layer: Pruned | None, rows: Reduction, hidden: Tensor) -> Entries:
        """What a cache layer stores after this call."""
        new = Entries(
            rows.rows.to(hidden.device) + call.past,
            rows.valid.to(hidden.device),
            rows.dense,
            call.sequence or hidden.shape[1],
            unpadded=rows.dense if call.prompt is None else bool(call.prompt.tokens.real.all()),
            shift=None if self.shift is None else self.shift[:, -1],
        )
        return layer.entries.joined(new) if layer is not None and layer.stored else new


def every_row(call: Call, hidden: Tensor) -> Reduction:
    """All rows of a call that drops nothing, after a conversation that was pruned; padding is not valid."""
    if call.every_row is None:
        batch, sequence = hidden.shape[:2]
        rows = torch.arange(sequence, device=hidden.device).expand(batch, sequence)
        valid = real_tokens(call.mask, batch, sequence, hidden.device)
        call.every_row = Reduction(rows, valid, call.mask is None or bool(on_host(valid.all())))
    return call.every_row


def complete_entries(call: Call, layer: DynamicLayer | StaticLayer, unpadded: bool | None = None) -> Entries:
    """The entries of a layer that dropped nothing so far; the same for all such layers."""
    length = int(layer.get_seq_length())
    stored = min(stored_in(layer), length)
    assert layer.keys is not None
    if call.complete is None or (call.complete.tokens, call.complete.slots.shape[1]) != (length, stored):
        batch = call.batch or layer.keys.shape[0]
        call.complete = Entries.complete(batch, length, layer.device, call.mask, unpadded).last(stored)
    return call.complete


def window_in_slots(window: int, tokens: int, implementation: str) -> int | None:
    """The window, where a conversation of so many tokens is longer; else None.

    Raises:
        UsageError: the attention implementation counts entries, not slots.
    """
    if tokens <= window:
        return None
    if "flash" in implementation:
        raise UsageError(
            f"the conversation has {tokens} tokens, the window of the language model's layers has {window}, and "
            f"{implementation!r} counts it in stored tokens, of which some were dropped: call "
            'model.set_attn_implementation("sdpa").'
        )
    return window
