"""The family of a model: by its type, by a name that the user forces upon it, or found in the model itself (`family="auto"`).

What is found is enough for methods that look at nothing but features, and only where nothing is on the list of dangers: things
in a model that would make a shortened sequence silently wrong. An unknown model that passes is not proven right;
`vlmprune.check` compares it with the un-pruned model on the user's own prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import getsource, signature
from typing import Any

from torch import nn

from vlmprune.adapters.family import Family, has_mrope
from vlmprune.adapters.refused import REFUSED
from vlmprune.adapters.registry import FAMILIES, family_of
from vlmprune.device import on_host
from vlmprune.errors import UsageError, shown, unknown
from vlmprune.live.kinds import kinds_of
from vlmprune.live.parts import check_unpatched

AUTO = "auto"
READS = frozenset({"identity", "features", "text_features", "text_valid"})
"""Probes that mean the same in every model: nothing, or features."""
TO_BOTH = {"attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position"}
TO_TEXT_MODEL = {*TO_BOTH, "input_ids", "inputs_embeds"}
TO_LAYER = {*TO_BOTH, "hidden_states", "position_embeddings"}
FLAGS = {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict"}
"""Arguments that say nothing about tokens."""


@dataclass(frozen=True)
class Found:
    """What was found in a model of an unknown family. `print` shows it, and what cannot be known.

    Attributes:
        model_type: of the config.
        text_model: class and path of the text model.
        layers: how many decoder layers it has, by kind.
        image_token: id of the placeholder.
        mrope: rotary positions are cells of the picture.
        family: the same as data.
    """

    model_type: str
    text_model: str
    layers: dict[str, int]
    image_token: int
    mrope: bool
    family: Family

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} × {kind.replace('_', ' ')}" for kind, count in self.layers.items())
        return "\n".join(
            (
                f"found in a model of the type {self.model_type!r}:",
                f"  text model       {self.text_model}; {kinds}",
                f"  placeholder      token {self.image_token}",
                f"  positions        {'cells of the picture (M-RoPE)' if self.mrope else 'a count of tokens'}",
                "  dangers          none of the list",
                "not known:",
                "  where a picture ends: a budget is of all visual tokens of a sample together",
                "  which placeholders are row separators: they count as visual tokens, and may be dropped",
                "  how the vision tower works: methods that look into it, or at attention, are refused",
                "vlmprune.check(model, inputs, recipe, family='auto') compares it with the un-pruned model on your prompt.",
            )
        )


def choose_family(model: Any, name: str | None) -> tuple[Family, Found | None]:
    """The description by which a model is wrapped.

    Args:
        model: the model itself, without shells.
        name: None for the model's own type, "auto" to look at the model, or the name of a family to treat it as.

    Returns:
        It, and what was found in the model if that was asked for.

    Raises:
        UsageError: there is none, or the one that was named does not fit.
    """
    if name is None:
        return family_of(model.config), None
    if name == AUTO:
        found = find(model)
        return found.family, found
    if not isinstance(name, str) or name not in FAMILIES:
        raise unknown("family", name, [AUTO, *FAMILIES])
    _check_forced(model, FAMILIES[name])
    return FAMILIES[name], None


# -- looking at a model ------------------------------------------------------------------------------------------------------


def find(model: Any) -> Found:
    """Look for the parts of a model of an unknown family.

    Raises:
        UsageError: a part is missing, or something is on the list of dangers; the sentence names all of them.
    """
    config, base = model.config, getattr(model, "base_model", model)
    if (kind := getattr(config, "model_type", None)) in REFUSED:
        family_of(config)  # says why
    text_models = {name: child for name, child in base.named_children() if _is_text_model(child)}
    if len(text_models) != 1:
        raise UsageError(
            f"family='auto' looked for one text model with embeddings and decoder layers in {type(base).__name__}, found "
            f"{', '.join(text_models) or 'none'} among {', '.join(child for child, _ in base.named_children())}; such models "
            "are not supported."
        )
    ((path, text_model),) = text_models.items()
    token = getattr(config, "image_token_id", None)
    if not isinstance(token, int):
        raise UsageError(
            f"family='auto' looked for the id of the image placeholder, config.image_token_id, found {shown(token)}; such "
            "models are not supported."
        )
    check_unpatched(base, text_model, text_model.layers)
    if dangers := list(dangers_of(base, text_model)):
        raise UsageError(
            f"family='auto' does not prune this model ({type(model).__name__}), because it might be silently wrong: "
            f"{'; '.join(dangers)}; run it un-wrapped, or add its family as a file in adapters/ (CONTRIBUTING.md says how)."
        )
    kinds = [layer.name for layer in kinds_of(text_model, text_model.layers).of]
    family = Family(
        name=str(kind),
        image_token=lambda config: config.image_token_id,
        tokens_per_image=_placeholders,
        joins=lambda between: True,
        language_model=path,
        reads=READS,
    )
    counted = {each: kinds.count(each) for each in dict.fromkeys(kinds)}
    where = f"{type(text_model).__name__} at {path}"
    return Found(str(kind), where, counted, token, has_mrope(text_model.config), family)


def dangers_of(base: Any, text_model: Any, known: frozenset[str] = frozenset()) -> Iterator[str]:
    """What in a model may make a shortened sequence silently wrong.

    Args:
        base: the base model.
        text_model: its text model.
        known: arguments of the text model that its family describes.
    """
    given = _arguments(base)
    if "pixel_values" not in given:
        yield f"{type(base).__name__} is not given pixel_values, so that it is unknown which calls have pictures"
    text_config = text_model.config
    if "token_type_ids" in given or ("mm_token_type_ids" in given and not has_mrope(text_config)):
        names = " and ".join(name for name in ("token_type_ids", "mm_token_type_ids") if name in given)
        yield f"{type(base).__name__} is given {names}, by which its masks may not be causal"
    if strange := _arguments(text_model) - TO_TEXT_MODEL - FLAGS - known:
        yield f"{type(text_model).__name__} is given {', '.join(sorted(strange))}, which may belong to tokens"
    layers = {type(layer): layer for layer in text_model.layers}.values()
    for layer in layers:
        if strange := _arguments(layer) - TO_LAYER - FLAGS:
            yield f"{type(layer).__name__} is given {', '.join(sorted(strange))}, which may belong to tokens"
    for module in {
        type(part): part for part in text_model.layers.modules() if getattr(part, "is_causal", True) is False
    }.values():
        yield f"{type(module).__name__} is not causal"
    for module in (base, text_model):
        if "block_sequence_ids" in _source(module):
            yield f"{type(module).__name__} makes blocks of tokens that see each other in both directions"
    if getattr(text_config, "use_bidirectional_attention", None):
        name = type(text_model).__name__
        yield f"the config of {name} says use_bidirectional_attention, by which tokens see those after them"
    if getattr(text_config, "num_kv_shared_layers", 0):
        yield "some of its layers have no keys of their own, and use those of other layers"


def _is_text_model(module: nn.Module) -> bool:
    layers, config = getattr(module, "layers", None), getattr(module, "config", None)
    if not isinstance(layers, nn.ModuleList) or getattr(config, "num_hidden_layers", None) != len(layers):
        return False
    try:
        return isinstance(module.get_input_embeddings(), nn.Embedding)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # a vision tower has none
        return False


def _arguments(module: Any) -> set[str]:
    forward: Callable[..., Any] = type(module).forward
    return set(signature(forward).parameters) - {"self", "args", "kwargs"}


def _source(module: Any) -> str:
    try:
        return getsource(type(module))
    except OSError:  # of a class that was made while running
        return ""


def _placeholders(call: Mapping[str, Any], config: Any) -> list[int] | None:
    """The placeholders of each sample that has any: where one picture ends and the next begins is unknown."""
    if call.get("pixel_values") is None:
        return None
    if (ids := call.get("input_ids")) is None:
        raise UsageError(
            "family='auto' counts placeholders in input_ids, and this call has inputs_embeds only: pass input_ids, or what "
            "get_image_features returned as mm_encoder_outputs."
        )
    return [count for count in on_host((ids == config.image_token_id).sum(dim=1)).tolist() if count]


# -- a family that was named -------------------------------------------------------------------------------------------------


def _check_forced(model: Any, family: Family) -> None:
    """Refuse a family that a user named, where it does not fit.

    Raises:
        UsageError: the model's own family is known, a part is missing, or there is something that the family does not describe.
    """
    kind, base = getattr(model.config, "model_type", None), getattr(model, "base_model", model)
    if kind == family.name:
        return
    if kind in FAMILIES or kind in REFUSED:
        own = family_of(model.config)  # says why, if it is refused
        raise UsageError(
            f"family={family.name!r} was given for a model of the family {own.name}, which is known and built differently: "
            "leave family out."
        )
    tower = family.tower
    paths = [family.language_model, f"{family.language_model}.{family.layers}"]
    paths += [tower.blocks, tower.projector] if tower is not None else []
    missing = [path for path in paths if not _has(base, path)]
    missing += [] if family.newline is None or hasattr(base, family.newline) else [family.newline]
    try:
        family.image_token(model.config)
    except AttributeError:
        missing.append("config.image_token_id")
    problem = (
        f"looked for {', '.join(missing)}, found {', '.join(name for name, _ in base.named_children())}" if missing else ""
    )
    if not problem:
        text_model = base.get_submodule(family.language_model)
        injected = family.injected
        known = frozenset() if injected is None else frozenset((injected.places, injected.features))
        problem = "; ".join(dangers_of(base, text_model, known))
        if lacks := known - _arguments(text_model):
            problem = f"{type(text_model).__name__} is not given {', '.join(sorted(lacks))}"
    if problem:
        raise UsageError(
            f"family={family.name!r} does not fit {type(model).__name__} (model_type {kind!r}): {problem}; leave family out, "
            "or try family='auto'."
        )


def _has(module: Any, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
