"""Qwen2.5-VL (`model_type: qwen2_5_vl`): any resolution, 2×2 patches merged into one token, M-RoPE, no CLS token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune.adapters.family import Family


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if call.get("pixel_values") is None or call.get("image_grid_thw") is None:
        return None
    merged = config.vision_config.spatial_merge_size**2
    return [count // merged for count in call["image_grid_thw"].prod(dim=-1).tolist()]


def _image_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    merge = config.vision_config.spatial_merge_size
    return [(height // merge, width // merge) for _, height, width in inputs["image_grid_thw"].tolist()]


QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
)
