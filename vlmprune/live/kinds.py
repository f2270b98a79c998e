"""Kinds of decoder layers, read from the model: what a layer sees of a conversation, and what it keeps of it.

    full attention     sees every token before; keeps keys and values of each
    sliding window     sees the last tokens, counted in slots; keeps their keys and values
    recurrent          has no attention (linear attention, short convolution); keeps a state of fixed size

A layer may also see the keys and values of an earlier layer, instead of its own (shared keys). All that a stage makes for the
layers behind it (masks, lists of entries) is made once per kind. A kind that is not listed here is refused by its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from vlmprune.errors import UsageError
from vlmprune.live.parts import uncompiled

SHARES: Any = getattr(cache_utils, "DummyLayer", None)
"""What the cache has for a layer without keys of its own; before transformers 5.22, its cache ends before these layers."""
KNOWN: dict[str, type] = {
    "full_attention": DynamicLayer,
    "sliding_attention": DynamicSlidingWindowLayer,
    "linear_attention": LinearAttentionLayer,
    "conv": LinearAttentionLayer,
}
"""Kinds that are followed, by transformers' names, with the cache layer that belongs to each."""


@dataclass(frozen=True, eq=False)
class Kind:
    """Decoder layers that are given the same mask.

    Attributes:
        name: transformers' name.
        window: how many slots a token sees, its own among them; None: all before it.
        recurrent: there is no attention, and no entry per token.
        causal: without a mask, a token sees none after it.
    """

    name: str
    window: int | None = None
    recurrent: bool = False
    causal: bool = True


@dataclass(frozen=True, eq=False)
class Kinds:
    """The kind of every decoder layer.

    Attributes:
        of: by layer.
        stored_at: by layer, the layer in whose cache the keys are that it sees; None where it is recurrent.
    """

    of: tuple[Kind, ...]
    stored_at: tuple[int | None, ...]

    @cached_property
    def window(self) -> int | None:
        """The smallest window of any layer, or None."""
        return min((kind.window for kind in self.of if kind.window is not None), default=None)

    @cached_property
    def causal(self) -> bool:
        """Whether no layer lets a token see later ones where it is given no mask."""
        return all(kind.causal for kind in self.of)

    @cached_property
    def last(self) -> int:
        """The last layer that stores entries."""
        return max(where for where in self.stored_at if where is not None)

    @cached_property
    def lenders(self) -> tuple[int, ...]:
        """The layers whose keys others see, too."""
        shared = Counter(where for where in self.stored_at if where is not None)
        return tuple(layer for layer, users in sorted(shared.items()) if users > 1)

    def in_words(self, layer: int) -> str:
        """A layer that has no attention, for a refusal."""
        return f"layer {layer} has no attention ({self.of[layer].name})"

    def storing(self, layers: Sequence[int]) -> dict[Kind, list[int]]:
        """By kind, those of some layers that store entries."""
        found: dict[Kind, list[int]] = {}
        for layer in layers:
            if self.stored_at[layer] == layer:
                found.setdefault(self.of[layer], []).append(layer)
        return found

    @property
    def with_attention(self) -> tuple[int, ...]:
        """The layers that have attention."""
        return tuple(layer for layer, kind in enumerate(self.of) if not kind.recurrent)


def kinds_of(language_model: Any, layers: Sequence[Any]) -> Kinds:
    """Read the kinds of a language model's layers from its config and from the cache that transformers makes for it.

    Raises:
        UsageError: a kind that is not followed.
    """
    config = language_model.config
    try:
        cached: list[Any] = DynamicCache(config=config).layers
    except KeyError as error:  # transformers makes the cache by the layers' names
        raise _unknown(str(error.args[0]), list(getattr(config, "layer_types", ()))) from error
    names = list(getattr(config, "layer_types", None) or _names(config, cached))
    kinds: dict[tuple[str, int | None], Kind] = {}
    of: list[Kind] = []
    stored_at: list[int | None] = []
    for layer, name in enumerate(names[: len(layers)]):
        own = cached[layer] if layer < len(cached) else None
        shares = own is None or (SHARES is not None and type(own) is SHARES)
        if name not in KNOWN or not (shares or type(own) is KNOWN[name]):
            raise _unknown(name, names)
        earlier = [other for other in range(layer) if names[other] == name and stored_at[other] == other]
        if shares and not earlier:
            raise _unknown(name, names)
        recurrent = KNOWN[name] is LinearAttentionLayer
        window = of[earlier[-1]].window if shares else getattr(own, "sliding_window", None)
        kind = kinds.setdefault((name, window), Kind(name, window, recurrent, _is_causal(layers[layer])))
        of.append(kind)
        stored_at.append(None if recurrent else earlier[-1] if shares else layer)
    return Kinds(tuple(of), tuple(stored_at))


def _names(config: Any, cached: Sequence[Any]) -> list[str]:
    """The kinds of layers whose config does not name them; a cache alone cannot tell chunks from windows."""
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"] * len(cached)
    names = {kind: name for name, kind in KNOWN.items()}
    return [names.get(type(layer), type(layer).__name__) for layer in cached]


def _is_causal(layer: Any) -> bool:
    return all(getattr(child, "is_causal", True) is not False for child in uncompiled(layer).children())


def _unknown(name: str, names: Sequence[str]) -> UsageError:
    there = [str(layer) for layer, other in enumerate(names) if other == name]
    where = f" (layers {', '.join(there[:4])}{', …' if len(there) > 4 else ''})" if there else ""
    return UsageError(
        f"the language model has layers of the kind {name!r}{where}; pruning follows {', '.join(KNOWN)}: such text models are "
        "not supported."
    )
