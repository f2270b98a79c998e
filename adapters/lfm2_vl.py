"""LFM2-VL (`model_type: lfm2_vl`): pictures of any size, or crops of one, from a padded tower; squares of patches become one
token in the projector. Most decoder layers are short convolutions. No CLS token."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from vlmprune.adapters.family import Family
from vlmprune.device import on_host


def _image_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    """Of each entry: the whole picture if it is small, else a crop, or the thumbnail after the crops."""
    merged = config.downsample_factor
    return [(rows // merged, columns // merged) for rows, columns in on_host(inputs["spatial_shapes"]).tolist()]


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if call.get("pixel_values") is None or call.get("spatial_shapes") is None:
        return None
    return [prod(grid) for grid in _image_grid(call, config)]


LFM2_VL = Family(
    name="lfm2_vl",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
)
