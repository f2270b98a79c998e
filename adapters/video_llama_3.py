"""VideoLLaMA 3 (`model_type: video_llama_3`): pictures of any resolution, whose patches are merged by a factor that the
processor names with each; plain positions, any decoder, no CLS token. Videos are refused."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from vlmprune.adapters.family import Family
from vlmprune.device import on_host


def _image_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    merged = on_host(inputs["image_merge_sizes"]).tolist()
    grids = on_host(inputs["image_grid_thw"]).tolist()
    return [(height // side, width // side) for (_, height, width), side in zip(grids, merged, strict=True)]


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if call.get("pixel_values") is None or call.get("image_grid_thw") is None or call.get("image_merge_sizes") is None:
        return None
    return [prod(grid) for grid in _image_grid(call, config)]


VIDEO_LLAMA_3 = Family(
    name="video_llama_3",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
)
