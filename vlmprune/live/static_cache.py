"""Layers of a static cache that were pruned, or that keep marks: tensors of a fixed length, as `torch.compile` needs them.

A prompt, and a later turn of several tokens, run as they do with a cache that grows: `update` returns what is stored, and no
more. A decoding step is what transformers compiles, and must not depend on anything that Python counts. It gets the tensors in
full length, and `step_mask` says which of their entries a token sees: for each place of the tensor it is known beforehand which
slot it will hold. That mask is the model's own, gathered by these slots, so that whatever it hides stays hidden.

A pruned layer needs as many places fewer as tokens were dropped in its first prompt. It still reports the length and the limit
of the whole conversation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from vlmprune.device import on_host
from vlmprune.errors import UsageError
from vlmprune.live.cache_layer import REMOVED, UNWRAPPED, Marked, Pruned
from vlmprune.live.entries import Entries

SIXTEENTHS = 16
"""The length of a shortened layer is a multiple of this part of the cache's, so that prompts of different lengths need few
different ones, each of which is compiled for."""


class StaticMarkedLayer(Marked, StaticLayer):
    """A static layer with `marks`."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the masks that the model makes.

        Raises:
            UsageError: the cache is too short. Not looked at where that would wait for the device.
        """
        if not torch.compiler.is_compiling():
            check_room((self,), query_length)
        return super().get_mask_sizes(query_length)


class StaticPrunedLayer(Pruned, StaticMarkedLayer):
    """A static layer that stores fewer entries than the conversation has tokens.

    Attributes:
        room: entries that it has places for.
        slots, seen: `[batch, place]` slot of the entry that is, or will be, in each place; and whether tokens may see it.
        gone: how many tokens of the conversation have no entry; a number on the device.
        masked: the running step has its mask from `step_mask`. Otherwise somebody runs the layer who does not know its entries.
    """

    room = 0
    slots: Tensor
    seen: Tensor
    gone: Tensor
    masked = False
    _before: tuple[Tensor, ...] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the tensors, `room` places long."""
        limit, self.max_cache_len = self.max_cache_len, self.room or self.max_cache_len
        super().lazy_initialization(key_states, value_states)
        self.max_cache_len = limit

    @property
    def length(self) -> int:
        """Tokens of the conversation. Waits for the device."""
        return int(on_host(self.cumulative_length)) if self.is_initialized else 0

    @property
    def stored(self) -> int:
        """Entries per row. Waits for the device."""
        return self.length if self.recorded is None else self.length - self.recorded.dropped

    @property
    def entries(self) -> Entries:
        """All that is stored. Waits for the device."""
        assert self.recorded is not None
        return self.recorded.then(self.length - self.recorded.tokens).last(self.stored)

    @property
    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values of what is stored."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[:, :, : self.stored], self.values[:, :, : self.stored]

    def record(self, entries: Entries) -> None:
        """The call that runs, of a prompt or a later turn, will store the last of `entries`."""
        self._before = self.filled if self.stored else ()
        self.masked = False  # on the layer itself, as steps leave it: a compiled graph looks whether it is there
        super().record(entries)
        if not self._before and (needed := self.needed(entries)) > (self.room if self.is_initialized else 0):
            self.room, self.is_initialized = needed, False
        self._lay_out()

    def needed(self, entries: Entries) -> int:
        """Places for `entries`, and for all tokens that may follow."""
        part = -(-self.max_cache_len // SIXTEENTHS)
        needed = entries.slots.shape[1] + max(self.max_cache_len - entries.tokens, 0)
        return min(-(-needed // part) * part, self.max_cache_len)

    def refill(self, keys: Tensor, values: Tensor, entries: Entries) -> None:
        """Store `entries`, and nothing else any more, in tensors that may be shorter."""
        super().record(entries)
        self.masked, self.room = False, min(self.needed(entries), self.room)
        self.lazy_initialization(keys, values)
        self._write(keys, values, 0)
        self._lay_out()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the coming tokens.

        Raises:
            UsageError: the recipe was removed, or a model runs the layer that does not know what was dropped.
        """
        if self.recorded is None:  # after `reset`, a prompt from which nothing is dropped
            if self.is_initialized and self.keys is not None and self.keys.shape[2] < self.max_cache_len:
                self.room, self.is_initialized = 0, False
            return super().update(key_states, value_states, *args, **kwargs)
        if self._before is None:
            self._check(key_states.shape[2])
            return self._step(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._turn(key_states, value_states)
        self._before = None
        self._count(self.recorded.tokens)
        return keys, values

    def step_mask(self, given: Tensor | None, lent: bool = False) -> Tensor:
        """`[batch, head or 1, 1, place]` the mask of a decoding step.

        Args:
            given: the model's own, `[batch or 1, head or 1, 1, slot]`, or None if it sees everything.
            lent: it is for a later layer that sees these keys, to which the step's own have been added.

        Raises:
            UsageError: the mask has not as many columns as the cache has slots.
        """
        self.masked = self.masked or not lent
        length = self.cumulative_length - 1 if lent else self.cumulative_length
        slots, seen = self._places(length)
        if given is None:
            return (seen & (slots <= length))[:, None, None]
        if given.shape[3] != self.max_cache_len:
            raise UsageError(
                f"attention_mask has {given.shape[3]} columns, this static cache has places for {self.max_cache_len} tokens: "
                "give one column for each place, or [batch, tokens so far]."
            )
        return gathered(given, slots, seen)

    def reset(self) -> None:
        super().reset()
        self._before, self.masked = None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.recorded is not None:
            self._lay_out()

    # -- one kind of layer or the other ----------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        assert self.recorded is not None
        self.slots, self.seen, self.gone, _ = self.recorded.placed(self.room, self.max_cache_len)

    def _places(self, length: Tensor) -> tuple[Tensor, Tensor]:
        """`[batch, place]` the slot of each place's entry after a step that follows `length` tokens, and whether there is one
        that it sees."""
        return self.slots, self.seen

    def _count(self, tokens: int) -> None:
        self.cumulative_length.fill_(tokens)

    def _write(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Put entries, of which the first has the number `first`, into their places."""
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, first : first + keys.shape[2]] = keys
        self.values[:, :, first : first + keys.shape[2]] = values

    def _turn(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Store several tokens behind what is there, and return everything."""
        assert self.keys is not None
        assert self.values is not None
        first = self._before[0].shape[2] if self._before else 0
        self._write(key_states, value_states, first)
        stored = first + key_states.shape[2]
        return self.keys[:, :, :stored], self.values[:, :, :stored]

    def _step(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token; runs compiled."""
        assert self.keys is not None
        assert self.values is not None
        # Behind the end, as in a layer of transformers: torch then says that there is no such place.
        there = self.cumulative_length < self.max_cache_len
        place = torch.where(there, self.cumulative_length - self.gone, self.room)[None]
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        self.cumulative_length.add_(1)
        return self.keys, self.values

    def _check(self, coming: int) -> None:
        masked, self.masked = self.masked, False
        if self.owner is not None and self.owner.plan is None:
            raise UsageError(REMOVED)
        if not masked or coming > 1:
            raise UsageError(UNWRAPPED)


class StaticWindowLayer(StaticPrunedLayer, StaticSlidingWindowLayer):
    """The same for a layer that sees a window.

    Its tensors are a ring: entry number n is in place n modulo `room`, and the youngest entry takes the oldest one's place.
    They are as long as the window at most, so that all of the window is always there.

    Attributes:
        window: slots that a token sees, its own among them.
        first: how many entries the prompts left; a number on the device.
    """

    window = 0
    first: Tensor

    @property
    def length(self) -> int:
        """Tokens of the conversation."""
        return self.cumulative_length_int

    @property
    def stored(self) -> int:
        """Entries per row."""
        return min(super().stored, self.keys.shape[2]) if self.is_initialized and self.keys is not None else 0

    @property
    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values of what is stored, in the order of the conversation."""
        assert self.keys is not None
        assert self.values is not None
        all_of_them = self.length if self.recorded is None else self.length - self.recorded.dropped
        places = torch.arange(all_of_them - self.stored, all_of_them, device=self.keys.device) % self.keys.shape[2]
        return self.keys[:, :, places], self.values[:, :, places]

    def needed(self, entries: Entries) -> int:
        """Places: those of the window, where the whole conversation may be longer."""
        return self.max_cache_len if self.max_cache_len >= self.window else super().needed(entries)

    def step_mask(self, given: Tensor | None, lent: bool = False) -> Tensor:
        """As in a layer that sees everything; the mask that is given may show the window only."""
        if given is None:
            return super().step_mask(None, lent)
        self.masked = self.masked or not lent
        length = self.cumulative_length - 1 if lent else self.cumulative_length
        slots, seen = self._places(length)
        columns = slots - (length - given.shape[3] + 1).clamp(min=0)
        return gathered(given, columns.clamp(0, given.shape[3] - 1), seen & (columns >= 0))

    def _lay_out(self) -> None:
        assert self.recorded is not None
        self.slots, self.seen, self.gone, self.first = self.recorded.placed(self.room, None)

    def _places(self, length: Tensor) -> tuple[Tensor, Tensor]:
        youngest, place = length - self.gone, torch.arange(self.room, device=self.slots.device)
        number = youngest - (youngest - place) % self.room  # of the youngest entry that belongs in each place
        step = number >= self.first
        slots = torch.where(step, number + self.gone, self.slots)
        return slots, (step | self.seen) & (slots > length - self.window)

    def _count(self, tokens: int) -> None:
        super()._count(tokens)
        self.cumulative_length_int = tokens

    def _write(self, keys: Tensor, values: Tensor, first: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        last = first + keys.shape[2]
        begin = max(last - self.room, first)
        places = torch.arange(begin, last, device=keys.device) % self.room
        self.keys[:, :, places] = keys[:, :, begin - first :]
        self.values[:, :, places] = values[:, :, begin - first :]

    def _turn(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if self._before:
            key_states = torch.cat((self._before[0], key_states), dim=2)
            value_states = torch.cat((self._before[1], value_states), dim=2)
        self._write(key_states, value_states, 0)
        return key_states, value_states

    def _step(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        place = ((self.cumulative_length - self.gone) % self.room)[None]
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        self.cumulative_length.add_(1)
        self.cumulative_length_int += 1
        return self.keys, self.values


def gathered(given: Tensor, columns: Tensor, seen: Tensor) -> Tensor:
    """`[batch, head or 1, 1, place]` of a step's mask `[batch or 1, head or 1, 1, column]`: the column of each place `[batch,
    place]`, masked where no entry is `seen`."""
    given = given.expand(len(columns), -1, -1, -1)
    part = given.gather(3, columns[:, None, None].expand(-1, given.shape[1], given.shape[2], -1))
    return part.masked_fill(~seen[:, None, None], False if given.dtype == torch.bool else torch.finfo(given.dtype).min)


def first_static(cache: Any) -> StaticLayer | None:
    """The first layer of a static cache that has keys; None if it is another cache."""
    if isinstance(cache, Cache) and not cache.offloading:
        for layer in cache.layers:
            if isinstance(layer, StaticLayer):
                return layer
    return None


def places_of(cache: Any) -> tuple[list[int], list[int]]:
    """Per layer, the places of a static cache, and those that it would have if nothing was dropped; empty for another cache."""
    if first_static(cache) is None:
        return [], []
    places, limits = [], []
    for layer in cache.layers:
        keys = layer.keys if isinstance(layer, StaticLayer) else None
        places.append(0 if keys is None else keys.shape[2])
        limits.append(0 if keys is None else layer.max_cache_len)
    return places, limits


def is_filled(cache: Any) -> bool:
    """Whether it is a static cache, and in use."""
    layer = first_static(cache)
    return layer is not None and layer.is_initialized


def check_room(layers: Iterable[Any], coming: int) -> None:
    """Refuse a cache that is too short, on a CPU; elsewhere this would wait for the device.

    Args:
        layers: of the cache. Those that see a window have room for any number of tokens.
        coming: how many tokens come.

    Raises:
        UsageError: says how long it is, and how long it must be.
    """
    for layer in layers:
        if isinstance(layer, StaticLayer) and not layer.is_sliding:
            if layer.is_initialized and layer.cumulative_length.device.type != "cpu":
                return
            there, room = int(layer.cumulative_length) if layer.is_initialized else 0, layer.max_cache_len
            if there + coming > room:
                raise UsageError(
                    f"the static cache has places for {room} tokens, found {there} in it and {coming} to come: make one with a "
                    f"max_cache_len of {there + coming} or more, as many as the whole conversation will have, dropped tokens "
                    "included."
                )
            return


def without_empty_places(layer: Marked, stored: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a prompt or a turn, where a static layer that dropped nothing returns its empty places, too."""
    if not isinstance(layer, StaticMarkedLayer) or key.shape[2] <= stored:
        return key, value
    return key[:, :, :stored], value[:, :, :stored]


def adopted(layer: StaticLayer, kind: type[StaticMarkedLayer]) -> Any:
    """A layer of ours of a kind in the place of an ordinary one, with its tensors."""
    made: Any = object.__new__(kind)
    vars(made).update(vars(layer))
    return made
