"""The KV cache of a pruned layer: fewer entries than the conversation has tokens, and it knows which.

The state of a pruned sequence lives on the cache layer, so beams, cropping, several turns and several conversations follow
by themselves. A pruned layer reports its *logical* length, because `generate` slices its inputs by it. What attention
redistribution found out about a conversation (`Marks`) lives there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from vlmprune.device import on_host
from vlmprune.errors import UsageError
from vlmprune.live.marks import Marks
from vlmprune.live.owner import Owner, owner_of
from vlmprune.live.rows import Reduction


class MarkedLayer(DynamicLayer):
    """A dynamic cache layer with `marks`, which follow everything that happens to its entries."""

    marks: Marks | None = None

    @staticmethod
    def adopt_marks(layer: DynamicLayer) -> MarkedLayer:
        """Take over an ordinary layer, filled or not."""
        marked = MarkedLayer()
        if layer.get_seq_length():
            assert layer.keys is not None
            assert layer.values is not None
            marked.lazy_initialization(layer.keys, layer.values)
            marked.keys, marked.values = layer.keys, layer.values
        return marked

    def reset(self) -> None:
        super().reset()
        self.marks = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.marks is not None and self.keys is not None:
            self.marks.crop(self.keys.shape[-2])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.marks is not None:
            self.marks.batch(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.marks is not None:
            self.marks.batch(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.marks is not None:
            self.marks.repeat(repeats)


class PrunedLayer(MarkedLayer):
    """A dynamic cache layer whose prefix has gaps; everything after the prefix (decoding) is stored token by token.

    Attributes:
        slots: `[batch, prefix]` logical position of each stored entry of the prefix.
        valid: `[batch, prefix]` bool, False where a ragged batch is padded.
        dense: every entry of the prefix is valid.
        unpadded: the conversation has no padding, also where entries were dropped.
        logical_prefix: tokens of the conversation that the prefix stands for.
        shift: `[batch]` by how much rotary positions of later tokens move up, or None where all keep their own.
        owner: whose conversation it is.
        cuts: layers of the recipe's stages. A conversation goes on only under cuts at the same layers, because these decide
            which layers have equal entries.
    """

    def __init__(self, cuts: tuple[int, ...]) -> None:
        super().__init__()
        self.cuts = cuts
        self.owner: Owner | None = None
        self.slots: Tensor | None = None
        self.valid: Tensor | None = None
        self.dense = self.unpadded = True
        self.logical_prefix = 0
        self.shift: Tensor | None = None

    @staticmethod
    def adopt(layer: DynamicLayer, cuts: tuple[int, ...], real: Tensor | None, unpadded: bool | None = None) -> PrunedLayer:
        """Take over a layer that was filled without pruning. `real` `[batch, length or more]` is 0 on padding; whether there is
        none is read from it, which waits for the device, unless it is known."""
        pruned = PrunedLayer(cuts)
        pruned.marks = layer.marks if isinstance(layer, MarkedLayer) else None
        length = layer.get_seq_length()
        if length:
            assert layer.keys is not None
            assert layer.values is not None
            pruned.lazy_initialization(layer.keys, layer.values)
            pruned.keys, pruned.values = layer.keys, layer.values
            batch, device = layer.keys.shape[0], layer.keys.device
            slots = torch.arange(length, device=device).expand(batch, length)
            valid = torch.ones_like(slots, dtype=torch.bool) if real is None else real[:, :length].to(device, torch.bool)
            pruned.unpadded = real is None or (bool(on_host(valid.all())) if unpadded is None else unpadded)
            pruned._set_prefix(slots, valid, pruned.unpadded, length)
        return pruned

    def _set_prefix(self, slots: Tensor, valid: Tensor, dense: bool, logical: int) -> None:
        self.slots, self.valid, self.dense, self.logical_prefix = slots, valid, dense, logical

    def _stored(self) -> int:
        return 0 if self.keys is None or self.keys.numel() == 0 else self.keys.shape[-2]

    def _tail(self) -> int:
        """Entries after the prefix."""
        return self._stored() - (0 if self.slots is None else self.slots.shape[1])

    def get_seq_length(self) -> int:
        """Logical length: tokens of the conversation so far, kept or not."""
        return self.logical_prefix + self._tail()

    def entries(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Logical position and validity of every stored entry, `[batch, stored]` each."""
        tail, start = self._tail(), self.logical_prefix
        slots = torch.arange(start, start + tail, device=device).expand(batch, tail)
        valid = torch.ones(batch, tail, dtype=torch.bool, device=device)
        if self.slots is None or self.valid is None:
            return slots, valid
        return torch.cat((self.slots, slots), dim=1), torch.cat((self.valid, valid), dim=1)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the coming tokens.

        Raises:
            UsageError: nobody is there any more who knows which tokens are missing, or several
                tokens come that nobody announced.
        """
        if self.owner is not None and self.owner.plan is None and self._stored():
            raise UsageError(
                "this conversation was pruned, and the recipe it began with has been removed from the model: go on inside the "
                "`with` block (before run.remove()), wrap the model with that recipe again, or start with an empty cache."
            )
        coming = key_states.shape[-2]
        if coming > 1 and self.slots is not None and self._stored() and self.slots.shape[1] != self._stored() + coming:
            raise UsageError(
                "this conversation was pruned by a wrapped model, and goes on in one that is not: go on in the model it began "
                "in, or start with an empty cache."
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def announce(self, slots: Tensor, valid: Tensor, dense: bool, tokens: int) -> tuple[Tensor, Tensor, bool]:
        """Say which of the next `tokens` tokens the coming `update` stores.

        Args:
            slots: `[batch, kept]` logical positions.
            valid: `[batch, kept]` bool.
            dense: every entry of `valid` is True.
            tokens: length of the call's full sequence.

        Returns:
            Slots, validity and density of everything stored after the update.
        """
        logical = self.get_seq_length() + tokens
        old_slots, old_valid = self.entries(slots.shape[0], slots.device)
        slots, valid = torch.cat((old_slots, slots), dim=1), torch.cat((old_valid, valid), dim=1)
        self._set_prefix(slots, valid, self.dense and dense, logical)
        return slots, valid, self.dense

    def reset(self) -> None:
        super().reset()
        self.slots = self.valid = self.shift = None
        self.dense = self.unpadded = True
        self.logical_prefix = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (assisted decoding). A negative number, as in transformers.

        Raises:
            UsageError: it would cut into the part of the prompt where tokens were dropped.
        """
        if tokens_to_remove > 0:
            DynamicLayer().crop(tokens_to_remove)  # transformers' own error, from 5.18 on; before, a number of tokens to leave
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        remove = -tokens_to_remove
        from_prefix = remove - self._tail()
        if remove and self.slots is not None and self.valid is not None and from_prefix > 0:
            kept = self.slots.shape[1] - from_prefix
            expected = torch.arange(self.logical_prefix - from_prefix, self.logical_prefix, device=self.slots.device)
            if kept < 0 or not on_host((self.slots[:, kept:] == expected).all() & self.valid[:, kept:].all()):
                raise UsageError(
                    f"cannot crop {remove} tokens: the cut would reach a part of the prompt whose visual tokens were "
                    "pruned; crop less, or start the conversation anew."
                )
            self._set_prefix(self.slots[:, :kept], self.valid[:, :kept], self.dense, self.logical_prefix - from_prefix)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.slots is not None and self.valid is not None:
            self.slots = self.slots.repeat_interleave(repeats, dim=0)
            self.valid = self.valid.repeat_interleave(repeats, dim=0)
        if self.shift is not None:
            self.shift = self.shift.repeat_interleave(repeats, dim=0)

    def _select(self, indices: Tensor) -> None:
        if self.slots is not None and self.valid is not None:
            indices = indices.to(self.slots.device)
            self.slots, self.valid = self.slots[indices], self.valid[indices]
        if self.shift is not None:
            self.shift = self.shift[indices.to(self.shift.device)]


def hand_over(cache: Cache | None, owner: Owner) -> None:
    """From now on, the conversation in a cache is `owner`'s."""
    if cache is None:
        return
    cache.vlmprune = owner  # type: ignore[attr-defined]
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, PrunedLayer):
            layer.owner = owner


def keep_only(layers: Sequence[PrunedLayer], alive: Tensor, past: int, counts: Sequence[int] | None = None) -> None:
    """Forget stored entries of the last prompt for good (site "cache"); the memory of the longer ones is given back.

    Args:
        layers: of one cache, filled, with the same entries.
        alive: `[batch, sequence]` bool over the tokens of the last call.
        past: tokens of the conversation before that call; their entries stay.
        counts: entries of each row that stay, if they are known.
    """
    first = layers[0]
    slots, valid = first.entries(alive.shape[0], alive.device)
    here = (slots - past).clamp(0, alive.shape[1] - 1)
    stays = Reduction.keeping(valid & ((slots < past) | alive.gather(1, here)), counts)
    logical, slots = first.get_seq_length(), slots.gather(1, stays.rows)
    stored = [x for layer in layers for x in (layer.keys, layer.values) if x is not None]
    shorter = stays.gather_all(*stored)
    for number, layer in enumerate(layers):
        if layer.marks is not None:
            layer.marks.keep_entries(stays.rows, layer._stored())
        layer.keys, layer.values = shorter[2 * number], shorter[2 * number + 1]
        layer._set_prefix(slots, stays.valid, stays.dense, logical)


def check_same_cuts(cache: Cache | None, cuts: tuple[int, ...]) -> None:
    """Refuse to go on with a conversation that was pruned at other layers.

    Raises:
        UsageError: the cache's pruned layers begin elsewhere.
    """
    last = cache.layers[-1] if cache is not None and cache.layers else None  # pruned if any layer is
    if isinstance(last, PrunedLayer) and last.cuts != cuts:
        raise UsageError(
            f"the conversation in this cache was pruned at layer(s) {', '.join(map(str, last.cuts))}, this recipe cuts at "
            f"{', '.join(map(str, cuts))}: go on with the recipe it began with, or start with an empty cache."
        )


def pruned_layer(
    cache: Cache,
    index: int,
    cuts: tuple[int, ...],
    real: Tensor | None = None,
    unpadded: bool | None = None,
) -> PrunedLayer:
    """The cache's layer `index` as a `PrunedLayer`, put in place of an ordinary one on first use.

    `real` `[batch, tokens so far or more]`, the 2-D attention mask, tells padding in what an ordinary layer already holds;
    `unpadded` that there is none, if that is known.

    Raises:
        UsageError: the cache is of a kind whose layers cannot have different lengths.
    """
    layer = _plain_layer(cache, index, "pruning inside the language model")
    if isinstance(layer, PrunedLayer):
        return layer
    adopted = cache.layers[index] = PrunedLayer.adopt(layer, cuts, real, unpadded)
    adopted.owner = owner_of(cache)
    return adopted


def marked_layer(cache: Cache, index: int) -> MarkedLayer:
    """The cache's layer `index` as a `MarkedLayer`, put in place of an ordinary one on first use.

    Raises:
        UsageError: the cache is of another kind.
    """
    if index < len(cache.layers) and isinstance(layer := cache.layers[index], MarkedLayer):  # as in every decoding step
        return layer
    layer = _plain_layer(cache, index, "attention redistribution")
    adopted = cache.layers[index] = MarkedLayer.adopt_marks(layer)
    return adopted


def holds_words_only(cache: Cache | None, index: int, begins: bool) -> bool:
    """Whether a cache that cannot keep marks needs none, because its conversation has no picture. It is left as it is.

    Args:
        cache, index: of a decoder layer.
        begins: a conversation without a picture begins with this call, which is noted on the cache.
    """
    if cache is None or cache.layer_class_to_replicate is DynamicLayer:
        return False
    layer = cache.layers[index] if index < len(cache.layers) else None
    if isinstance(layer, MarkedLayer) or (type(layer) is DynamicLayer and not cache.offloading):
        return False
    if begins:
        cache.vlmprune_words_only = True  # type: ignore[attr-defined]
    return getattr(cache, "vlmprune_words_only", False)


def check_growing(cache: Cache | None, what: str) -> None:
    """Refuse a cache whose layers cannot have different lengths, before anything runs.

    Raises:
        UsageError: it is no plain `DynamicCache`.
    """
    if cache is None:
        return
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise _other_cache(what, f"a {type(cache).__name__}")
    for layer in layers:
        _check_layer(cache, layer, what)
    grown = cache.layer_class_to_replicate
    if grown is not None and grown is not DynamicLayer:
        raise _other_cache(what, f"a cache of {getattr(grown, '__name__', 'other')} layers")


def _check_layer(cache: Cache, layer: object, what: str) -> None:
    if not isinstance(layer, MarkedLayer) and (type(layer) is not DynamicLayer or cache.offloading):
        raise _other_cache(what, "an offloaded cache" if cache.offloading else f"a {type(layer).__name__}")


def _other_cache(what: str, found: str) -> UsageError:
    return UsageError(
        f"{what} needs a plain DynamicCache, found {found}: pass no other cache as past_key_values, and to generate "
        "cache_implementation=None (the default)."
    )


def _plain_layer(cache: Cache, index: int, what: str) -> DynamicLayer:
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    _check_layer(cache, layer, what)
    assert isinstance(layer, DynamicLayer)
    return layer
