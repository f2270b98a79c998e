"""A worked model family: LightOnOCR, which CONTRIBUTING.md explains.

Pixtral's tower sees pictures of any size, squares of 2 × 2 patches become one visual token, and the decoder is Qwen3. This
file is all that vlmprune has to be told; `tests/test_docs.py` runs it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from vlmprune.adapters.family import Family


def _image_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    """Rows and columns of visual tokens of each picture."""
    side = config.vision_config.patch_size * config.spatial_merge_size
    return [(int(height) // side, int(width) // side) for height, width in inputs["image_sizes"]]


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    """Visual tokens of each picture of a call, or None if it has no pixels."""
    if call.get("pixel_values") is None or call.get("image_sizes") is None:
        return None
    return [prod(grid) for grid in _image_grid(call, config)]


LIGHTON_OCR = Family(
    name="lighton_ocr",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
    tower=None,  # no CLS token: no method may look into the tower
)
