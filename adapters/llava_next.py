"""LLaVA-NeXT and LLaVA-NeXT-Video (`model_type: llava_next`, `llava_next_video`): a base view and crops of each picture, packed
into one raster without the padding, with a learned row separator after each row. A frame of a video is a base view; squares of
its patches become one token before the projector, and there is no separator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters.crops import side_of
from vlmprune.adapters.family import Family
from vlmprune.adapters.llava import CLIP
from vlmprune.adapters.videos import Videos, of_equal_size
from vlmprune.view import TowerFacts


def best_resolution(size: Sequence[int], resolutions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The canvas (height, width) that keeps most pixels of the picture; of several, the one with least padding."""
    height, width = size

    def merit(canvas: Sequence[int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - canvas[0] * canvas[1]

    best = max(resolutions, key=merit)
    return best[0], best[1]


def unpadded(size: Sequence[int], rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a raster that are left when the padding of a picture (height, width) is removed."""
    height, width = size
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return rows - 2 * padding, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return rows, columns - 2 * padding


def _tokens(size: Sequence[int], config: Any) -> int:
    """Base view, crops and row separators of one picture (height, width)."""
    view = config.vision_config.image_size
    side = view // config.vision_config.patch_size
    height, width = best_resolution(size, config.image_grid_pinpoints)
    rows, columns = unpadded(size, height // view * side, width // view * side)
    return side * side + rows * (columns + 1)


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if call.get("pixel_values") is None or call.get("image_sizes") is None:
        return None
    sizes = call["image_sizes"]
    return [_tokens(size, config) for size in (sizes.tolist() if hasattr(sizes, "tolist") else sizes)]


def packed(
    size: Sequence[int], resolutions: Sequence[Sequence[int]], view: int, side: int, shape: tuple[int, int] | None = None
) -> list[list[Tensor]]:
    """Rows of the crops of one picture: per crop `[side, side]` the index of the token that each cell became, behind those of
    the base view; −1 for padding.

    Args:
        size: of the picture, height and width in pixels.
        resolutions: that the model may choose.
        view: pixels on a side of a crop.
        side: patches on a side of a crop.
        shape: rows and columns of tokens that the un-padded crops were made smaller to; None if they were not.
    """
    high, wide = (length // view for length in best_resolution(size, resolutions))
    rows, columns = unpadded(size, high * side, wide * side)
    down, across = shape or (rows, columns)
    # The token of a cell is that in whose place its middle is.
    row, column = ((2 * torch.arange(cells) + 1) * tokens // (2 * cells) for cells, tokens in ((rows, down), (columns, across)))
    raster = torch.full((high * side, wide * side), -1)
    top, left = (high * side - rows) // 2, (wide * side - columns) // 2
    raster[top : top + rows, left : left + columns] = side**2 + row[:, None] * across + column
    crops = raster.view(high, side, wide, side).transpose(1, 2)  # [crop row, crop column, row, column]
    return list(map(list, crops))


def _crops(inputs: Mapping[str, Any], config: Any) -> list[list[list[Tensor]]]:
    """The base view, then the crops; padding of crops becomes no token."""
    view = config.vision_config.image_size
    side = view // config.vision_config.patch_size
    base = [[torch.arange(side**2).view(side, side)]]
    return [base + packed(size, config.image_grid_pinpoints, view, side) for size in inputs["image_sizes"].tolist()]


LLAVA_NEXT = Family(
    name="llava_next",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    crops=_crops,
    facts=TowerFacts(cls=True, crops=True),
    tower=CLIP,
    newline="image_newline",
)

# -- videos (LLaVA-NeXT-Video) -----------------------------------------------------------------------------------------------


def _pooled(config: Any) -> int:
    return int(config.spatial_pool_stride)


def _frame_side(config: Any) -> int:
    """Tokens on a side of a frame."""
    return side_of(config.vision_config, 1) // _pooled(config)


def _video_grids(call: Mapping[str, Any], config: Any) -> list[tuple[int, int, int]] | None:
    if (pixels := call.get("pixel_values_videos")) is None:
        return None
    videos, frames = pixels.shape[:2]
    return [(frames, _frame_side(config), _frame_side(config))] * videos


def _video_tokens(call: Mapping[str, Any], config: Any) -> list[int] | None:
    grids = _video_grids(call, config)
    return None if grids is None else [math.prod(grid) for grid in grids]


LLAVA_NEXT_VIDEO = replace(
    LLAVA_NEXT,
    name="llava_next_video",
    videos=Videos(
        token=lambda config: config.video_token_id,
        tokens=_video_tokens,
        grids=_video_grids,
        frame=of_equal_size(lambda config: _frame_side(config) ** 2),
        pool="vision_resampler",
        pooled=_pooled,
    ),
)
