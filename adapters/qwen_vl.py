"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (`model_type: qwen2_vl`, `qwen2_5_vl`, `qwen3_vl`, `qwen3_vl_moe`): any resolution, 2×2
patches merged into one token, M-RoPE, no CLS token. Most blocks of Qwen2.5-VL's tower see windows only. Patches of Qwen3-VL
leave its tower several times, and what leaves early is added to the visual tokens between the first decoder layers
(DeepStack).

Two frames of a video that follow each other are one in time: what we call a frame. Qwen2-VL and Qwen2.5-VL write all frames of
a video one after the other; Qwen3-VL and Qwen3.5 write each apart, with its time before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters.family import Family, Injected
from vlmprune.adapters.videos import Clip, Videos, by_grid_or_position, packed_grids, packed_tokens, written_apart
from vlmprune.adapters.vision_tower import Patches, Tower
from vlmprune.view import TowerFacts


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if call.get("pixel_values") is None or call.get("image_grid_thw") is None:
        return None
    merged = config.vision_config.spatial_merge_size**2
    return [count // merged for count in call["image_grid_thw"].prod(dim=-1).tolist()]


def _image_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    merge = config.vision_config.spatial_merge_size
    return [(height // merge, width // merge) for _, height, width in inputs["image_grid_thw"].tolist()]


def _by_window(config: Any, rows: int, columns: int) -> Tensor:
    """Qwen2.5-VL's tokens, window by window; row by row within each."""
    vision = config.vision_config
    side = vision.window_size // vision.spatial_merge_size // vision.patch_size
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    window = (row // side) * columns + column // side  # rising in the order of windows
    return window.flatten().argsort(stable=True)


PATCHES = Patches(embedding="visual.patch_embed.proj", grid="grid_thw")


def _tower(full_attention_blocks: Callable[[Any], Sequence[int]], patches: Patches = PATCHES) -> Tower:
    return Tower(
        blocks="visual.blocks",
        attention="attn",
        projector="visual.merger",
        feature_block=lambda config: config.vision_config.depth - 1,
        full_attention_blocks=full_attention_blocks,
        patches=patches,
    )


def _times(clip: Clip, frames: int) -> Sequence[float]:
    """From `second_per_grid_ts`, if it has an entry for each video and agrees with the rotary positions: `generate` repeats its
    entries in another order than videos, where it makes copies of a sample."""
    seconds = clip.call.get("second_per_grid_ts")
    if seconds is None or len(seconds) != clip.of:
        return [math.nan] * frames
    apart, positions = float(seconds[clip.number]), clip.positions()
    if positions is not None and frames > 1:
        steps = positions[0, len(clip.places) // frames] - positions[0, 0]
        if abs(steps - apart * clip.config.vision_config.tokens_per_second) >= 1:
            return [math.nan] * frames
    return [number * apart for number in range(frames)]


_RUN = Videos(
    token=lambda config: config.video_token_id,
    tokens=packed_tokens,
    grids=packed_grids,
    frame=by_grid_or_position(packed_grids),
)
_APART = replace(_RUN, frame=written_apart)

QWEN2_VL = Family(
    name="qwen2_vl",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
    facts=TowerFacts(patches_per_token=4),
    tower=_tower(lambda config: range(config.vision_config.depth)),
    videos=_RUN,
)

QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
    facts=TowerFacts(patches_per_token=4, windows=True),
    tower=_tower(lambda config: config.vision_config.fullatt_block_indexes, replace(PATCHES, order=_by_window)),
    videos=replace(_RUN, times=_times),
)

QWEN3_VL = Family(
    name="qwen3_vl",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
    facts=TowerFacts(patches_per_token=4, whole=True),
    tower=_tower(lambda config: range(config.vision_config.depth), replace(PATCHES, early="visual.deepstack_merger_list")),
    injected=Injected("visual_pos_masks", "deepstack_visual_embeds"),
    videos=_APART,
)

QWEN3_VL_MOE = replace(QWEN3_VL, name="qwen3_vl_moe")

QWEN3_5 = replace(QWEN2_VL, name="qwen3_5", videos=_APART)

QWEN3_5_MOE = replace(QWEN3_5, name="qwen3_5_moe")
