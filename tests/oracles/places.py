"""Where things are in a stock model and in a prompt, found without vlmprune."""

from __future__ import annotations

import torch
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches


def decoder_layers(model) -> torch.nn.ModuleList:
    return model.model.language_model.layers


def prompt_positions(model, inputs: dict) -> torch.Tensor:
    """The position ids that `generate` would start with: [batch, sequence], or [4, batch, sequence] with M-RoPE."""
    ids = inputs["input_ids"]
    known = {name: value for name, value in inputs.items() if name not in ("input_ids", "pixel_values")}
    known.setdefault("attention_mask", torch.ones_like(ids))
    deltas = getattr(model.model, "rope_deltas", None)
    positions = model._prepare_position_ids_for_generation(ids, known)
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = deltas
    return positions


def image_columns(model, ids: torch.Tensor) -> torch.Tensor:
    return ids == model.config.image_token_id


def separators(model, inputs: dict) -> list[torch.Tensor]:
    """Per LLaVA-NeXT picture of the batch, [tokens] bool: the row separators among its tokens.

    The stock packing, told to pack ones with zeros between the rows.
    """
    vision, packed = model.config.vision_config, []
    for size in inputs["image_sizes"].tolist():
        crops = image_size_to_num_patches(size, model.config.image_grid_pinpoints, vision.image_size)
        ones = torch.ones(crops, (vision.image_size // vision.patch_size) ** 2, 1)
        (values,), _ = model.model.pack_image_features([ones], torch.tensor([size]), "default", torch.zeros(1))
        packed.append(values[:, 0] == 0)
    return packed


def columns_of_image(model, inputs: dict, row: int, ordinal: int) -> torch.Tensor:
    """Columns of the n-th image of a row, LLaVA-NeXT's row separators among them."""
    number, lengths = _place_of_image(model, inputs, row, ordinal)
    columns = image_columns(model, inputs["input_ids"])[row].nonzero()[:, 0]
    start = sum(lengths[number - ordinal : number])
    return columns[start : start + lengths[number]]


def visual_columns(model, inputs: dict, row: int, ordinal: int) -> torch.Tensor:
    """The same without row separators: the tokens that a budget counts."""
    columns = columns_of_image(model, inputs, row, ordinal)
    if "image_sizes" not in inputs:
        return columns
    return columns[~separators(model, inputs)[_place_of_image(model, inputs, row, ordinal)[0]]]


def _place_of_image(model, inputs: dict, row: int, ordinal: int) -> tuple[int, list[int]]:
    """An image's number in the batch, and the tokens of every image of the batch."""
    image = image_columns(model, inputs["input_ids"])
    if "image_grid_thw" in inputs:
        lengths = (inputs["image_grid_thw"].prod(1) // model.config.vision_config.spatial_merge_size**2).tolist()
    elif "image_sizes" in inputs:
        lengths = [len(packed) for packed in separators(model, inputs)]
    else:
        lengths = [model.config.image_seq_length] * (int(image.sum()) // model.config.image_seq_length)
    before, number = int(image[:row].sum()), 0
    while before > 0:
        before -= lengths[number]
        number += 1
    return number + ordinal, lengths
