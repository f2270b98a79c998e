"""Qwen2-VL and Qwen2.5-VL (`model_type: qwen2_vl`, `qwen2_5_vl`): any resolution, 2×2 patches merged into one token, M-RoPE, no
CLS token. Most blocks of Qwen2.5-VL's tower see windows only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmprune.adapters.family import Family, Tower
from vlmprune.view import TowerFacts


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if call.get("pixel_values") is None or call.get("image_grid_thw") is None:
        return None
    merged = config.vision_config.spatial_merge_size**2
    return [count // merged for count in call["image_grid_thw"].prod(dim=-1).tolist()]


def _image_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    merge = config.vision_config.spatial_merge_size
    return [(height // merge, width // merge) for _, height, width in inputs["image_grid_thw"].tolist()]


def _tower(full_attention_blocks: Callable[[Any], Sequence[int]]) -> Tower:
    return Tower(
        blocks="visual.blocks",
        attention="attn",
        projector="visual.merger",
        feature_block=lambda config: config.vision_config.depth - 1,
        full_attention_blocks=full_attention_blocks,
    )


QWEN2_VL = Family(
    name="qwen2_vl",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
    facts=TowerFacts(patches_per_token=4),
    tower=_tower(lambda config: range(config.vision_config.depth)),
)

QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
    facts=TowerFacts(patches_per_token=4, windows=True),
    tower=_tower(lambda config: config.vision_config.fullatt_block_indexes),
)
