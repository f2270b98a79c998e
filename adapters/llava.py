"""LLaVA-1.5 (`model_type: llava`): one raster per picture, usually from CLIP, an MLP projector, any decoder. Checkpoints with
SigLIP (no CLS token) and Pixtral (no CLS token, pictures of any size one after the other) have the same model type; the tower's
own modules and config tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmprune.adapters.family import Family
from vlmprune.adapters.vision_tower import Patches, Tower
from vlmprune.view import TowerFacts


def _grid(pixel_values: Any, config: Any) -> tuple[int, int]:
    return _patches(pixel_values.shape[-2], pixel_values.shape[-1], config)


def _patches(height: int, width: int, config: Any) -> tuple[int, int]:
    """Rows and columns of patches of a picture. Towers give the size of a patch as one number, or as height and width."""
    size = config.vision_config.patch_size
    rows, columns = size if isinstance(size, list | tuple) else (size, size)
    return height // rows, width // columns


def _before_patches(tower: nn.Module) -> int:
    """How many tokens a tower puts before its patches: CLS and registers, which are parameters of its embeddings."""
    parameters = dict(getattr(tower, "embeddings", nn.Module()).named_parameters(recurse=False))
    count = sum(name in ("class_embedding", "cls_token") for name in parameters)
    return count + (parameters["register_tokens"].shape[-2] if "register_tokens" in parameters else 0)


def _tokens_per_image(before: int, call: Mapping[str, Any], config: Any) -> list[int] | None:
    """Features of each picture, as `get_image_features` returns them: strategy 'default' drops the first token, whatever it is.
    `before` is the number of tokens before the patches."""
    if (pixels := call.get("pixel_values")) is None:
        return None
    if (sizes := call.get("image_sizes")) is not None:  # split by the pictures' own sizes
        return [prod(_patches(height, width, config)) for height, width in _as_lists(sizes)]
    rows, columns = _grid(pixels, config)
    strategy = call.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    first = strategy == "default"
    if config.vision_config.model_type == "pixtral":  # one sequence, which nothing splits
        return [pixels.shape[0] * rows * columns - first]
    return [rows * columns + before - first] * pixels.shape[0]


def _as_lists(sizes: Any) -> Any:
    return sizes.tolist() if hasattr(sizes, "tolist") else sizes


def _image_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    pixels = inputs["pixel_values"]
    if (sizes := inputs.get("image_sizes")) is not None:
        return [_patches(height, width, config) for height, width in _as_lists(sizes)]
    return [_grid(pixels, config)] * pixels.shape[0]


def _crops(inputs: Mapping[str, Any], config: Any) -> list[list[list[Tensor]]]:
    first = int(config.vision_feature_select_strategy == "full")  # token 0 is then the CLS token
    return [[[first + torch.arange(rows * columns).view(rows, columns)]] for rows, columns in _image_grid(inputs, config)]


def feature_block(config: Any) -> int:
    """Number of the block whose output becomes visual tokens."""
    # hidden_states[0] is the embedding, so hidden_states[i] is the output of block i − 1; −2 skips the last block.
    layer, blocks = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return (layer if layer >= 0 else blocks + 1 + layer) - 1


def _refusal(base: nn.Module) -> str | None:
    config: Any = base.config
    embeddings = getattr(base.vision_tower, "embeddings", None)
    if not hasattr(embeddings, "class_embedding"):
        lacks = "is not built like CLIP's" if hasattr(embeddings, "cls_token") else "has no CLS token"
        return f"its vision tower ({config.vision_config.model_type}) {lacks}"
    return features_refused(config)


def features_refused(config: Any) -> str | None:
    """Why the features of a tower cannot be traced back to the patches of one block, or None."""
    if config.vision_feature_select_strategy != "default":
        return f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; 'default' is supported"
    if not isinstance(config.vision_feature_layer, int):
        return f"its features come from several tower layers ({config.vision_feature_layer})"
    if feature_block(config) < 0:
        return "its features are the tower's embeddings, before any attention"
    return None


def _patches_refused(base: nn.Module) -> str | None:
    """Why the visual tokens are not one for each patch of CLIP's or SigLIP's tower, or None."""
    config: Any = base.config
    if not hasattr(getattr(base.vision_tower, "embeddings", None), "patch_embedding"):
        return f"its vision tower ({config.vision_config.model_type}) is not built like CLIP's or SigLIP's"
    first = config.vision_feature_select_strategy == "default"
    if _before_patches(cast(nn.Module, base.vision_tower)) != first:
        what = "keeps a token that is no patch" if not first else "leaves out the first patch"
        return f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} {what}"
    if not isinstance(config.vision_feature_layer, int):
        return f"its features come from several tower layers ({config.vision_feature_layer})"
    return None if feature_block(config) >= 0 else "its features are the tower's embeddings, before any block"


CLIP = Tower(
    blocks="vision_tower.encoder.layers",
    attention="self_attn",
    projector="multi_modal_projector",
    feature_block=feature_block,
    full_attention_blocks=lambda config: range(config.vision_config.num_hidden_layers),
    refusal=_refusal,
    patches=Patches(
        embedding="vision_tower.embeddings.patch_embedding",
        before=lambda base: _before_patches(cast(nn.Module, base.vision_tower)),
        refusal=_patches_refused,
    ),
)


def _as_built(family: Family, base: nn.Module) -> Family:
    tower: Any = base.vision_tower
    return replace(family, tokens_per_image=partial(_tokens_per_image, _before_patches(tower)))


LLAVA = Family(
    name="llava",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=partial(_tokens_per_image, 1),
    image_grid=_image_grid,
    crops=_crops,
    facts=TowerFacts(cls=True),
    tower=CLIP,
    as_built=_as_built,
)
