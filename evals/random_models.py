"""Models of published shapes with random weights, made on the device that runs them, and prompts for them: speed depends on
nothing else.

Widths, depths and vocabularies are those of the checkpoints' `config.json`: llava-hf/llava-1.5-7b-hf,
llava-hf/llava-v1.6-vicuna-7b-hf, Qwen/Qwen2.5-VL-7B-Instruct. `reduce` divides widths and depths for machines that are too
small for the true shape. Head sizes, images and token counts are not reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from vlmprune.errors import UsageError, unknown
from vlmprune.loading.placement import execution_device

BEFORE, AFTER = 35, 25
"""Words before and after the image, as in a short LLaVA prompt."""

CLIP_SIDE, CLIP_PATCH = 336, 14
QWEN_GRID = (64, 80)
"""Patches (rows, columns) of an 896 × 1120 image: 1,280 tokens of 2 × 2."""

REDUCTIONS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Shape:
    """A model's published shape, and one image or video for it.

    Attributes:
        name: on the command line.
        visual: visual tokens of the image, row separators not counted.
        parameters: of the true shape.
        recipes: measured by default.
        kind, config: transformers' class, and its config for a `reduce`.
        image: for a batch, the image's placeholders in each row, and the other arguments of a call.
    """

    name: str
    visual: int
    parameters: int
    recipes: tuple[str, ...]
    kind: Any
    config: Callable[[int], Any]
    image: Callable[[Any, int, torch.Generator], tuple[list[int], dict[str, Tensor]]]

    def build(self, device: str = "cpu", dtype: torch.dtype = torch.float32, reduce: int = 1) -> Any:
        """A random model, made on its device and in its dtype: nothing is moved or converted.

        Args:
            reduce: 1 for the true shape; 2, 4, 8 or 16 divides widths by it, and depths by half of it.

        Raises:
            UsageError: another `reduce`, or a device that this machine lacks.
        """
        if reduce not in REDUCTIONS:
            raise UsageError(f"a shape can be reduced by {', '.join(map(str, REDUCTIONS))}, found {reduce}.")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"cannot use device {device!r} on this machine: try cpu, or cuda where there is a GPU.") from error
        torch.manual_seed(0)
        with torch.device(device), _default_dtype(dtype):
            model = self.kind(self.config(reduce)).eval().requires_grad_(False)
        settings = model.generation_config
        settings.eos_token_id, settings.bos_token_id, settings.pad_token_id = None, None, 0
        settings.do_sample = False
        return model

    def inputs(self, model: Any, batch: int) -> dict[str, Tensor]:
        """Different random images and words for every row, all of one length: no padding.

        Returns:
            Arguments of `model(**inputs)` and `model.generate(**inputs)`, on the model's device and in its dtype.
        """
        random = torch.Generator().manual_seed(0)
        placeholders, pixels = self.image(model.config, batch, random)
        words = torch.randint(10, 1000, (batch, BEFORE + AFTER), generator=random)
        placed = torch.tensor(placeholders).expand(batch, -1)
        ids = torch.cat((words[:, :BEFORE], placed, words[:, BEFORE:]), dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
        if "video_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = 2 * (ids == model.config.video_token_id).long()
        device = execution_device(model)
        return {name: x.to(device, model.dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def shape_named(name: str) -> Shape:
    """One of `SHAPES`.

    Raises:
        UsageError: there is no shape of that name.
    """
    if name not in SHAPES:
        raise unknown("shape", name, SHAPES)
    return SHAPES[name]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _depth(layers: int, reduce: int) -> int:
    """Depth is reduced by half as much as width, because methods have stages at several layers."""
    return layers // max(reduce // 2, 1)


def _clip(reduce: int) -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 pixels."""
    return CLIPVisionConfig(
        hidden_size=1024 // reduce,
        intermediate_size=4096 // reduce,
        num_hidden_layers=_depth(24, reduce),
        num_attention_heads=16 // reduce,
        image_size=CLIP_SIDE,
        patch_size=CLIP_PATCH,
        projection_dim=768,
    )


def _vicuna(reduce: int) -> LlamaConfig:
    """Vicuna-7B v1.5, with the vocabulary of the converted checkpoints."""
    return LlamaConfig(
        hidden_size=4096 // reduce,
        intermediate_size=11008 // reduce,
        num_hidden_layers=_depth(32, reduce),
        num_attention_heads=32 // reduce,
        num_key_value_heads=32 // reduce,
        vocab_size=32064,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _llava_config(reduce: int) -> LlavaConfig:
    return LlavaConfig(
        vision_config=_clip(reduce),
        text_config=_vicuna(reduce),
        image_token_index=32000,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_next_config(reduce: int) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=_clip(reduce),
        text_config=_vicuna(reduce),
        image_token_index=32000,
        image_seq_length=576,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


QWEN_MARKS: dict[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
"""Numbers of the tokens around and in the place of pictures and videos, in every Qwen-VL."""


def _qwen_config(reduce: int) -> Qwen2_5_VLConfig:
    depth, heads = _depth(32, reduce), 28 // min(reduce, 7)  # heads divide 28 and stay 128 wide
    whole = max(depth // 4, 2)  # one of so many blocks attends to the whole image
    vision = {
        "depth": depth,
        "hidden_size": 1280 // reduce,
        "intermediate_size": 3420 // reduce,
        "num_heads": 16 // reduce,
        "out_hidden_size": 128 * heads,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": list(range(whole - 1, depth, whole)),
    }
    text = {
        "hidden_size": 128 * heads,
        "intermediate_size": 18944 // reduce,
        "num_hidden_layers": _depth(28, reduce),
        "num_attention_heads": heads,
        "num_key_value_heads": 4 if reduce == 1 else 1,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    }
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        **QWEN_MARKS,
    )


def _llava_image(config: Any, batch: int, random: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
    pixels = torch.randn(batch, 3, CLIP_SIDE, CLIP_SIDE, generator=random)
    return [config.image_token_id] * 576, {"pixel_values": pixels}


def _llava_next_image(config: Any, batch: int, random: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
    """A square image of 672 pixels: an overview and four crops, 576 + 48 · (48 + 1 separator) placeholders."""
    pixels = torch.randn(batch, 5, 3, CLIP_SIDE, CLIP_SIDE, generator=random)
    sizes = torch.tensor([[2 * CLIP_SIDE] * 2]).expand(batch, -1)
    return [config.image_token_id] * (576 + 48 * 49), {"pixel_values": pixels, "image_sizes": sizes}


def _qwen_image(config: Any, batch: int, random: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
    rows, columns = QWEN_GRID
    vision = config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(batch * rows * columns, width, generator=random)
    tokens = [config.image_token_id] * (rows * columns // vision.spatial_merge_size**2)
    grids = torch.tensor([[1, rows, columns]]).expand(batch, -1)
    return (
        [config.vision_start_token_id, *tokens, config.vision_end_token_id],
        {"pixel_values": pixels, "image_grid_thw": grids},
    )


def _recipes(tokens: int, *names: str) -> tuple[str, ...]:
    return tuple(f"{name}:tokens={tokens}" for name in names)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "llava-1.5-7b",
            576,
            7_063_427_072,
            _recipes(64, "flowcut", "divprune", "visionzip"),
            LlavaForConditionalGeneration,
            _llava_config,
            _llava_image,
        ),
        Shape(
            "llava-next-7b",
            2880,
            7_063_431_168,
            _recipes(160, "flowcut", "divprune", "visionzip"),
            LlavaNextForConditionalGeneration,
            _llava_next_config,
            _llava_next_image,
        ),
        Shape(
            "qwen2.5-vl-7b",
            1280,
            8_292_166_656,
            _recipes(142, "flowcut", "divprune"),
            Qwen2_5_VLForConditionalGeneration,
            _qwen_config,
            _qwen_image,
        ),
    )
}
"""Every shape by its name. Recipes keep as many tokens as papers do (Qwen: 11.1 %)."""
