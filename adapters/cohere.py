"""Aya Vision and Cohere2 Vision (`model_type: aya_vision`, `cohere2_vision`): crops of a picture, and the whole of it as the
last one; squares of patches become one token before the projector. One token stands before each crop, or behind it. No CLS
token.

The processor does not say how the crops of a picture are arranged: drawn, they stand in one row, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlmprune.adapters.crops import in_one_row, side_of
from vlmprune.adapters.family import Family


def _side(config: Any) -> int:
    return side_of(config.vision_config, config.downsample_factor)


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    pixels = call.get("pixel_values")
    return None if pixels is None else [_side(config) ** 2] * pixels.shape[0]


def _joins(between: Sequence[int]) -> bool:
    """Between two pictures there are also the end of the first and the beginning of the second."""
    return len(between) <= 1


def _crops(inputs: Mapping[str, Any], config: Any) -> list[list[list[Tensor]]]:
    return in_one_row(inputs["input_ids"], config.image_token_id, _side(config), _joins, overview=-1)


AYA_VISION = Family(
    name="aya_vision",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    joins=_joins,
    crops=_crops,
    overview=-1,
)

COHERE2_VISION = replace(AYA_VISION, name="cohere2_vision")
