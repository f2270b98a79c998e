"""How a language model is built: the names of its parts, the arguments of its decoder layers, and those of their attention.

`config.model_type` names a family of checkpoints, and not how their language model works: that of LLaVA may be Llama, Mistral,
Qwen, Phi or another. So the model itself is inspected when it is wrapped: in a private copy (`unhooked`) one token runs past
all decoder layers, and what they are called with is what pruning will have to shorten. No code is written for one language
model, and one that does not fit is refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from vlmprune.adapters.family import Family
from vlmprune.errors import UsageError
from vlmprune.live.attention import CALL_ARGUMENT, route_attention
from vlmprune.live.kinds import Kind, Kinds, kinds_of
from vlmprune.live.parts import attention_name, check_config, check_own_forward, check_unpatched, only, part, uncompiled
from vlmprune.live.unhooked import Stop, Stopped, run_to_stop, unhooked

KNOWN = {"hidden_states", "attention_mask", "position_ids", "position_embeddings", "past_key_values", "use_cache"}
KNOWN |= {"cache_position", "per_layer_input", "shared_kv_states", CALL_ARGUMENT}
"""Arguments of a decoder layer that pruning can shorten, or may leave as they are."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""


@dataclass(frozen=True, eq=False)
class Attention:
    """What an attention module gives transformers' attention function.

    Attributes:
        query, key, value: `[batch, head, token, dim]`, after norms and rotary embedding; fewer heads in `key` and `value` for
            grouped attention.
        mask: the attention mask.
        scaling: factor on the scores.
        kwargs: all other arguments.
        reached: whether a keyword argument of the layer arrives there: "by the layer" itself, "by a hook" (`carry`), or "not".
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float
    kwargs: dict[str, Any]
    reached: Literal["by the layer", "by a hook", "not"]


@dataclass(frozen=True, eq=False)
class Decoder:
    """A language model that was inspected.

    Attributes:
        family: the description of its family, with the names of this model's modules.
        base, language_model, layers: the base model, its language model and the decoder layers.
        kinds: what each layer sees and keeps.
        scaled: the first layer is not given the embeddings, but a multiple of them (Gemma, Granite).
        calls: by layer, the arguments with which it was called for one token.
        seen: what each kind of layer gives its attention function, filled by `look_at_attention`.
    """

    family: Family
    base: Any
    language_model: Any
    layers: Any
    kinds: Kinds
    scaled: bool
    calls: Sequence[Arguments]
    seen: dict[tuple[type, type, Kind], Attention] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The class of the language model."""
        return type(self.language_model).__name__

    def gives_mask(self, index: int, mask: Any) -> bool:
        """Whether a mask of an attention function is the one that layer `index` was called with."""
        given = self.calls[index][1]["attention_mask"]
        if not isinstance(mask, Tensor) or not isinstance(given, Tensor):
            return mask is given
        return mask is given or (mask.shape == given.shape and (mask.is_meta or torch.equal(mask, given)))

    def turns_by_position(self) -> bool:
        """Whether rotary embeddings follow from hidden states and positions alone."""
        try:
            signature(self.language_model.get_submodule(self.family.rotary).forward).bind(None, None)
        except TypeError:
            return False
        return True

    def look_at_attention(self, index: int) -> Attention:
        """What layer `index` gives its attention function, for one token.

        Raises:
            UsageError: it does not use transformers' attention functions, or cannot be run by itself.
        """
        layer = self.layers[index]
        kinds = type(layer), type(layer.get_submodule(self.family.attention)), self.kinds.of[index]
        if kinds not in self.seen:
            args, kwargs = self.calls[index]
            fresh = {**kwargs, "past_key_values": None, "use_cache": False}
            try:
                seen = attention_of(layer, self.family.attention, *args, **fresh)
                if seen.reached == "not" and _would_take(layer, self.family.attention, args, fresh):
                    seen = replace(seen, reached="by a hook")
                self.seen[kinds] = seen
            except UsageError:
                raise
            except Exception as error:  # the layer is not ours and may raise anything: the reason is passed on
                raise UsageError(
                    f"layer {index} of {self.name} cannot be run by itself to inspect its attention "
                    f"({type(error).__name__}: {one_line(error)}): choose a method that does not look at attention."
                ) from error
        return self.seen[kinds]


def attention_of(layer: Any, attention: str, *args: Any, **kwargs: Any) -> Attention:
    """Run a decoder layer's own code up to its attention function, without hooks, so that its own norms, projections and rotary
    embedding are used.

    Args:
        layer: the decoder layer.
        attention: name of its attention module.
        args, kwargs: arguments of its forward method.

    Raises:
        UsageError: the layer does not use transformers' attention functions.
    """
    copied = unhooked(layer)
    return _run_to_attention(copied, copied.get_submodule(attention), args, kwargs)


def _run_to_attention(copied: Any, attention: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Attention:
    """`attention_of` a private copy. `attention` is a part of `copied`, or all of it."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stopped(args, kwargs)

    route_attention(attention, [stop])  # of the copy: nothing to undo
    reached = run_to_stop(copied, args, kwargs)
    if reached is None:
        raise UsageError(
            f"{type(copied).__name__} computes its attention without transformers' attention functions, through which methods "
            "read it: choose a method that does not look at attention; see the column 'scored by' of `vlmprune methods`."
        )
    (query, key, value, mask), rest = reached
    scaling = rest.pop("scaling", None)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return Attention(query, key, value, mask, scaling, rest, "by the layer" if CALL_ARGUMENT in rest else "not")


# -- layers that do not pass their keyword arguments on ----------------------------------------------------------------------


CARRIER = "position_embeddings"
"""The argument that every layer passes on to its attention."""


class _WithCall(tuple[Tensor, Tensor]):
    """Cosines and sines, with the call they belong to."""

    call: Any


def carried(decoder: Decoder, indices: Iterable[int]) -> frozenset[int]:
    """The layers among `indices` that do not pass their keyword arguments on (StableLM). There the call travels with the rotary
    embeddings, from the layer (`carry`) to its attention module (`take`). Nothing is stored between the two, so that each
    thread, and each recomputation in the backward pass, gets its own call."""
    return frozenset(index for index in indices if decoder.look_at_attention(index).reached == "by a hook")


def carry(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a layer, with its call put into the rotary embeddings."""
    carrier = _WithCall(kwargs[CARRIER])
    carrier.call = kwargs[CALL_ARGUMENT]
    return {**kwargs, CARRIER: carrier}


def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A hook of an attention module that takes out the call which `carry` put in."""
    carrier = kwargs.get(CARRIER)
    return (args, {**kwargs, CALL_ARGUMENT: carrier.call}) if isinstance(carrier, _WithCall) else None


def _would_take(layer: Any, attention: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call reaches the attention function with the help of `carry`."""
    if hasattr(layer, "_hf_hook"):  # accelerate makes plain tuples of what it moves
        return False
    own = layer.get_submodule(attention)
    given = run_to_stop(unhooked(layer, {own: Stop()}), args, kwargs)
    if given is None or not isinstance(given[1].get(CARRIER), tuple):
        return False
    alone = unhooked(own)
    return CALL_ARGUMENT in _run_to_attention(alone, alone, given[0], {**given[1], CALL_ARGUMENT: None}).kwargs


def look_at(model: Any, family: Family) -> Decoder:
    """Inspect a model: find its parts, and how its language model calls its layers.

    Args:
        model: a model of the family, with or without its head.
        family: the description of the family, with the usual names.

    Raises:
        UsageError: a part is missing, or something is built in an unknown way; the sentence names it.
    """
    base = getattr(model, "base_model", model)
    language_model = part(base, family.language_model, f"its language model ({family.language_model})")
    layers = part(language_model, family.layers, f"a list of decoder layers ({family.layers})", type(language_model).__name__)
    check_config(language_model)
    check_unpatched(base, language_model, layers)
    check_own_forward(model, (language_model, *layers))
    kinds = kinds_of(language_model, layers)
    family = family.as_built(family, base)
    width = getattr(getattr(base.config, "vision_config", None), "hidden_size", 0)
    family = replace(
        family,
        facts=replace(family.facts, width=width),
        attention=attention_name(layers[(*kinds.with_attention, 0)[0]], family.attention),
        rotary=only(language_model, family.rotary, lambda child: hasattr(child, "inv_freq"), "rotary embedding"),
        final_norm=only(language_model, family.final_norm, lambda child: "norm" in type(child).__name__.lower(), "final norm"),
    )
    embeddings, calls = _layer_calls(language_model, family.layers)
    for index in {kind: index for index, kind in enumerate(kinds.of)}.values():
        _check_call(layers[index], type(language_model).__name__, calls[index])
    args, kwargs = calls[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    known_alike = hidden.is_meta or torch.equal(hidden, embeddings)
    return Decoder(family, base, language_model, layers, kinds, not known_alike, calls)


# -- how layers are called -------------------------------------------------------------------------------------------------


def _layer_calls(language_model: Any, path: str) -> tuple[Tensor, Sequence[Arguments]]:
    """The embedding of one token `[1, 1, dim]`, and the arguments with which the language model calls its layers, which hand
    the token on as it is.

    Args:
        path: name of the list of layers.
    """
    copied = unhooked(language_model)
    calls: list[Arguments] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if len(calls) == len(layers):
            raise Stopped(args, kwargs)
        return args[0] if args else kwargs["hidden_states"]

    layers = copied.get_submodule(path)
    for layer in layers:
        layer.__dict__["forward"] = note
    words = language_model.get_input_embeddings()
    # Offloaded weights are on no device; the hook that fetches them also moves their inputs.
    device = getattr(getattr(words, "_hf_hook", None), "execution_device", None)
    one = torch.ones(
        1,
        1,
        language_model.config.hidden_size,
        dtype=language_model.dtype,
        device=words.weight.device if device is None else device,
    )
    kwargs = {
        "inputs_embeds": one,
        "past_key_values": DynamicCache(config=language_model.config),
        "use_cache": True,
        CALL_ARGUMENT: None,
    }
    if "per_layer_inputs" in signature(copied.forward).parameters:  # else it looks for a token with this embedding
        kwargs["per_layer_inputs"] = one.new_zeros(1, 1, len(layers), 1)
    try:
        run_to_stop(copied, (), kwargs)
    except Exception as error:  # the model is not ours and may raise anything: the reason is passed on
        raise UsageError(
            f"{type(language_model).__name__} is not built as expected: running one token through its layers failed "
            f"({type(error).__name__}: {one_line(error)}); such text models are not supported."
        ) from error
    if len(calls) < len(layers):
        raise UsageError(
            f"{type(language_model).__name__} does not call its decoder layers; such text models are not supported."
        )
    return one, calls


def _check_call(layer: Any, name: str, call: Arguments) -> None:
    """Refuse arguments of a decoder layer that pruning cannot shorten.

    Args:
        layer: it.
        name: the class of the language model.
        call: positional and keyword arguments.

    Raises:
        UsageError: an argument is missing, of another shape, or unknown.
    """
    args, kwargs = call
    hidden = args[0] if args else kwargs.get("hidden_states")
    rotary = kwargs.get("position_embeddings")
    missing = [wanted for wanted in ("attention_mask", "past_key_values", CALL_ARGUMENT) if wanted not in kwargs]
    turns = isinstance(rotary, tuple) and len(rotary) == 2 and all(isinstance(x, Tensor) and x.ndim == 3 for x in rotary)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        problem = "hidden states [batch, token, dim] as the first argument"
    elif missing:
        problem = f"{'its keyword arguments' if missing == [CALL_ARGUMENT] else missing[0]} by name"
    elif not turns:
        problem = "position_embeddings, cosines and sines [batch, token, dim]"
    else:
        problem = ""
    if problem:
        raise UsageError(
            f"{name} does not call its decoder layers in a way that pruning can follow: looked for {problem}, found "
            f"{', '.join(sorted(set(kwargs) - {CALL_ARGUMENT})) or 'none'}; such text models are not supported."
        )
    names = [*signature(uncompiled(layer).forward).parameters]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    more = [other for other, x in given.items() if other not in KNOWN and x is not None and not isinstance(x, int | str)]
    if more:
        raise UsageError(
            f"{name} gives its decoder layers {', '.join(more)}, which pruning cannot shorten; such text models are not "
            "supported."
        )


def one_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [""])[0][:200]
