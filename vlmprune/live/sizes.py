"""The sizes of a language model, for counting FLOPs and bytes: from its config where all layers are alike, else from the
modules of each layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from vlmprune.adapters.vision_tower import Tower
from vlmprune.cost import DecoderShape, LayerShape, TowerShape
from vlmprune.live.decoder import Decoder

PER_TOKEN = ("num_experts_per_tok", "top_k_experts")
"""What configs call the number of experts that a token is sent to."""


def shape_of(decoder: Decoder) -> DecoderShape:
    """The sizes of an inspected language model."""
    config, layers = decoder.language_model.config, decoder.layers
    chosen = next((getattr(config, name) for name in PER_TOKEN if getattr(config, name, None)), None)
    made = tuple(_layer(decoder, index, chosen) for index in range(len(layers)))
    plain = len({(layer.query, layer.stored, layer.window) for layer in made}) == 1 and not any(map(_experts, layers))
    if plain and made[0].stored and made[0].window is None:
        return DecoderShape.of(config)
    return DecoderShape(layers=len(layers), dim=config.hidden_size, by_layer=made)


def shape_of_tower(base: nn.Module, tower: Tower, patches_per_token: int) -> TowerShape | None:
    """The sizes of a vision tower; None if it is not known how patches enter it."""
    patches = tower.patches
    if patches is None or patches.refusal(base) is not None:
        return None
    embedding: Any = base.get_submodule(patches.embedding)
    leaving = [tower.projector, *([] if patches.early is None else [patches.early])]
    blocks: Any = base.get_submodule(tower.blocks)
    merging = [child.weight.numel() for child in base.get_submodule(tower.root).children() if isinstance(child, nn.Conv2d)]
    return TowerShape(
        embedding=embedding.weight.numel(),
        blocks=tuple(LayerShape(sum(_weights(block, None)), embedding.out_channels) for block in blocks),
        projector=sum(merging) + sum(size for name in leaving for size in _weights(base.get_submodule(name), None)),
        before=patches.before(base),
        patches_per_token=patches_per_token,
    )


def _layer(decoder: Decoder, index: int, chosen: int | None) -> LayerShape:
    layer, kind, where = decoder.layers[index], decoder.kinds.of[index], decoder.kinds.stored_at[index]
    weights = sum(_weights(layer, chosen))
    if kind.recurrent:
        return LayerShape(weights)
    attention: Any = layer.get_submodule(decoder.family.attention)
    config = decoder.language_model.config
    heads = config.num_attention_heads
    width = getattr(attention, "head_dim", None) or config.hidden_size // heads
    stored = 2 * heads // getattr(attention, "num_key_value_groups", 1) * width
    return LayerShape(weights, heads * width, stored if where == index else 0, kind.window)


def _experts(layer: nn.Module) -> list[nn.Parameter]:
    """`[expert, out, in]` matrices of which a token is multiplied by some."""
    modules = [module for module in layer.modules() if not isinstance(module, nn.Conv1d)]
    return [weight for module in modules for weight in module.parameters(recurse=False) if weight.ndim == 3]


def _weights(layer: nn.Module, chosen: int | None) -> Iterator[int]:
    """Sizes of what every token is multiplied by: matrices, short convolutions, and the experts that it is sent to."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):  # its weight may be packed
            yield module.in_features * module.out_features
        else:
            yield from (weight.numel() for weight in module.parameters(recurse=False) if weight.ndim == 2)
        if isinstance(module, nn.Conv1d):
            yield module.weight.numel()
    for weight in _experts(layer):
        yield weight.numel() // weight.shape[0] * min(chosen or weight.shape[0], weight.shape[0])
