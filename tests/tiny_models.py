"""Small random-weight models of real Transformers classes, and inputs for them.

The weights are drawn with standard deviation 0.2 instead of 0.02: attention then is peaked and every token matters, so
that a token too many or too few, or at a wrong position, changes the logits (standard deviation 1) by a few tenths,
while rounding changes them by at most 2e-5.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

FAMILIES = ("llava", "qwen2_5_vl")
"""The families that most tests run on."""
CHUNKS_PICTURES = hasattr(transformers.generation.utils, "_slice_mm_encoder_output")
"""False in older transformers, whose chunked prefill forgets pictures."""
FLEX = "flex_attention"
LAYERS = 6
VOCAB = 96
PAD, IMAGE, VIDEO, VISION_START, VISION_END = 0, 1, 2, 3, 4
FIRST_WORD = 8
SUPPRESS = list(range(FIRST_WORD))
"""Tokens a random model must not emit: a generated image token would ask for pixels."""

LLAVA_GRID = (4, 4)
LLAVA_PATCH = 8
NEXT_GRID = (3, 3)
"""Patches of one crop of LLaVA-NeXT: 24 pixels a side."""
NEXT_PINPOINTS = [[24, 48], [48, 24], [48, 48]]
NEXT_SIZES = ((20, 20), (46, 30))
"""(height, width) in pixels of even and odd pictures of LLaVA-NeXT; both lose padding, so the packing matters.

The square one becomes an overview and 2 crops, 9 + 3 * (4 + 1) = 24 visual tokens (a newline ends each row); the tall
one an overview and 2x2 crops, 9 + 6 * (4 + 1) = 39 visual tokens."""
QWEN_GRIDS = ((4, 4), (4, 6))
"""Merged (rows, columns) of even and odd images of both Qwen families: 16 and 24 visual tokens."""
QWEN_PATCH, QWEN_MERGE, QWEN_TIME = 4, 2, 2


def attentions_of(family: str) -> list[str]:
    """The attention implementations that run here; flash attention needs a GPU."""
    return ["sdpa", "eager", FLEX] if family in FLEX_FAMILIES else ["sdpa", "eager"]


def implementations_of(families: Iterable[str]) -> list[tuple[str, str]]:
    """(family, attention implementation) of each that runs."""
    return [(family, attn) for family in families for attn in attentions_of(family)]


def build(family: str, attn: str = "sdpa", seed: int = 0):
    """A fresh model in evaluation mode (float32); the same seed gives the same weights for every `attn`."""
    if attn == FLEX:
        # Transformers compiles flex attention, for a CPU into C++ that does not compile; plain, it is the same function.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read whenever something is to be compiled
    tiny = TINY[family]
    config = tiny.config()
    config._attn_implementation = attn
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tiny.model(config)
        for name, weight in model.named_parameters():
            norm = "norm" in name.lower() or name.endswith("ln_q.weight")
            deviation = 0.05 if norm else 0.125 if "lm_head" in name else 0.2
            torch.nn.init.normal_(weight, float(norm and name.endswith("weight")), deviation)
    settings = model.generation_config
    settings.eos_token_id = None
    settings.bos_token_id = None
    settings.pad_token_id = PAD
    settings.suppress_tokens = SUPPRESS
    settings.do_sample = False
    return model.float().eval()


@functools.cache
def shared(family: str, attn: str = "sdpa", seed: int = 0):
    """One model per arguments for a whole test run, with Transformers' own permanent capture hooks already installed.

    Wrap it only in a `with` statement.
    """
    model = build(family, attn, seed)
    warm_up(model, family)
    return model


def warm_up(model, family: str) -> None:
    """Let Transformers install the hooks that it adds on first use and never removes."""
    with torch.no_grad():
        inputs = make_inputs(family, model, [["text2", "image", "text2"]])
        # the flags matter: without one, no hook is installed
        model(**inputs, output_hidden_states=True)
        model.generate(**inputs, max_new_tokens=2)


def make_inputs(family: str, model, samples: list[list[str]], seed: int = 0, pad: str = "left", first: int = 0) -> dict:
    """Inputs for `model(**inputs)` and `model.generate(**inputs)`.

    `samples` holds for every row its parts: `"image"` or `"textN"` (N random words).  Sample `i` depends only
    on `seed` and `first + i`: the batch of one `make_inputs(..., samples[i:i + 1], first=i)` has the same tokens
    and pixels as row `i` of the batch (LLaVA-NeXT: besides empty crops behind the picture's own).
    """
    rows, pixels, grids, kind = [], [], [], TINY[family].inputs
    for index, parts in enumerate(samples, start=first):
        random = torch.Generator().manual_seed(1_000_003 * seed + index)
        ids: list[int] = []
        images = 0
        for part in parts:
            if part.startswith("text"):
                words = torch.randint(FIRST_WORD, VOCAB, (int(part.removeprefix("text")),), generator=random)
                ids += words.tolist()
            elif part == "image":
                tokens, values, grid = _image(family, random, index + images)
                images += 1
                ids += tokens
                pixels.append(values)
                grids.append(grid)
            else:
                raise ValueError(f"unknown part {part!r}")
        rows.append(ids)

    length = max(len(ids) for ids in rows)
    input_ids = torch.full((len(rows), length), PAD)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        place = slice(length - len(ids), length) if pad == "left" else slice(0, len(ids))
        input_ids[row, place] = torch.tensor(ids)
        attention_mask[row, place] = 1

    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if pixels:
        inputs["pixel_values"] = _stack_crops(pixels) if kind == "llava_next" else torch.cat(pixels)
    if kind == "llava_next" and pixels:
        inputs["image_sizes"] = torch.tensor(grids)
    if kind == "qwen":
        inputs["mm_token_type_ids"] = (input_ids == IMAGE).long()
        if pixels:
            inputs["image_grid_thw"] = torch.tensor(grids)
    return inputs


def make_single(family: str, model, samples: list[list[str]], row: int, seed: int = 0) -> dict:
    """Row `row` of `make_inputs(family, model, samples, seed)`, alone and without padding."""
    return make_inputs(family, model, samples[row : row + 1], seed, first=row)


def image_lengths(family: str, samples: list[list[str]], first: int = 0) -> list[list[int]]:
    """Per sample, the number of visual tokens of each of its images."""
    return [
        [visual_tokens(family, index + n) for n in range(sum(part == "image" for part in parts))]
        for index, parts in enumerate(samples, start=first)
    ]


def visual_tokens(family: str, number: int) -> int:
    """Visual tokens of image `number`."""
    kind = TINY[family].inputs
    if kind == "llava_next":
        return packed_tokens(NEXT_SIZES[number % 2])
    rows, columns = LLAVA_GRID if kind == "llava" else QWEN_GRIDS[number % 2]
    return rows * columns


def packed_tokens(size: tuple[int, int]) -> int:
    """Visual tokens of a LLaVA-NeXT picture of `size` (height, width): overview, un-padded crops, one newline per row.

    From the functions that the stock model packs with.
    """
    down, across = get_anyres_image_grid_shape(size, NEXT_PINPOINTS, NEXT_GRID[0] * LLAVA_PATCH)
    rows, columns = unpad_image(torch.empty(1, down * NEXT_GRID[0], across * NEXT_GRID[1]), size).shape[1:]
    return NEXT_GRID[0] * NEXT_GRID[1] + rows * (columns + 1)


def _image(family: str, random: torch.Generator, number: int) -> tuple[list[int], torch.Tensor, list[int]]:
    """Of one random image: prompt tokens, pixel values and (time, height, width) grid (LLaVA-NeXT: size in pixels)."""
    tokens, kind = [IMAGE] * visual_tokens(family, number), TINY[family].inputs
    if kind == "llava":
        rows, columns = LLAVA_GRID
        values = torch.randn(1, 3, LLAVA_PATCH * rows, LLAVA_PATCH * columns, generator=random)
        return tokens, values, [1, rows, columns]
    if kind == "llava_next":
        size, side = NEXT_SIZES[number % 2], NEXT_GRID[0] * LLAVA_PATCH
        crops = image_size_to_num_patches(size, NEXT_PINPOINTS, side)
        return tokens, torch.randn(crops, 3, side, side, generator=random), list(size)
    height, width = (side * QWEN_MERGE for side in QWEN_GRIDS[number % 2])
    values = torch.randn(height * width, 3 * QWEN_TIME * QWEN_PATCH**2, generator=random)
    return [VISION_START, *tokens, VISION_END], values, [1, height, width]


def _stack_crops(pictures: list[torch.Tensor]) -> torch.Tensor:
    """[picture, crop, 3, side, side]: pictures with fewer crops end in zeros, as the stock processor pads them."""
    most = max(len(crops) for crops in pictures)
    return torch.stack([torch.cat([crops, crops.new_zeros(most - len(crops), *crops.shape[1:])]) for crops in pictures])


def _clip(grid: tuple[int, int]) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=LLAVA_PATCH * grid[0],
        patch_size=LLAVA_PATCH,
        projection_dim=32,
    )


def _llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )


def _llava_config() -> LlavaConfig:
    return LlavaConfig(
        vision_config=_clip(LLAVA_GRID),
        text_config=_llama(),
        image_token_id=IMAGE,
        image_seq_length=LLAVA_GRID[0] * LLAVA_GRID[1],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_next_config() -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=_clip(NEXT_GRID),
        text_config=_llama(),
        image_token_index=IMAGE,
        image_seq_length=NEXT_GRID[0] * NEXT_GRID[1],
        image_grid_pinpoints=NEXT_PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _qwen_vision() -> dict:
    """What both Qwen towers share, but for the name of their widths."""
    return {
        "depth": 3,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": QWEN_PATCH,
        "spatial_merge_size": QWEN_MERGE,
        "temporal_patch_size": QWEN_TIME,
    }


def _qwen_text() -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }


_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _qwen2_5_vl_config() -> Qwen2_5_VLConfig:
    vision = _qwen_vision() | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "window_size": 3 * QWEN_MERGE * QWEN_PATCH,  # windows of 3x3 merged tokens: none of the grids is a multiple
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(vision_config=vision, text_config=_qwen_text(), **_QWEN_TOKENS)


def _qwen2_vl_config() -> Qwen2VLConfig:
    vision = _qwen_vision() | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}  # hidden_size: the language model's
    return Qwen2VLConfig(vision_config=vision, text_config=_qwen_text(), **_QWEN_TOKENS)


@dataclass(frozen=True)
class Tiny:
    """One family's tiny model.

    Attributes:
        model: its Transformers class.
        config: makes its configuration.
        inputs: whose inputs it takes: "llava" (one grid per picture), "llava_next" (crops) or "qwen" (patches in one sequence).
        flex: its Transformers class runs flex attention.
    """

    model: type
    config: Callable[[], Any]
    inputs: Literal["llava", "llava_next", "qwen"]
    flex: bool = False


TINY = {
    "llava": Tiny(LlavaForConditionalGeneration, _llava_config, "llava", flex=True),
    "qwen2_5_vl": Tiny(Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl_config, "qwen"),
    "llava_next": Tiny(LlavaNextForConditionalGeneration, _llava_next_config, "llava_next", flex=True),
    "qwen2_vl": Tiny(Qwen2VLForConditionalGeneration, _qwen2_vl_config, "qwen"),
}
"""One entry for each family."""
ALL_FAMILIES = tuple(TINY)
FLEX_FAMILIES = tuple(family for family, tiny in TINY.items() if tiny.flex)
"""The families whose Transformers classes run flex attention."""
