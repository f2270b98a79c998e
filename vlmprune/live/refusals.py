"""Refuses what cannot work, before the model is touched: a recipe is checked against the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from vlmprune.adapters.family import Family, has_mrope
from vlmprune.errors import UsageError
from vlmprune.live.choosing import BoundStage
from vlmprune.live.decoder import KNOWN, Decoder
from vlmprune.live.redistribution import Redistribution
from vlmprune.methods import Pruner
from vlmprune.methods.checks import check_needs
from vlmprune.methods.redistributing import HeadScaler
from vlmprune.recipe import Recipe
from vlmprune.schedule import Schedule, scaled_layer
from vlmprune.view import AHEAD, BEFORE_THE_STAGE, TowerFacts, known_probes


def check_stages(recipe: Recipe, decoder: Decoder, stages: Sequence[BoundStage]) -> None:
    """The stages of a recipe, in the language model.

    Raises:
        UsageError: a layer the model lacks, positions that have no meaning, or attention that cannot be looked at.
    """
    text_config, layers = decoder.language_model.config, len(decoder.layers)
    for bound in stages:
        check_needs(bound.method.name, bound.needs, known_probes())
        _check_reads(decoder.family, bound.method.name, bound.needs)
        if bound.stage.layer >= layers:
            raise UsageError(
                f"{bound.method.name} prunes at layer {bound.stage.layer}, but the model has layers 0 to {layers - 1}: "
                + _fitting(recipe, bound, layers)
            )
        if bound.method.positions == "compact" and has_mrope(text_config):
            raise UsageError(
                f'{bound.method.name}: positions="compact" has no meaning for the M-RoPE of {decoder.family.name}, whose '
                'positions are places in the picture: use positions="original".'
            )
        if bound.method.positions == "compact" and not decoder.turns_by_position():
            raise UsageError(
                f'{bound.method.name}: positions="compact" needs rotary embeddings that follow from positions, but those of '
                f'{decoder.name} depend on the layer: use positions="original".'
            )
    check_kinds(recipe, decoder, stages)
    for bound in stages:
        ahead = bool(bound.needs & AHEAD)
        if not (bound.needs & BEFORE_THE_STAGE or ahead):
            continue
        if "flash" in text_config._attn_implementation:
            raise UsageError(
                f"{bound.method.name} looks at attention in the language model, which {text_config._attn_implementation!r} "
                'does not offer yet: call model.set_attn_implementation("sdpa").'
            )
        if bound.needs & BEFORE_THE_STAGE:
            _check_attention(decoder, bound.stage.layer - 1, bound.method.name, needs_call=True)
        if ahead:
            _check_attention(decoder, bound.stage.layer, bound.method.name, needs_call=False)


def check_kinds(recipe: Recipe, decoder: Decoder, stages: Sequence[BoundStage]) -> None:
    """Whether the layers at which a recipe prunes are of kinds that allow it.

    Raises:
        UsageError: a method looks at the attention of a layer that has none; or layers behind a stage see keys that an earlier
            layer stored before tokens were dropped.
    """
    kinds = decoder.kinds
    last = kinds.lenders[0] if kinds.lenders else len(kinds.of)
    for bound in stages:
        name, layer = bound.method.name, bound.stage.layer
        if layer > last:
            raise UsageError(
                f"{name} prunes at layer {layer}, but later layers see the keys that layer {last} stores, before tokens are "
                f"dropped: choose a layer up to {last}."
            )
        wanted = [layer - 1] * bool(bound.needs & BEFORE_THE_STAGE) + [layer] * bool(bound.needs & AHEAD)
        for index in wanted:
            if kinds.of[index].recurrent:
                shift = 1 if index < layer else 0
                usable = [str(other + shift) for other in kinds.with_attention if other + shift < len(kinds.of)]
                raise UsageError(
                    f"{name} prunes at layer {layer} by the attention of layer {index}, but {kinds.in_words(index)}: prune at "
                    f"one of the layers {', '.join(usable)}."
                )


def check_edits(decoder: Decoder, redistribution: Redistribution) -> None:
    """The layers whose attention a recipe edits.

    Raises:
        UsageError: attention that is not what the edit takes it for.
    """
    if redistribution.names and decoder.family.reads is not None:
        raise UsageError(
            f"{redistribution.names[0]} edits attention, of which nothing is known in a model that was found by family='auto': "
            "choose a method that looks at nothing but features; see the column 'scored by' of `vlmprune methods`."
        )
    names = {index: method.name for index, method in redistribution.by_layer.items()}
    scalers = [method.name for method in redistribution.by_layer.values() if isinstance(method, HeadScaler)]
    for index in redistribution.routed:
        name = names.get(index, scalers[0] if scalers else "")
        edits = index in redistribution.by_layer and not isinstance(redistribution.by_layer[index], HeadScaler)
        _check_attention(decoder, index, name, needs_call=True, weights=edits)
        seen = decoder.look_at_attention(index)
        if edits and seen.value.shape[-1] != seen.key.shape[-1]:
            raise UsageError(
                f"{name} edits attention whose values are as wide as its keys, but layer {index} of {decoder.name} has keys of "
                f"{seen.key.shape[-1]} numbers and values of {seen.value.shape[-1]}: choose a method that drops tokens."
            )
    if scalers and any(decoder.look_at_attention(index).reached != "by the layer" for index in redistribution.routed):
        raise UsageError(
            f"{scalers[0]} also runs the prompt without its picture, layer by layer, but "
            f"{type(decoder.layers[0]).__name__} does not hand its keyword arguments on to its attention: choose another "
            "method."
        )
    if scalers and not decoder.turns_by_position():
        raise UsageError(
            f"{scalers[0]} also runs the prompt without its picture, which needs rotary embeddings that follow from "
            f"positions, but those of {decoder.name} depend on the layer: choose another method."
        )
    if scalers and decoder.scaled:
        raise UsageError(
            f"{scalers[0]} also runs the prompt without its picture, from the embeddings on, but {decoder.name} changes "
            "them before its first layer: choose another method."
        )


def check_tower(
    recipe: Recipe, decoder: Decoder, facts: TowerFacts, inside: BoundStage | None, last_block: Callable[[], int]
) -> None:
    """What a recipe does in the vision tower, or looks at there.

    Args:
        inside: the stage inside the tower, or None.
        last_block: gives the block before which the sequence has its final length.

    Raises:
        UsageError: this tower cannot be looked at, or cannot be bound.
    """
    if decoder.family.facts.cls and not facts.cls:  # only towers of this family with CLS tokens are followed
        raise UsageError(
            f"{recipe} needs the patch and the crop of each token, but {facts.refusal}: choose a method that looks at the "
            "language model only."
        )
    if inside is not None and inside.stage.site == "vision" and facts.whole:
        raise UsageError(
            f"{inside.method.name} drops patches between blocks of the vision tower, but that of {decoder.family.name} needs "
            "all of them up to its end (it takes features from several blocks, or merges squares of patches): choose a method "
            "that prunes in the language model."
        )
    if inside is not None and inside.stage.site == "vision" and last_block() == 0:
        raise UsageError(
            f"{inside.method.name} drops patches between blocks of the vision tower, but this model takes its features from "
            "the first one: choose a method that prunes in the language model."
        )
    if "flash" in (found := str(decoder.base.config.vision_config._attn_implementation)):
        raise UsageError(
            f"{recipe} looks at attention in the vision tower, which {found!r} does not offer yet: call "
            'model.set_attn_implementation({"vision_config": "sdpa"}).'
        )


def _check_reads(family: Family, method: str, needs: frozenset[str]) -> None:
    """Refuse a method that looks at more than is known of a model."""
    if family.reads is not None and (more := sorted(needs - family.reads)):
        raise UsageError(
            f"{method} looks at {', '.join(more)}, of which nothing is known in a model that was found by family='auto': "
            "choose a method that looks at nothing but features; see the column 'scored by' of `vlmprune methods`."
        )


def _check_attention(decoder: Decoder, index: int, method: str, needs_call: bool, weights: bool = True) -> None:
    """Whether a method may look at, or edit, the attention of a layer.

    Args:
        needs_call: the call must reach it.
        weights: it computes attention weights itself.
    """
    seen = decoder.look_at_attention(index)
    layer = type(decoder.layers[index]).__name__
    if needs_call and seen.reached == "not":
        raise UsageError(
            f"{method} needs the attention of layer {index}, but {layer} does not hand its keyword arguments on to it: choose "
            "a method that does not look at attention; see the column 'scored by' of `vlmprune methods`."
        )
    strange = [name for name, x in seen.kwargs.items() if name not in KNOWN and isinstance(x, Tensor)]
    strange += [name for name in ("softcap",) if seen.kwargs.get(name) is not None]
    strange += [] if decoder.gives_mask(index, seen.mask) else ["a mask of its own"]
    if weights and strange:
        raise UsageError(
            f"{method} computes attention as softmax of scaled products, but {layer} adds {', '.join(strange)}: choose a "
            "method that does not look at attention; see the column 'scored by' of `vlmprune methods`."
        )


def _fitting(recipe: Recipe, bound: BoundStage, depth: int) -> str:
    """What to do about a stage after the last layer: the same method with its layers scaled to the model's depth."""
    method = bound.method
    stages = [stage for stage in method.stages if stage.site == "llm"]
    room = range(method.first_layer, depth)
    if len(stages) > max(len(room), 1):
        fewer = [replace(stage, layer=layer) for stage, layer in zip(stages, room, strict=False)]
        example = Recipe((replace(method, schedule=Schedule(tuple(fewer))),))
        return (
            f"{method.name} has {len(stages)} stages in the language model, and may prune at {len(room)} of its {depth} "
            f"layers, {room[0]} to {room[-1]}: give it fewer stages, for example {example}."
        )
    try:
        fitted = _scaled(method, bound, depth)
        methods = tuple(fitted if other is method else other for other in recipe.methods)
        fits = all(stage.layer < depth for stage, _ in Recipe(methods).stages())
        text = str(Recipe((fitted,)))
        Recipe((fitted,)).to_dict()  # refuses a method that no recipe string can name, such as those of the analyses
        readable = not isinstance(fitted, Pruner) or ",kept=" not in text
    except UsageError:
        fits = readable = False
    return f"choose among them, for example {text}." if fits and readable else "choose among them."


def _scaled(method: Pruner, bound: BoundStage, depth: int) -> Pruner:
    layers = [stage.layer for stage in method.stages]
    if bound.stage.layer not in layers or bound.stage.site == "cache":  # a stage that a parameter names
        names = [field.name for field in fields(method) if getattr(method, field.name) == bound.stage.layer]
        values: dict[str, Any] = {name: max(scaled_layer(bound.stage.layer, depth), 1) for name in names}
        return replace(method, **values)
    fitted: list[int] = []
    for stage in method.stages:
        first = 0 if stage.layer == 0 else max(method.first_layer, 1)
        fitted.append(max(scaled_layer(stage.layer, depth), first, *(fitted[-1:] and [fitted[-1] + (stage.site == "llm")])))
    stages = tuple(replace(stage, layer=layer) for stage, layer in zip(method.stages, fitted, strict=True))
    return replace(method, schedule=Schedule(stages))
