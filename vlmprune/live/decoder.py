"""A language model as it is built: what its parts are called, how it calls its layers, and what a layer's attention is given.

`config.model_type` says which class a checkpoint names, not how its text model works: LLaVA stands on Llama, Mistral, Qwen, Phi
and others. So the model is looked at when it is wrapped: one token runs up to the first layer, in a private copy (`unhooked`),
and what the language model hands to that layer is what pruning will have to shorten. Nothing is written for one text model, and
what does not fit is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from vlmprune.adapters.family import Family
from vlmprune.errors import UsageError
from vlmprune.live.attention import CALL_ARGUMENT, route_attention
from vlmprune.live.unhooked import unhooked

KNOWN = {"hidden_states", "attention_mask", "position_ids", "position_embeddings", "past_key_values", "use_cache"}
KNOWN |= {"cache_position", CALL_ARGUMENT}
"""Arguments of a decoder layer that pruning knows how to shorten, or may leave as they are."""


class _Reached(Exception):  # noqa: N818 (nothing went wrong)
    """The place was reached whose arguments were wanted; what lies behind it does not run."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


class _Stop(nn.Module):
    """Takes the place of a decoder layer, to see what it is called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(args, kwargs)


@dataclass(frozen=True, eq=False)
class Attention:
    """What one attention module hands to transformers' attention function.

    Attributes:
        query, key, value: `[batch, head, token, dim]`, after norms and rotary embedding; fewer heads in `key` and `value` for
            grouped attention.
        mask: the attention mask.
        scaling: factor on the scores.
        kwargs: everything else.
        told: whether a keyword argument of the layer arrives there: by itself, with the help of `carry`, or not at all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float
    kwargs: dict[str, Any]
    told: Literal["by the layer", "by a hook", "not"]


@dataclass(frozen=True, eq=False)
class Decoder:
    """A language model, looked at.

    Attributes:
        family: with the names of this model's modules.
        base, text, layers: the base model, its language model and the decoder layers.
        scaled: the first layer is not given the embeddings themselves, but a multiple of them (Gemma, Granite).
        call: arguments with which the first layer was called on one token.
        seen: what each kind of layer hands to its attention, filled by `look_at_attention`.
    """

    family: Family
    base: Any
    text: Any
    layers: Any
    scaled: bool
    call: tuple[tuple[Any, ...], dict[str, Any]]
    seen: dict[tuple[type, type], Attention] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return type(self.text).__name__

    def gives_mask(self, mask: Any) -> bool:
        """Whether an attention function was given the mask that the layer was given, rather than one of the layer's own."""
        given = self.call[1]["attention_mask"]
        if not isinstance(mask, Tensor) or not isinstance(given, Tensor):
            return mask is given
        return mask is given or (mask.shape == given.shape and (mask.is_meta or torch.equal(mask, given)))

    def turns_by_position(self) -> bool:
        """Whether rotary embeddings follow from hidden states and positions alone."""
        try:
            signature(self.text.get_submodule(self.family.rotary).forward).bind(None, None)
        except TypeError:
            return False
        return True

    def look_at_attention(self, index: int) -> Attention:
        """What layer `index` hands to its attention, on one token.

        Raises:
            UsageError: it does not use transformers' attention functions.
        """
        layer = self.layers[index]
        kinds = type(layer), type(layer.get_submodule(self.family.attention))
        if kinds not in self.seen:
            args, kwargs = self.call
            fresh = {**kwargs, "past_key_values": None, "use_cache": False}
            try:
                seen = attention_of(layer, self.family.attention, *args, **fresh)
                if seen.told == "not" and _would_take(layer, self.family.attention, args, fresh):
                    seen = replace(seen, told="by a hook")
                self.seen[kinds] = seen
            except UsageError:
                raise
            except Exception as error:  # whatever a foreign layer may raise: the reason is passed on
                raise UsageError(
                    f"layer {index} of {self.name} cannot be run on its own to look at its attention "
                    f"({type(error).__name__}: {one_line(error)}): choose a method that does not look at attention."
                ) from error
        return self.seen[kinds]


def attention_of(layer: Any, attention: str, *args: Any, **kwargs: Any) -> Attention:
    """Run a decoder layer's own code up to its attention, and no further, without any hook: its norms, projections and rotary
    embedding are used, whatever they are.

    Args:
        layer: the decoder layer.
        attention: name of its attention module.
        args, kwargs: of its forward method.

    Raises:
        UsageError: the layer's attention does not go through transformers' attention functions.
    """
    copied = unhooked(layer)
    return _run_to_attention(copied, copied.get_submodule(attention), args, kwargs)


def _run_to_attention(copied: Any, attention: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Attention:
    """The same of private copies: `attention` is a part of `copied`, or all of it."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _Reached(args, kwargs)

    route_attention(attention, [stop])  # of the copy: nothing to undo
    reached = _reached(copied, args, kwargs)
    if reached is None:
        raise UsageError(
            f"{type(copied).__name__} computes its attention without transformers' attention functions, where methods look at "
            "it: choose a method that does not look at attention; `vlmprune methods` says what each one looks at."
        )
    (query, key, value, mask), rest = reached
    scaling = rest.pop("scaling", None)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return Attention(query, key, value, mask, scaling, rest, "by the layer" if CALL_ARGUMENT in rest else "not")


def _reached(copied: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What the stopping place in a private copy was called with; None if it was not reached."""
    try:
        with torch.no_grad():
            copied.forward(*args, **kwargs)
    except _Reached as reached:
        return reached.args, dict(reached.kwargs)
    return None


# -- layers that keep their keyword arguments to themselves ----------------------------------------------------------------


CARRIER = "position_embeddings"
"""The argument that every layer does hand on to its attention."""


class _Told(tuple[Tensor, Tensor]):
    """Cosines and sines, and the call they belong to."""

    call: Any


def carried(decoder: Decoder, indices: Iterable[int]) -> frozenset[int]:
    """The layers among `indices` that keep their keyword arguments to themselves (StableLM). There, the call travels with the
    rotary embeddings, from the layer (`carry`) to its attention module (`take`). Nothing is kept between the two, so that
    threads and recomputation in backward find what belongs to them."""
    return frozenset(index for index in indices if decoder.look_at_attention(index).told == "by a hook")


def carry(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer, its call put with the rotary embeddings."""
    told = _Told(kwargs[CARRIER])
    told.call = kwargs[CALL_ARGUMENT]
    return {**kwargs, CARRIER: told}


def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A hook of an attention module that takes out what `carry` put in."""
    told = kwargs.get(CARRIER)
    return (args, {**kwargs, CALL_ARGUMENT: told.call}) if isinstance(told, _Told) else None


def _would_take(layer: Any, attention: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call would reach the attention function with the help of `carry`."""
    if hasattr(layer, "_hf_hook"):  # accelerate makes plain tuples of what it moves
        return False
    own = layer.get_submodule(attention)
    given = _reached(unhooked(layer, {own: _Stop()}), args, kwargs)
    if given is None or not isinstance(given[1].get(CARRIER), tuple):
        return False
    alone = unhooked(own)
    return CALL_ARGUMENT in _run_to_attention(alone, alone, given[0], {**given[1], CALL_ARGUMENT: None}).kwargs


def look_at(model: Any, family: Family) -> Decoder:
    """Look up a model's parts, and how its language model calls its layers.

    Args:
        model: a model of the family, with or without its head.
        family: what is usual there.

    Raises:
        UsageError: something is missing or unknown, and what.
    """
    base = getattr(model, "base_model", model)
    text = _part(base, family.language_model, f"its language model ({family.language_model})")
    layers = _part(text, family.layers, f"a list of decoder layers ({family.layers})", type(text).__name__)
    _check_config(text)
    family = family.as_built(family, base)
    width = getattr(base.config.vision_config, "hidden_size", 0)
    family = replace(
        family,
        facts=replace(family.facts, width=width),
        attention=_attention_name(layers[0], family.attention),
        rotary=_only(text, family.rotary, lambda child: hasattr(child, "inv_freq"), "rotary embedding"),
        final_norm=_only(text, family.final_norm, lambda child: "norm" in type(child).__name__.lower(), "final norm"),
    )
    embeddings, call = _first_layer_call(text, layers)
    _check_call(type(text).__name__, call)
    hidden = call[0][0] if call[0] else call[1]["hidden_states"]
    known_alike = hidden.is_meta or torch.equal(hidden, embeddings)
    return Decoder(family, base, text, layers, not known_alike, call)


# -- parts -----------------------------------------------------------------------------------------------------------------


def _inside(module: Any) -> Any:
    """A module, or what `torch.compile` made one of."""
    return getattr(module, "_orig_mod", module)


def _part(module: Any, path: str, what: str, name: str | None = None) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise UsageError(
            f"{name or type(module).__name__} is not built as expected: looked for {what}, found "
            f"{', '.join(child for child, _ in module.named_children()) or 'no modules'}; such models are not supported."
        ) from error


def _attention_name(layer: Any, usual: str) -> str:
    children = dict(_inside(layer).named_children())
    named = {name: child for name, child in children.items() if hasattr(child, "config") and hasattr(child, "layer_idx")}
    name = usual if usual in named else next(iter(named), "")
    if not named or (usual not in named and len(named) > 1):
        raise UsageError(
            f"{type(layer).__name__} is not built as expected: looked for one attention module with a config, found "
            f"{', '.join(named) or 'none'} among {', '.join(children)}; such text models are not supported."
        )
    if getattr(named[name], "is_causal", True) is False:
        raise UsageError(
            f"{type(named[name]).__name__} is not causal: tokens see what stands behind them, which pruning does not know how "
            "to keep; such text models are not supported."
        )
    return name


def _only(text: Any, usual: str, fits: Callable[[nn.Module], bool], what: str) -> str:
    children = dict(_inside(text).named_children())
    if usual in children:
        return usual
    names = [name for name, child in children.items() if fits(child)]
    last = [name for name in names if "final" in name] if len(names) > 1 else names
    if len(last) != 1:
        raise UsageError(
            f"{type(text).__name__} is not built as expected: looked for one {what}, found {', '.join(names) or 'none'} among "
            f"{', '.join(children)}; such text models are not supported."
        )
    return last[0]


def _check_config(text: Any) -> None:
    """What must be true of a language model's config, whatever the recipe."""
    config, name = text.config, type(text).__name__
    for needed in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if not isinstance(getattr(config, needed, None), int):
            raise UsageError(
                f"{name} is not built as expected: its config has no number {needed}; such text models are not supported."
            )
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
        kinds = sorted(set(getattr(config, "layer_types", None) or ["sliding_attention"]) - {"full_attention"})
        if kinds == ["sliding_attention"]:
            raise UsageError(
                "the language model has sliding-window layers, whose caches count tokens instead of knowing their places: "
                "pruning them is not supported; load the model with full attention."
            )
        raise UsageError(
            f"the language model has layers of other kinds than full attention ({', '.join(kinds)}), whose caches do not keep "
            "every token: pruning them is not supported."
        )
    implementation = config._attn_implementation
    supported = ["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
    supported += ["flex_attention"] if text._supports_flex_attn else []
    if implementation not in supported:
        raise UsageError(
            f"attention implementation {implementation!r} is not supported (supported: {', '.join(supported)}): call "
            'model.set_attn_implementation("sdpa").'
        )


# -- how layers are called -------------------------------------------------------------------------------------------------


def _first_layer_call(text: Any, layers: Any) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """One token `[1, 1, dim]`, and what the language model calls its first layer with for it."""
    copied = unhooked(text, {layers: nn.ModuleList([_Stop()] * len(layers))})
    words = text.get_input_embeddings()
    # Offloaded weights are nowhere; what runs them moves its inputs there.
    device = getattr(getattr(words, "_hf_hook", None), "execution_device", None)
    one = torch.ones(1, 1, text.config.hidden_size, dtype=text.dtype, device=words.weight.device if device is None else device)
    kwargs = {"inputs_embeds": one, "past_key_values": DynamicCache(config=text.config), "use_cache": True, CALL_ARGUMENT: None}
    try:
        call = _reached(copied, (), kwargs)
    except Exception as error:  # whatever a foreign model may raise: the reason is passed on
        raise UsageError(
            f"{type(text).__name__} is not built as expected: running one token up to its first layer failed "
            f"({type(error).__name__}: {one_line(error)}); such text models are not supported."
        ) from error
    if call is None:
        raise UsageError(f"{type(text).__name__} does not call its decoder layers; such text models are not supported.")
    return one, call


def _check_call(name: str, call: tuple[tuple[Any, ...], Mapping[str, Any]]) -> None:
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
            f"{name} does not call its decoder layers as pruning needs: looked for {problem}, found "
            f"{', '.join(sorted(set(kwargs) - {CALL_ARGUMENT})) or 'none'}; such text models are not supported."
        )
    more = [f"positional argument {number}" for number, x in enumerate(args) if number and isinstance(x, Tensor)]
    more += [other for other, x in kwargs.items() if other not in KNOWN and x is not None and not isinstance(x, int | str)]
    if more:
        raise UsageError(
            f"{name} gives its decoder layers {', '.join(more)}, which pruning does not know how to shorten; such text models "
            "are not supported."
        )


def one_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [""])[0][:200]
