"""LLaVA-OneVision (`model_type: llava_onevision`): a base view and crops as in LLaVA-NeXT, made smaller where they would be
more than the model's limit, with a learned row separator after each row; of several pictures in a sample only base views, with
one separator each. No CLS token. A frame of a video is a base view of which 2 × 2 tokens are made one; one separator stands
at the end of a video."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters.crops import side_of
from vlmprune.adapters.family import Family
from vlmprune.adapters.llava_next import best_resolution, packed, unpadded
from vlmprune.adapters.videos import Videos, of_equal_size
from vlmprune.device import on_host


def _shape(size: Sequence[int], call: Mapping[str, Any], config: Any) -> tuple[int, int]:
    """Rows and columns of the crops of a picture (height, width) as they are packed."""
    view, side = config.vision_config.image_size, side_of(config.vision_config, 1)
    height, width = best_resolution(size, config.image_grid_pinpoints)
    rows, columns = unpadded(size, height // view * side, width // view * side)
    most = int((call.get("vision_aspect_ratio") or config.vision_aspect_ratio).removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * side**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def _pictures(call: Mapping[str, Any], config: Any) -> Iterator[tuple[list[int], bool]]:
    """Size of each picture of a call (height, width), and whether it has crops."""
    sizes, counts = call["image_sizes"], call.get("batch_num_images")
    sizes = on_host(sizes).tolist() if isinstance(sizes, Tensor) else sizes
    counts = [1] * len(sizes) if counts is None else on_host(torch.as_tensor(counts)).tolist()
    alone = [count == 1 for count in counts for _ in range(count)]
    yield from zip(sizes, alone, strict=True)


def _tokens(size: Sequence[int], cut: bool, call: Mapping[str, Any], config: Any) -> int:
    base = side_of(config.vision_config, 1) ** 2
    if not cut:
        return base + 1
    rows, columns = _shape(size, call, config)
    return base + rows * (columns + 1)


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if call.get("pixel_values") is None or call.get("image_sizes") is None:
        return None
    return [_tokens(size, cut, call, config) for size, cut in _pictures(call, config)]


def _crops(inputs: Mapping[str, Any], config: Any) -> list[list[list[Tensor]]]:
    """The base view, then the crops; padding of crops becomes no token. Where crops were made smaller, several cells share the
    token in whose place they are."""
    view, side = config.vision_config.image_size, side_of(config.vision_config, 1)
    pictures = []
    for size, cut in _pictures(inputs, config):
        base = [[torch.arange(side**2).view(side, side)]]
        pictures.append(
            base + packed(size, config.image_grid_pinpoints, view, side, _shape(size, inputs, config)) if cut else base
        )
    return pictures


# -- videos --------------------------------------------------------------------------------------------------------------------


def _frame_side(config: Any) -> int:
    """Tokens on a side of a frame."""
    return math.ceil(side_of(config.vision_config, 1) / 2)


def _video_grids(call: Mapping[str, Any], config: Any) -> list[tuple[int, int, int]] | None:
    if (pixels := call.get("pixel_values_videos")) is None:
        return None
    videos, frames = pixels.shape[:2]
    return [(frames, _frame_side(config), _frame_side(config))] * videos


def _video_tokens(call: Mapping[str, Any], config: Any) -> list[int] | None:
    grids = _video_grids(call, config)
    return None if grids is None else [math.prod(grid) + 1 for grid in grids]


LLAVA_ONEVISION = Family(
    name="llava_onevision",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    crops=_crops,
    videos=Videos(
        token=lambda config: config.video_token_id,
        tokens=_video_tokens,
        grids=_video_grids,
        frame=of_equal_size(lambda config: _frame_side(config) ** 2),
    ),
    newline="image_newline",
)
