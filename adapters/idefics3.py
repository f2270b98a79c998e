"""Idefics3 and SmolVLM (`model_type: idefics3`, `smolvlm`): a picture is cut into crops, with the whole of it as the last one.
All crops have equally many tokens, and text between them names their row and column. The encoder returns one entry per sample,
an empty one for a sample without a picture.

    <fake> <row_1_col_1> img … img <fake> <row_1_col_2> img … img \\n
    <fake> <row_2_col_1> … \\n
    \\n <fake> <global-img> img … img <fake>

A budget is the picture's, all crops together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlmprune.adapters.crops import in_rows, side_of
from vlmprune.adapters.family import Family
from vlmprune.device import on_host


def _side(config: Any) -> int:
    return side_of(config.vision_config, config.scale_factor)


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    """Of each crop. Samples with fewer crops than others have crops of zeros, which the model leaves out."""
    if (pixels := call.get("pixel_values")) is None:
        return None
    crops = int(on_host((pixels != 0).flatten(2).any(dim=2).sum()))
    return [_side(config) ** 2] * crops or None


def _entries(sizes: Sequence[int], config: Any) -> list[int]:
    crop = _side(config) ** 2
    return [crop] * (sum(sizes) // crop)


def _joins(between: Sequence[int]) -> bool:
    """A picture ends with the token that every crop begins with, two before the first of its features. Between crops of one row
    there are only these two; a new row begins with a line break."""
    return len(between) == 2 or (len(between) > 2 and between[0] != between[-2])


def _crops(inputs: Mapping[str, Any], config: Any) -> list[list[list[Tensor]]]:
    return in_rows(inputs["input_ids"], config.image_token_id, _side(config), _joins, beside=lambda between: len(between) == 2)


IDEFICS3 = Family(
    name="idefics3",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    entries=_entries,
    joins=_joins,
    crops=_crops,
    overview=-1,
    language_model="text_model",
)

SMOLVLM = replace(IDEFICS3, name="smolvlm")
