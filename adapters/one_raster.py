"""Families whose pictures, or crops of pictures, are one raster of a fixed size each, from a tower without a CLS token: Janus,
DeepSeek-VL and its hybrid, FastVLM, Perception-LM, Ovis2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

from torch import Tensor

from vlmprune.adapters.crops import in_one_row, in_rows, side_of, without_gap
from vlmprune.adapters.family import Family
from vlmprune.device import on_host
from vlmprune.errors import UsageError


def _side(config: Any) -> int:
    return side_of(config.vision_config, 1)


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    pixels = call.get("pixel_values")
    return None if pixels is None else [_side(config) ** 2] * pixels.shape[:-3].numel()


def _image_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    return [(_side(config),) * 2] * inputs["pixel_values"].shape[:-3].numel()


DEEPSEEK_VL = Family(
    name="deepseek_vl",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
)

DEEPSEEK_VL_HYBRID = replace(DEEPSEEK_VL, name="deepseek_vl_hybrid")

JANUS = replace(DEEPSEEK_VL, name="janus")


# -- FastVLM and Perception-LM: towers of timm, whose config does not say how many tokens they make -------------------------


def _counted(call: Mapping[str, Any], config: Any) -> list[int] | None:
    """Placeholders of the prompt, divided among its crops."""
    if (pixels := call.get("pixel_values")) is None:
        return None
    if (ids := call.get("input_ids")) is None:
        raise UsageError(
            f"how many tokens a picture of {config.model_type} has is counted in input_ids, and this call has inputs_embeds "
            "only: pass input_ids, or what get_image_features returned as mm_encoder_outputs."
        )
    crops = pixels.shape[:-3].numel()
    count = int(on_host((ids == config.image_token_id).sum()))
    return [count // crops] * (crops - 1) + [count - count // crops * (crops - 1)]


def _counted_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    return [(isqrt(tokens),) * 2 for tokens in _counted(inputs, config) or ()]


FAST_VLM = replace(DEEPSEEK_VL, name="fast_vlm", tokens_per_image=_counted, image_grid=_counted_grid)


def _followed_crops(inputs: Mapping[str, Any], config: Any) -> list[list[list[Tensor]]]:
    """The whole picture, then its crops."""
    side = isqrt((_counted(inputs, config) or [1])[0])
    return in_one_row(inputs["input_ids"], config.image_token_id, side, without_gap, overview=0)


PERCEPTION_LM = replace(
    DEEPSEEK_VL, name="perception_lm", tokens_per_image=_counted, image_grid=None, joins=without_gap, crops=_followed_crops
)


# -- Ovis2: one token between crops; the first is the whole picture ----------------------------------------------------------


def _ovis_side(config: Any) -> int:
    return -(-_side(config) // config.vision_config.hidden_stride)


def _ovis_crops(inputs: Mapping[str, Any], config: Any) -> list[list[list[Tensor]]]:
    _, _, beside, _, _ = config.visual_indicator_token_ids  # begin, grid, column, row, end
    return in_rows(
        inputs["input_ids"], config.image_token_id, _ovis_side(config), _one_between, lambda between: between == [beside]
    )


def _one_between(between: Sequence[int]) -> bool:
    return len(between) == 1


OVIS2 = replace(
    DEEPSEEK_VL,
    name="ovis2",
    tokens_per_image=lambda call, config: (
        None if call.get("pixel_values") is None else [_ovis_side(config) ** 2] * call["pixel_values"].shape[0]
    ),
    image_grid=None,
    joins=_one_between,
    crops=_ovis_crops,
)
