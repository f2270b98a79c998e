"""A public way to look at attention and hidden states of a live model, wrapped or not.

    with vlmprune.observe(model, attention=[2, 5], hidden=True) as seen:
        model(**inputs)
    seen.attention[5]    # [batch, head, row, key] fp32: attention of the last row
    seen.hidden[5]       # [batch, token, dim] what entered decoder layer 5

The model runs as it does without us: its own attention implementation stays on (SDPA, eager, flex or flash attention), and only
the rows asked for are computed beside it, so that no map of all rows by all keys is built. Works for vision-language models and
for text-only decoders.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from vlmprune.errors import UsageError, shown, unknown
from vlmprune.kernels.attention_mass import attention_rows
from vlmprune.live.attention import CALL_ARGUMENT, route_attention, rows_attention
from vlmprune.live.decoder import KNOWN
from vlmprune.live.masks import MASKED
from vlmprune.live.shells import decoder_inside
from vlmprune.schedule import plain

Rows = Literal["last", "all"] | int | Sequence[int] | Tensor
"""Rows of attention: "last", "all", numbers (negative ones count from the end), or a tensor `[row]` or `[batch, row]`."""

untraced = torch.compiler.disable
"""`torch.compile` runs what observes as it is, and compiles what lies between."""


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """What one decoder layer gives its attention function, as a function passed as `attention=` gets it.

    Attributes:
        layer: number of the decoder layer.
        query: `[batch, head, row, dim]`, after norms and rotary embedding.
        key, value: `[batch, kv_head, key, dim]`, those in the KV cache included.
        mask: the layer's attention mask, in the form its implementation takes; None means causal.
        scaling: factor on the scores.
        kwargs: the other arguments of the attention function.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float
    kwargs: dict[str, Any] = field(repr=False)

    def rows(self, rows: Rows = "last") -> Tensor:
        """`[batch, head, row, key]` fp32 attention of some rows, softmax under the layer's own mask.

        Redistribution edits attention afterwards: these are the numbers before its edit.

        Args:
            rows: which rows of those that the layer computes.

        Raises:
            UsageError: a row that this call does not have, or attention that is no plain softmax of scaled products.
        """
        self._check_plain()
        batch, _, count, _ = self.query.shape
        index = _row_index(rows, batch, count, self.query.device, self.layer)
        key = self.key.to(self.query.dtype)  # `torch.autocast` leaves them in different ones
        with torch.autocast(self.query.device.type, enabled=False):
            if isinstance(self.mask, BlockMask) or (isinstance(self.mask, Tensor) and self.mask.ndim == 4):
                return rows_attention(self.query, key, self.mask, self.scaling, index)
            chosen = self.query.gather(2, index[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3]))
            return attention_rows(chosen, key, self.scaling, self._causal(index))

    def _causal(self, index: Tensor) -> Tensor:
        """`[batch, row, key]` bool: what rows see where no 4-D mask is given (SDPA without padding; flash attention)."""
        keys = self.key.shape[2]
        number, place = torch.arange(keys, device=index.device), (index + keys - self.query.shape[2])[:, :, None]
        visible = number <= place
        if (window := self.kwargs.get("sliding_window")) is not None:
            visible = visible & (number > place - window)
        return visible if self.mask is None else visible & (self.mask[:, None, -keys:] != 0)

    def _check_plain(self) -> None:
        added = [name for name, x in self.kwargs.items() if name not in KNOWN and isinstance(x, Tensor)]
        added += ["softcap"] if self.kwargs.get("softcap") is not None else []
        if isinstance(self.mask, Tensor) and self.mask.is_floating_point() and not self.mask.is_meta:
            added += [] if bool(((self.mask == 0) | (self.mask <= MASKED)).all()) else ["a bias in its mask"]
        if added:
            raise UsageError(
                f"layer {self.layer} does not compute attention as a plain softmax of scaled products, it adds "
                f"{', '.join(added)}: its attention cannot be observed; observe hidden states, or take query and key from a "
                "function passed as attention=…."
            )


@dataclass(frozen=True, eq=False)
class ObservedCall:
    """What was recorded in one forward pass of the decoder.

    Attributes:
        attention: by decoder layer, `[batch, head, row, key]` fp32, detached.
        hidden: by decoder layer, `[batch, token, dim]` what entered it, detached, in the model's dtype.
    """

    attention: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)


class Observation:
    """What a block of `vlmprune.observe` recorded.

    Attributes:
        calls: the forward passes of the block that came to their end, in order. `generate` makes one for the prompt and one for
            each further token.
    """

    def __init__(self, decoder: nn.Module, layers: Any, attention: Any, hidden: Any, rows: Rows) -> None:
        self.calls: list[ObservedCall] = []
        self._decoder, self._layers, self._rows = decoder, layers, rows
        self._attended, self._on_attention = _wanted("attention", attention, len(layers))
        self._entered, self._on_hidden = _wanted("hidden", hidden, len(layers))
        if not self._attended and not self._entered:
            raise UsageError(
                "nothing to observe: pass attention=… or hidden=…, each of them True (all decoder layers), layer numbers, or a "
                "function."
            )
        _check_rows(rows)
        recorded = bool(self._attended) and self._on_attention is None
        if not recorded and not (isinstance(rows, str) and rows == "last"):
            raise UsageError(
                "rows=… belongs to attention=… with layer numbers: a function passed as attention=… chooses them itself, with "
                "its argument's rows(…)."
            )
        self._thread = threading.get_ident()
        self._current: ObservedCall | None = None

    @property
    def attention(self) -> dict[int, Tensor]:
        """Attention recorded in the block's only call, by layer.

        Raises:
            UsageError: the block had no call, or several: take one of `calls`.
        """
        return self._only.attention

    @property
    def hidden(self) -> dict[int, Tensor]:
        """Hidden states recorded in the block's only call, by layer.

        Raises:
            UsageError: the block had no call, or several: take one of `calls`.
        """
        return self._only.hidden

    @property
    def _only(self) -> ObservedCall:
        if not self.calls:
            raise UsageError(
                "no call was observed: run the model inside the `with` block, in the thread that opened it (calls of other "
                "threads are not recorded)."
            )
        if len(self.calls) > 1:
            raise UsageError(
                f"{len(self.calls)} calls were observed (generate makes one per token): choose one, for example "
                "seen.calls[0], which is the first prompt's."
            )
        return self.calls[0]

    def __reduce_ex__(self, protocol: object) -> Any:
        raise UsageError("a model cannot be copied or pickled while it is observed: leave the `with` block first.")

    # -- hooks -----------------------------------------------------------------------------------------------------------

    def _put(self) -> Iterator[Callable[[], None]]:
        """Put every hook in place, and give what takes it away."""
        yield self._decoder.register_forward_pre_hook(self._begin).remove
        yield self._decoder.register_forward_hook(self._end, always_call=True).remove
        for index in sorted(self._attended):
            yield route_attention(_attention_in(self._layers[index], index), [partial(self._see_attention, index)])
        for index in sorted(self._entered):
            # A hook after the layer is given what the layer was given, whatever hooks before it have changed.
            yield self._layers[index].register_forward_hook(partial(self._see_hidden, index), with_kwargs=True).remove

    @property
    def _mine(self) -> ObservedCall | None:
        return self._current if threading.get_ident() == self._thread else None

    @untraced
    def _begin(self, *_: Any) -> None:
        if threading.get_ident() == self._thread:
            self._current = ObservedCall()
            self._missing = set(self._attended)

    @untraced
    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        if (call := self._mine) is None:
            return
        self._current = None
        if output is None:  # the forward pass ended with an exception
            return
        if self._missing:
            raise UsageError(
                f"layer(s) {', '.join(map(str, sorted(self._missing)))} of {type(self._decoder).__name__} compute attention "
                "without transformers' attention functions, where it is observed: observe hidden states instead."
            )
        self.calls.append(call)

    @untraced
    def _see_attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **kwargs: Any
    ) -> None:
        if (call := self._mine) is None or _of_text_only_stream(kwargs):
            return
        self._missing.discard(layer)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        here = LayerAttention(layer, query, key, value, mask, scaling, kwargs)
        if self._on_attention is not None:
            self._on_attention(layer, here)
            return
        with torch.no_grad():
            call.attention[layer] = here.rows(self._rows)

    @untraced
    def _see_hidden(self, layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        if (call := self._mine) is None:
            return
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if self._on_hidden is not None:
            self._on_hidden(layer, hidden)
        else:
            call.hidden[layer] = hidden.detach()


@contextmanager
def observe(
    model: Any,
    *,
    attention: bool | int | Iterable[int] | Callable[[int, LayerAttention], None] | None = None,
    hidden: bool | int | Iterable[int] | Callable[[int, Tensor], None] | None = None,
    rows: Rows = "last",
) -> Iterator[Observation]:
    """Record attention and hidden states of a model's decoder layers while a `with` block runs.

    The block records the calls of the thread that opened it. Other threads may run the model meanwhile; their calls are neither
    recorded nor changed. Blocks can be nested. Leaving the block, also by an exception, restores the model bit for bit.

    Of a wrapped model, what its layers really compute is recorded: after a stage that drops tokens, rows and keys are those
    that are left (`run.last.keep[layer]` says which), and attention is what it is before redistribution edits it.

    Args:
        model: a Hugging Face model with a decoder, or that decoder; wrapped or not, with or without shells (PEFT, DDP, …).
        attention: decoder layers whose attention is recorded: True for all, or their numbers. Or a function, called as
            `attention(layer, here)` in every layer with a `LayerAttention`; then nothing is recorded.
        hidden: decoder layers of which the hidden states `[batch, token, dim]` that enter them are recorded, in the same ways.
            A function is called as `hidden(layer, states)` when the layer has run.
        rows: rows of attention to record: "last" (of a prompt padded on the left, its last token), "all" (the whole map), row
            numbers (negative ones count from the end), or a tensor `[row]` or `[batch, row]`.

    Yields:
        What was recorded: `seen.attention[layer]` and `seen.hidden[layer]`, or `seen.calls` where the block runs several calls.

    Raises:
        UsageError: no model or one without decoder layers, a layer or row that it does not have, or attention that is no plain
            softmax of scaled products.
    """
    decoder = decoder_inside(model)
    seen = Observation(decoder, _layers_of(decoder), attention, hidden, rows)
    undo: list[Callable[[], None]] = []
    try:
        for step in seen._put():
            undo.append(step)
        yield seen
    finally:
        for step in reversed(undo):
            step()


# -- what is asked for -------------------------------------------------------------------------------------------------------


def _wanted(name: str, given: Any, count: int) -> tuple[frozenset[int], Callable[..., None] | None]:
    """The layers to look at, and a function that is called there, or None."""
    if given is None or given is False:
        return frozenset(), None
    if given is True:
        return frozenset(range(count)), None
    if callable(given):
        return frozenset(range(count)), given
    numbers = _numbers(given)
    if numbers is None:
        raise UsageError(
            f"{name} must be True, decoder layers such as [2, 5], or a function, found {shown(given)}; layers are whole "
            "numbers."
        )
    if wrong := [number for number in numbers if not 0 <= number < count]:
        raise UsageError(f"{name}: there is no decoder layer {wrong[0]}; the model has {count}, numbered 0 to {count - 1}.")
    return frozenset(numbers), None


def _numbers(given: Any) -> list[int] | None:
    """Whole numbers in a list; None if they are none."""
    given = plain(given)
    if isinstance(given, str | bytes):
        return None
    if isinstance(given, Tensor):
        given = given.flatten().tolist()
    try:
        numbers = [plain(number) for number in given] if isinstance(given, Iterable) else [given]
    except TypeError:
        return None
    return numbers if all(isinstance(number, int) and not isinstance(number, bool) for number in numbers) else None


def _check_rows(rows: Any) -> None:
    if isinstance(rows, str):
        if rows not in ("last", "all"):
            raise unknown("value of rows", rows, ("last", "all"))
        return
    numbers = _numbers(rows)
    if not numbers or (isinstance(rows, Tensor) and rows.ndim > 2):
        raise UsageError(
            f'rows must be "last", "all", row numbers such as [0, 7], or a tensor [row] or [batch, row], found {shown(rows)}.'
        )


def _row_index(rows: Any, batch: int, count: int, device: torch.device, layer: int) -> Tensor:
    """`[batch, row]` the numbers of rows, counted from the start."""
    _check_rows(rows)
    if isinstance(rows, str):
        return torch.arange(count - 1 if rows == "last" else 0, count, device=device).expand(batch, -1)
    index = torch.as_tensor(_numbers(rows), device=device)
    if isinstance(rows, Tensor) and rows.ndim == 2:
        if len(rows) != batch:
            raise UsageError(f"rows are given for {len(rows)} samples, and the call has {batch}.")
        index = index.view(rows.shape)
    numbers = index.flatten().tolist()
    if wrong := [number for number in numbers if not -count <= number < count]:
        raise UsageError(
            f"there is no row {wrong[0]} in a call whose layer {layer} computes {count}: observe one forward pass of the "
            'prompt (generate goes on with one row per token), or ask for rows="last".'
        )
    return (index % count).expand(batch, -1)


# -- the model ---------------------------------------------------------------------------------------------------------------


def _layers_of(decoder: Any) -> Any:
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UsageError(
            f"found no decoder layers in {type(decoder).__name__} (looked for a list named layers): only models with decoder "
            "layers can be observed."
        )
    return layers


def _attention_in(layer: Any, index: int) -> nn.Module:
    """The attention module of a decoder layer: a causal one, the first if there are several."""
    children = dict(getattr(layer, "_orig_mod", layer).named_children())
    found = [child for child in children.values() if hasattr(child, "config") and hasattr(child, "layer_idx")]
    causal = [child for child in found if getattr(child, "is_causal", True)]
    if not causal:
        what = "attention that is not causal" if found else f"no attention module among {', '.join(children) or 'no parts'}"
        raise UsageError(
            f"layer {index} ({type(layer).__name__}) has {what}: its attention cannot be observed; observe hidden states, or "
            "name other layers."
        )
    return causal[0]


def _of_text_only_stream(kwargs: dict[str, Any]) -> bool:
    """Whether attention belongs to the prompt without its pictures, which a redistribution method runs beside the prompt."""
    call = kwargs.get(CALL_ARGUMENT)
    return call is not None and call.edits.is_text_only
