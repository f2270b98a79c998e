"""InternVL 3 and 3.5 in the format of transformers (`model_type: internvl`): one to twelve crops of a picture, and the whole of
it as the last one; a tower with a CLS token; squares of 2 × 2 patches become one token before the projector; any decoder.

The processor does not say how the crops of a picture are arranged: drawn, they stand in one row, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vlmprune.adapters.crops import in_one_row, side_of, without_gap
from vlmprune.adapters.family import Family
from vlmprune.adapters.llava import feature_block, features_refused
from vlmprune.adapters.vision_tower import Tower
from vlmprune.view import TowerFacts


def _merged(config: Any) -> int:
    """Patches on a side of the square that becomes a token."""
    return round(1 / config.downsample_ratio)


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if (pixels := call.get("pixel_values")) is None:
        return None
    patch, merged = config.vision_config.patch_size, _merged(config)
    rows, columns = (length // size // merged for length, size in zip(pixels.shape[-2:], patch, strict=True))
    return [rows * columns] * pixels.shape[0]


def _crops(inputs: Mapping[str, Any], config: Any) -> list[list[list[Tensor]]]:
    side = side_of(config.vision_config, _merged(config))
    return in_one_row(inputs["input_ids"], config.image_token_id, side, without_gap, overview=-1)


def _as_built(family: Family, base: nn.Module) -> Family:
    return replace(family, facts=replace(family.facts, patches_per_token=_merged(base.config) ** 2))


INTERNVL = Family(
    name="internvl",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    crops=_crops,
    joins=without_gap,
    overview=-1,
    facts=TowerFacts(cls=True, crops=True, patches_per_token=4, whole=True),
    tower=Tower(
        blocks="vision_tower.encoder.layer",
        attention="attention",
        projector="multi_modal_projector",
        feature_block=feature_block,
        full_attention_blocks=lambda config: range(config.vision_config.num_hidden_layers),
        refusal=lambda base: features_refused(base.config),
    ),
    as_built=_as_built,
)
