"""The KV cache of pruned layers: fewer entries than the conversation has tokens, with a record of which they are.

This state is kept on the cache layer, so that it follows beams, cropping, later turns and copies of a conversation. A pruned
layer reports how many tokens the conversation has, not how many it stores, because `generate` slices its inputs by it. What
attention redistribution found in a conversation (`Marks`) is kept there too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from vlmprune.device import on_host
from vlmprune.errors import UsageError
from vlmprune.live.cache_layer import REMOVED, UNWRAPPED, Marked, Pruned
from vlmprune.live.entries import Entries
from vlmprune.live.kinds import SHARES
from vlmprune.live.owner import Owner
from vlmprune.live.quantised import QUANTISED, stored_in, taken_over
from vlmprune.live.rows import Reduction
from vlmprune.live.static_cache import StaticMarkedLayer, StaticPrunedLayer, StaticWindowLayer, adopted

PRUNING = "pruning inside the language model"


class MarkedLayer(Marked, DynamicLayer):
    """A dynamic cache layer with `marks`."""

    @staticmethod
    def adopt_marks(layer: DynamicLayer) -> MarkedLayer:
        """Take over an ordinary layer, filled or not."""
        marked = MarkedLayer()
        if layer.get_seq_length():
            _move(layer, marked)
        return marked

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.marks is not None and self.keys is not None:
            self.marks.crop(self.keys.shape[-2])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.marks is not None:
            self.marks.batch(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.marks is not None:
            self.marks.repeat(repeats)


class PrunedLayer(Pruned, MarkedLayer):
    """A dynamic cache layer that stores fewer entries than the conversation has tokens."""

    def get_seq_length(self) -> int:
        """Tokens of the conversation so far, kept or not."""
        stored = stored_in(self)
        if self.recorded is None:
            return stored + self.lost
        return self.recorded.tokens + stored + self.lost - self.recorded.slots.shape[1]

    @property
    def stored(self) -> int:
        """Entries per row."""
        return stored_in(self)

    @property
    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def refill(self, keys: Tensor, values: Tensor, entries: Entries) -> None:
        """Store `entries`, and nothing else any more."""
        self.keys, self.values, self.recorded, self.lost = keys, values, entries, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (assisted decoding). A negative number, as in transformers.

        Raises:
            UsageError: it would reach into the part of the prompt where tokens were dropped.
        """
        if tokens_to_remove > 0:
            DynamicLayer().crop(tokens_to_remove)  # transformers' own error, from 5.18 on; before, a number of tokens to leave
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        remove = -tokens_to_remove
        if remove and self.recorded is not None:
            reaching = remove - (self.stored - self.recorded.slots.shape[1])
            if reaching > 0:
                cropped = self.recorded.crop(reaching)
                if cropped is None:
                    raise UsageError(
                        f"cannot crop {remove} tokens: this would reach a part of the prompt whose visual tokens were "
                        "pruned; crop less, or start the conversation anew."
                    )
                self.recorded = cropped
        super().crop(tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.recorded = None if self.recorded is None else self.recorded.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.recorded = None if self.recorded is None else self.recorded.repeat(repeats)


class WindowLayer(PrunedLayer):
    """A pruned layer that sees a window of the conversation.

    It stores as many of the last entries as the window has slots, so that it never takes more memory than the model's own; of
    these, some may have left the window, because dropped tokens have a slot and no entry.

    Attributes:
        window: slots that a token sees, its own among them.
        record_past: what leaves the window stays, for assisted decoding, which takes tokens back.
    """

    window = 0
    record_past = False

    def activate_past_recording(self) -> None:
        """From now on everything is kept, as in transformers' layer."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the coming tokens, and return all that they may see."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if not self.record_past and (more := keys.shape[-2] - self.window + 1) > 0:
            self.keys, self.values, self.lost = keys[:, :, more:], values[:, :, more:], self.lost + more
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        Raises:
            UsageError: what would be in the window then is not stored any more.
        """
        if tokens_to_remove and self.lost:
            raise UsageError(
                f"cannot crop {abs(tokens_to_remove)} tokens: entries that left the window of {self.window} tokens are not "
                "stored any more; call cache.activate_past_recording() before the prompt, as generate does."
            )
        super().crop(tokens_to_remove)


class FirstPrunedLayer(PrunedLayer):
    """The first pruned layer of a cache. For all of them, it refuses what comes from a model that ignores what was dropped."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the coming tokens.

        Raises:
            UsageError: the recipe was removed, so that the missing tokens are unknown; or several tokens come past the
                hooks of a wrapped model, which record what is stored before it is.
        """
        stored, coming = stored_in(self), key_states.shape[-2]
        if stored and self.owner is not None and self.owner.plan is None:
            raise UsageError(REMOVED)
        if stored and coming > 1 and self.recorded is not None and self.recorded.slots.shape[1] != stored + self.lost + coming:
            raise UsageError(UNWRAPPED)
        return super().update(key_states, value_states, *args, **kwargs)


class FirstWindowLayer(FirstPrunedLayer, WindowLayer):
    """The first pruned layer of a cache, where it sees a window."""


def _move(layer: DynamicLayer, to: DynamicLayer) -> None:
    """Let an empty layer have what another stores; offloaded entries stay where they are."""
    assert layer.keys is not None
    assert layer.values is not None
    to.lazy_initialization(layer.keys, layer.values)
    to.keys, to.values, to.device = layer.keys, layer.values, layer.device


def conversation_layer(cache: Cache | None) -> Any:
    """The cache's last layer with entries, which is pruned if any layer is; None if there is none."""
    layers = getattr(cache, "layers", ())
    return next((layer for layer in reversed(layers) if isinstance(layer, DynamicLayer | StaticLayer)), None)


def tokens_in(cache: Cache | None) -> int:
    """Tokens of the conversation in a cache. One that is of a fixed length, and in use, makes the host wait for the device."""
    length: Any = 0 if cache is None else cache.get_seq_length()
    return int(on_host(length)) if isinstance(length, Tensor) else length


def hand_over(cache: Cache | None, owner: Owner) -> None:
    """From now on, the conversation in a cache is `owner`'s."""
    if cache is None:
        return
    cache.vlmprune = owner  # type: ignore[attr-defined]
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, Pruned):
            layer.owner = owner


def keep_only(layers: Sequence[Pruned], alive: Tensor, past: int, counts: Sequence[int] | None = None) -> None:
    """Remove stored entries of the last prompt for good (site "cache"); the memory of the longer ones is given back.

    Args:
        layers: of one cache, filled, with the same entries.
        alive: `[batch, sequence]` bool over the tokens of the last call.
        past: tokens of the conversation before that call; their entries stay.
        counts: entries of each row that stay, if they are known.
    """
    for layer in layers:
        layer.prefetch()  # entries that were offloaded
    entries, length = layers[0].entries, layers[0].stored
    slots, valid = entries.slots, entries.valid
    here = (slots - past).clamp(0, alive.shape[1] - 1)
    stays = Reduction.keeping(valid & ((slots < past) | alive.gather(1, here)), counts)
    slots = slots.gather(1, stays.rows)
    shorter = Entries(slots, stays.valid, stays.dense, entries.tokens, entries.unpadded, entries.shift)
    moved = stays.gather_all(*(x for layer in layers for x in layer.filled))
    for number, layer in enumerate(layers):
        if layer.marks is not None:
            layer.marks.keep_entries(stays.rows, length)
        layer.refill(moved[2 * number], moved[2 * number + 1], shorter)


def check_same_stages(cache: Cache | None, stages: tuple[int, ...]) -> None:
    """Refuse to go on with a conversation that was pruned at other layers.

    Raises:
        UsageError: the cache's pruned layers begin elsewhere.
    """
    last = conversation_layer(cache)
    if isinstance(last, Pruned) and last.recorded is not None and last.stages != stages:
        here = f"prunes at {', '.join(map(str, stages))}" if stages else "prunes nothing"
        raise UsageError(
            f"the conversation in this cache was pruned at layer(s) {', '.join(map(str, last.stages))}, this recipe {here}: go "
            "on with the recipe it began with, or start with an empty cache."
        )


def pruned_layers(
    cache: Cache,
    indices: Iterable[int],
    stages: tuple[int, ...],
    complete: Callable[[Any], Entries],
    window: int | None = None,
) -> list[Pruned]:
    """Some of a cache's layers as `Pruned` ones, which take the places of ordinary ones on first use.

    Args:
        cache, indices: the layers.
        stages: layers of the recipe's stages.
        complete: gives the entries of an ordinary layer that was filled.
        window: how many slots tokens see in these layers, or None.

    Raises:
        UsageError: the cache is of a kind whose layers cannot have different lengths.
    """
    found: list[Pruned] = []
    for index in indices:
        layer: Any = cache.layers[index] if index < len(cache.layers) else _plain_layer(cache, index, PRUNING)
        if not isinstance(layer, Pruned):
            if type(layer) is not DynamicLayer:
                _check_layer(cache, layer, PRUNING)
            first = not any(map(isinstance, cache.layers[:index], repeat(Pruned)))
            layer = cache.layers[index] = _pruned(layer, first, complete, window)
            layer.owner = getattr(cache, "vlmprune", None)
        layer.stages = stages
        found.append(layer)
    return found


def _pruned(layer: Any, first: bool, complete: Callable[[Any], Entries], window: int | None) -> Pruned:
    """A pruned layer with what an ordinary one stores."""
    pruned: Any
    recorded = complete(layer) if layer.is_initialized and layer.get_seq_length() else None
    if isinstance(layer, StaticLayer):
        pruned = adopted(layer, StaticPrunedLayer if window is None else StaticWindowLayer)
        pruned.recorded, pruned.window = recorded, window
        if recorded is not None:
            assert layer.keys is not None
            pruned.room = layer.keys.shape[2]
            pruned.cumulative_length.fill_(recorded.tokens)
        return pruned
    pruned = _empty(layer, first)
    pruned.marks = getattr(layer, "marks", None)
    if recorded is not None:
        if not isinstance(layer, QUANTISED):
            _move(layer, pruned)
        pruned.recorded = recorded
    return pruned


def marked_layer(cache: Cache, index: int) -> Marked:
    """The cache's layer `index` as one with marks, put in place of an ordinary one on first use.

    Raises:
        UsageError: the cache is of another kind.
    """
    if index < len(cache.layers) and isinstance(layer := cache.layers[index], Marked):  # as in every decoding step
        return layer
    layer = _plain_layer(cache, index, "attention redistribution")
    made: Marked = adopted(layer, StaticMarkedLayer) if isinstance(layer, StaticLayer) else MarkedLayer.adopt_marks(layer)
    cache.layers[index] = made
    return made


def holds_words_only(cache: Cache | None, index: int, begins: bool) -> bool:
    """Whether a cache that cannot keep marks needs none, because its conversation has no picture. It is left as it is.

    Args:
        cache, index: of a decoder layer.
        begins: a conversation without a picture begins with this call, which is noted on the cache.
    """
    if cache is None or cache.layer_class_to_replicate is DynamicLayer:
        return False
    layer = cache.layers[index] if index < len(cache.layers) else None
    if isinstance(layer, Marked) or type(layer) in (DynamicLayer, StaticLayer):
        return False
    if begins:
        cache.vlmprune_words_only = True  # type: ignore[attr-defined]
    return getattr(cache, "vlmprune_words_only", False)


def check_growing(cache: Cache | None, what: str) -> None:
    """Refuse a cache whose layers cannot have different lengths, before anything runs.

    Raises:
        UsageError: it is no `DynamicCache`, nor a `QuantizedCache` that is pruned only.
    """
    if cache is None:
        return
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise _other_cache(what, f"a {type(cache).__name__}")
    for layer in layers:
        if type(layer) is not DynamicLayer:
            _check_layer(cache, layer, what)
    grown = cache.layer_class_to_replicate
    if grown is not None and grown is not DynamicLayer:
        raise _other_cache(what, f"a cache of {getattr(grown, '__name__', 'other')} layers")


def _empty(layer: DynamicLayer, first: bool) -> PrunedLayer:
    """A pruned layer in the place of an ordinary one; a quantised one has its entries."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        windowed = FirstWindowLayer() if first else WindowLayer()
        windowed.window, windowed.record_past = layer.sliding_window, layer.record_past
        return windowed
    kind = FirstPrunedLayer if first else PrunedLayer
    return taken_over(kind, layer) if isinstance(layer, QUANTISED) else kind()


FOLLOWED = {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer, LinearAttentionLayer} | (
    {SHARES} if SHARES is not None else set()
)
"""Layers of a plain `DynamicCache`, and of a plain `StaticCache`."""


def _check_layer(cache: Cache, layer: object, what: str) -> None:
    if cache.offloading and isinstance(layer, StaticLayer):
        raise _other_cache(what, "an offloaded static cache")
    if not (isinstance(layer, Marked) or type(layer) in FOLLOWED or (isinstance(layer, QUANTISED) and what == PRUNING)):
        raise _other_cache(what, f"a {type(layer).__name__}")


def _other_cache(what: str, found: str) -> UsageError:
    fits = "a DynamicCache, StaticCache or QuantizedCache" if what == PRUNING else "a DynamicCache or StaticCache"
    return UsageError(
        f"{what} needs {fits}, found {found}: pass no other cache as past_key_values, and to generate "
        'cache_implementation=None (the default) or "static".'
    )


def _plain_layer(cache: Cache, index: int, what: str) -> Any:
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    _check_layer(cache, layer, what)
    return layer
