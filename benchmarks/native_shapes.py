"""Models for benchmarks/native.py: random weights, 1024 wide, 12 decoder layers, one picture of 576 visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from prefill import llava_shaped  # benchmarks/ is no package: its scripts find each other
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

VISUAL, LAYERS, IMAGE, WIDTH, MLP = 576, 12, 1, 1024, 2816
SIDE = 24
"""Visual tokens of a side of the picture."""
KEPT = 64


@dataclass(frozen=True)
class Shape:
    """A model's shape, and how a prompt of it is made.

    Attributes:
        recipes: recipe -> share of the un-pruned prefill that choosing and shortening may take; None: no target.
        build: makes the model.
        picture: arguments of `get_image_features`.
        rest: for ids `[1, prompt]` and rows and columns of the picture's tokens, further arguments of a call.
    """

    recipes: Mapping[str, float | None]
    build: Callable[[], Any]
    picture: Callable[[], dict[str, Tensor]]
    rest: Callable[[Tensor, int, int], dict[str, Tensor]] = lambda ids, rows, columns: {}


def _text(**more: Any) -> dict[str, Any]:
    """What all decoders have in common."""
    return {
        "vocab_size": 4096,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 64,
        **more,
    }


def _llava() -> Any:
    return llava_shaped(dim=WIDTH, mlp=MLP, layers=LAYERS, image_token=IMAGE)[0]


def compiled_shapes() -> dict[str, Shape]:
    """Smaller ones, each of which a compiler takes a minute for: 512 wide, 4 decoder layers."""
    small = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
    small |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    return {
        "llava": Shape({}, lambda: llava_shaped(dim=512, mlp=1408, layers=4, image_token=IMAGE)[0], _pixels),
        "qwen2_5_vl": Shape({}, lambda: _qwen2_5_vl(small), _patches, _grid),
        "qwen3_vl": Shape({}, lambda: _qwen3_vl(small), _patches, _grid),
    }


def _qwen2_5_vl(more: dict[str, Any]) -> Any:
    vision = {
        "depth": 4,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_heads": 6,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": more["hidden_size"],
    }
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10]}
    text = _text(rope_parameters=rotary, **more)
    del text["head_dim"]
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    return _random(Qwen2_5_VLForConditionalGeneration, config)


def _qwen3_vl(more: dict[str, Any] | None = None) -> Any:
    """DeepStack adds features of three tower blocks behind decoder layers 0, 1 and 2."""
    vision = {
        "depth": 6,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_heads": 6,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [1, 3, 4],
    }
    rotary = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10]}
    text = _text(rope_parameters=rotary, **(more or {}))
    config = Qwen3VLConfig(
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    return _random(Qwen3VLForConditionalGeneration, config)


def _gemma3() -> Any:
    """Five of six layers have a window, of 512 tokens; a picture's tokens see each other both ways."""
    vision = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "image_size": 336,
        "patch_size": 14,
    }
    config = Gemma3Config(
        vision_config=vision,
        text_config=_text(sliding_window=512, query_pre_attn_scalar=64),
        mm_tokens_per_image=VISUAL,
        image_token_id=IMAGE,
        boi_token_index=3,
        eoi_token_index=4,
    )
    return _random(Gemma3ForConditionalGeneration, config)


def _random(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, 336, 336)}


def _patches() -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(4 * VISUAL, 3 * 2 * 14**2),
        "image_grid_thw": torch.tensor([[1, 2 * SIDE, 2 * SIDE]]),
    }


def _grid(ids: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    return {"image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]), "mm_token_type_ids": (ids == IMAGE).int()}


def _types(ids: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    return {"token_type_ids": (ids == IMAGE).long()}


BEFORE: dict[str, float | None] = {
    f"random:layer=0,tokens={KEPT}": 0.03,
    f"divprune:layer=0,tokens={KEPT}": 0.03,
}
BETWEEN: dict[str, float | None] = {
    f"random:layer=2,tokens={KEPT}": 0.03,
    f"fastv:layer=2,tokens={KEPT}": 0.03,
    "adaptinfer:layer=2|4|8,tokens=133|64|27": 0.05,
    "pdrop:layer=3|6|9,tokens=288|144|72": None,
}
TOWER: dict[str, float | None] = {f"visionzip:tokens={KEPT}": 0.03, f"flowcut:tokens={KEPT}": 0.05}

SHAPES = {
    "llava": Shape({**BEFORE, **TOWER, **BETWEEN}, _llava, _pixels),
    "qwen3_vl": Shape({**BEFORE, **BETWEEN}, _qwen3_vl, _patches, _grid),
    "gemma3": Shape({**BEFORE, **BETWEEN}, _gemma3, _pixels, _types),
}


def fewer(encoded: Any, count: int) -> Any:
    """The picture's features as if it had `count` tokens."""
    shorter = type(encoded)(**encoded)
    features = encoded.pooler_output
    if isinstance(features, Tensor):  # [picture, token, width]
        shorter.pooler_output = features[:, :count].clone()
    else:
        shorter.pooler_output = [features[0][:count].clone()]
    if (injected := encoded.get("deepstack_features")) is not None:
        shorter.deepstack_features = [(layer[0][:count].clone(),) for layer in injected]
    return shorter
