"""VideoLLaMA 3 (`model_type: video_llama_3`): pictures of any resolution, whose patches are merged by a factor that the
processor names with each; plain positions, any decoder, no CLS token. Every frame of a video is written apart, with its time
before it. The processor leaves out tokens that changed little since the frame before (`video_compression_mask`), so that frames
have different numbers of tokens; a frame without any does not count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from vlmprune.adapters.family import Family
from vlmprune.adapters.videos import Videos, written_apart
from vlmprune.device import on_host


def _image_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    merged = on_host(inputs["image_merge_sizes"]).tolist()
    grids = on_host(inputs["image_grid_thw"]).tolist()
    return [(height // side, width // side) for (_, height, width), side in zip(grids, merged, strict=True)]


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if call.get("pixel_values") is None or call.get("image_grid_thw") is None or call.get("image_merge_sizes") is None:
        return None
    return [prod(grid) for grid in _image_grid(call, config)]


def _video_grids(call: Mapping[str, Any], config: Any) -> list[tuple[int, int, int]] | None:
    """None where tokens were left out: what is left is no raster."""
    mask = call.get("video_compression_mask")
    if call.get("video_grid_thw") is None or call.get("video_merge_sizes") is None:
        return None
    if mask is not None and not on_host(mask).all():
        return None
    return _whole(call)


def _whole(call: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    merged, grids = on_host(call["video_merge_sizes"]).tolist(), on_host(call["video_grid_thw"]).tolist()
    return [(frames, rows // side, columns // side) for (frames, rows, columns), side in zip(grids, merged, strict=True)]


def _left(sizes: Sequence[int], call: Mapping[str, Any]) -> list[int]:
    """Tokens of each video that are not left out."""
    if (mask := call.get("video_compression_mask")) is None:
        return list(sizes)
    return [int(part.sum()) for part in np.split(on_host(mask), np.cumsum(sizes)[:-1])]


def _video_tokens(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if any(call.get(name) is None for name in ("pixel_values_videos", "video_grid_thw", "video_merge_sizes")):
        return None
    return _left([prod(grid) for grid in _whole(call)], call)


VIDEO_LLAMA_3 = Family(
    name="video_llama_3",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
    videos=Videos(
        token=lambda config: config.video_token_id,
        tokens=_video_tokens,
        grids=_video_grids,
        frame=written_apart,
        entries=_left,
        uneven=True,
    ),
)
