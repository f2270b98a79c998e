"""Mistral 3 (`model_type: mistral3`): pictures of any size from Pixtral's tower, squares of 2 × 2 patches merged into one
token. `[IMG_BREAK]` after each row and `[IMG_END]` are text. No CLS token."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor

from vlmprune.adapters.family import Family
from vlmprune.device import on_host


def _image_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    sizes, cell = inputs["image_sizes"], config.vision_config.patch_size * config.spatial_merge_size
    sizes = on_host(sizes).tolist() if isinstance(sizes, Tensor) else sizes
    return [(height // cell, width // cell) for height, width in sizes]


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if call.get("pixel_values") is None or call.get("image_sizes") is None:
        return None
    return [prod(grid) for grid in _image_grid(call, config)]


MISTRAL3 = Family(
    name="mistral3",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
)
