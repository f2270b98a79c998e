"""A worked model family: Qwen3-VL, as far as data alone can describe it (CONTRIBUTING.md explains the rest).

`tests/test_docs.py` runs this file: from layer 3 on, pruning is exact; stages before it are what the engine lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune.adapters.family import Family
from vlmprune.view import TowerFacts


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    """Visual tokens of each picture of a call, or None if it has no pixels."""
    if call.get("pixel_values") is None or call.get("image_grid_thw") is None:
        return None
    merged = config.vision_config.spatial_merge_size**2
    return [count // merged for count in call["image_grid_thw"].prod(dim=-1).tolist()]


def _image_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    """Rows and columns of visual tokens of each picture."""
    merge = config.vision_config.spatial_merge_size
    return [(height // merge, width // merge) for _, height, width in inputs["image_grid_thw"].tolist()]


QWEN3_VL = Family(
    name="qwen3_vl",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
    facts=TowerFacts(patches_per_token=4),  # 2 × 2 patches become one visual token; no CLS token, no crops, no windows
    tower=None,  # no method may look into the tower: its patches leave it four times, once for each DeepStack layer
)
