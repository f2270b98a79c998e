"""LLaVA-1.5 (`model_type: llava`): one CLIP view per picture, an MLP projector, a Llama-like decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.family import Family, Tower
from vlmprune.view import Facts


def _grid(pixel_values: Any, config: Any) -> tuple[int, int]:
    patch = config.vision_config.patch_size
    return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if (pixels := call.get("pixel_values")) is None:
        return None
    rows, columns = _grid(pixels, config)
    strategy = call.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    return [rows * columns + (strategy == "full")] * pixels.shape[0]


def _image_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    pixels = inputs["pixel_values"]
    return [_grid(pixels, config)] * pixels.shape[0]


def _views(inputs: Mapping[str, Any], config: Any) -> list[list[list[Tensor]]]:
    first = int(config.vision_feature_select_strategy == "full")  # token 0 is then the CLS token
    return [[[first + torch.arange(rows * columns).view(rows, columns)]] for rows, columns in _image_grid(inputs, config)]


def _feature_block(config: Any) -> int:
    # hidden_states[0] is the embedding, so hidden_states[i] is the output of block i − 1; −2 skips the last block.
    layer, blocks = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return (layer if layer >= 0 else blocks + 1 + layer) - 1


def _refusal(base: nn.Module) -> str | None:
    config: Any = base.config
    if not hasattr(getattr(base.vision_tower, "embeddings", None), "class_embedding"):
        return f"its vision tower ({config.vision_config.model_type}) has no CLS token"
    if config.vision_feature_select_strategy != "default":
        return f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; 'default' is supported"
    if not isinstance(config.vision_feature_layer, int):
        return f"its features come from several tower layers ({config.vision_feature_layer})"
    if _feature_block(config) < 0:
        return "its features are the tower's embeddings, before any attention"
    return None


CLIP = Tower(
    blocks="vision_tower.encoder.layers",
    attention="self_attn",
    projector="multi_modal_projector",
    feature_block=_feature_block,
    whole=lambda config: range(config.vision_config.num_hidden_layers),
    refusal=_refusal,
)

LLAVA = Family(
    name="llava",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
    views=_views,
    facts=Facts(cls=True),
    tower=CLIP,
)
