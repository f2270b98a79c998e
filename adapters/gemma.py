"""Gemma 3 and Gemma 4 with pictures, PaliGemma and PaliGemma 2 (`model_type: gemma3`, `gemma4`, `paligemma`). No CLS token.

Tokens of a picture see each other in both directions (in PaliGemma: all of the prompt), many layers see a window, and the small
checkpoints of Gemma 4 (E2B, E4B) have inputs for each layer and share keys: all of this is read from the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt, prod
from typing import Any

from torch import Tensor

from vlmprune.adapters.crops import side_of
from vlmprune.adapters.family import Family
from vlmprune.adapters.videos import Videos, written_apart
from vlmprune.device import on_host

# -- Gemma 3: one raster per picture; crops of a picture (pan and scan) stand apart in the prompt, each with its own budget ---


def _gemma3_tokens(call: Mapping[str, Any], config: Any) -> list[int] | None:
    pixels = call.get("pixel_values")
    return None if pixels is None else [config.mm_tokens_per_image] * pixels.shape[0]


def _gemma3_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    return [(isqrt(config.mm_tokens_per_image),) * 2] * inputs["pixel_values"].shape[0]


GEMMA3 = Family(
    name="gemma3",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_gemma3_tokens,
    image_grid=_gemma3_grid,
)


# -- Gemma 4: pictures of any size, as patches with their cells; squares of them become one token -----------------------------


def _gemma4_rasters(cells: Tensor, config: Any) -> list[tuple[int, int]]:
    """Rows and columns of tokens, from the cells (x, y) of the patches `[picture, patch, 2]`, −1 on padding."""
    merged = config.vision_config.pooling_kernel_size
    return [((y + 1) // merged, (x + 1) // merged) for x, y in on_host(cells.amax(dim=1)).tolist()]


def _gemma4_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    return _gemma4_rasters(inputs["image_position_ids"], config)


def _gemma4_tokens(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if call.get("pixel_values") is None or call.get("image_position_ids") is None:
        return None
    return [prod(grid) for grid in _gemma4_grid(call, config)]


def _gemma4_video_grids(call: Mapping[str, Any], config: Any) -> list[tuple[int, int, int]] | None:
    """Frames of all videos follow each other."""
    cells, frames = call.get("video_position_ids"), call.get("num_frames_per_video")
    if cells is None or frames is None:
        return None
    counts = on_host(frames).tolist()
    rasters = _gemma4_rasters(cells, config)
    return [(count, *rasters[sum(counts[:number])]) for number, count in enumerate(counts)]


def _gemma4_video_tokens(call: Mapping[str, Any], config: Any) -> list[int] | None:
    grids = _gemma4_video_grids(call, config)
    return None if grids is None or call.get("pixel_values_videos") is None else [prod(grid) for grid in grids]


GEMMA4 = Family(
    name="gemma4",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_gemma4_tokens,
    image_grid=_gemma4_grid,
    videos=Videos(
        token=lambda config: config.video_token_id,
        tokens=_gemma4_video_tokens,
        grids=_gemma4_video_grids,
        frame=written_apart,
    ),
)


# -- PaliGemma: one raster per picture, at the beginning of the prompt ---------------------------------------------------------


def _paligemma_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    return [(side_of(config.vision_config, 1),) * 2] * inputs["pixel_values"].shape[0]


def _paligemma_tokens(call: Mapping[str, Any], config: Any) -> list[int] | None:
    return None if call.get("pixel_values") is None else [prod(grid) for grid in _paligemma_grid(call, config)]


PALIGEMMA = Family(
    name="paligemma",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_paligemma_tokens,
    image_grid=_paligemma_grid,
    whole_prompt=True,
)
