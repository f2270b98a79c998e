"""Inputs with pictures of which something can be dropped: the tiny families' own, with patches that repeat a neighbour's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from families import configs
from families.table import TINY, make_inputs
from PIL import Image
from torch import Tensor

PATCH, MERGE, TIME = configs.PATCH, configs.MERGE, configs.TIME


def packed_of(image: Image.Image, patch: int = PATCH, merge: int = MERGE, time: int = TIME) -> tuple[Tensor, Tensor]:
    """What a processor of Qwen-VL's makes of a picture whose sides are whole squares of patches, without resizing it: patches
    `[patch, value]`, squares of `merge` × `merge` one after the other, and the grid."""
    values = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    channels, height, width = values.shape
    rows, columns = height // patch, width // patch
    tiles = values.view(channels, rows // merge, merge, patch, columns // merge, merge, patch)
    tiles = tiles.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :].expand(-1, -1, -1, -1, -1, time, -1, -1)
    return tiles.reshape(rows * columns, -1), torch.tensor([[1, rows, columns]])


def repetitive(name: str, samples: list[list[str]], seed: int = 0, first: int = 0) -> dict[str, Any]:
    """`make_inputs`, with tokens whose patches repeat those of the token to the left or above, in every picture other ones."""
    inputs = make_inputs(name, samples, seed, first)
    pixels = inputs["pixel_values"].clone()
    grids = inputs.get("image_grid_thw")
    unit, start = MERGE**2, 0
    if grids is None:
        flat = pixels.view(-1, *pixels.shape[-3:])
        side = flat.shape[-1] // PATCH
        for crop in flat:
            tokens = crop.view(3, side, PATCH, side, PATCH).permute(1, 3, 0, 2, 4)  # a view of the crop
            _repeat(tokens, int(crop[0, 0, 0] * 1e4) % 7)
        return {**inputs, "pixel_values": pixels}
    for _, height, width in grids.tolist():
        picture = pixels[start : start + height * width]
        tokens = picture.view(height // MERGE, width // MERGE, unit, -1)
        _repeat(tokens, int(picture[0, 0] * 1e4) % 7)
        start += height * width
    return {**inputs, "pixel_values": pixels}


def _repeat(tokens: Tensor, seed: int) -> None:
    """Copy every third or so of `[row, column, …]` from a neighbour, in place."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = tokens.shape[:2]
    for row in range(rows):
        for column in range(columns):
            chance = float(torch.rand(1, generator=draw))
            if chance < 0.3 and column:
                tokens[row, column] = tokens[row, column - 1]
            elif chance > 0.7 and row:
                tokens[row, column] = tokens[row - 1, column]


def tokens_of(inputs: dict[str, Any]) -> Iterator[tuple[int, int, Tensor]]:
    """Of every picture, its rows and columns of tokens, and their pixels `[token, value]`."""
    pixels, grids = inputs["pixel_values"], inputs.get("image_grid_thw")
    if grids is None:
        for crop in pixels:
            side = crop.shape[-1] // PATCH
            yield side, side, crop.view(3, side, PATCH, side, PATCH).permute(1, 3, 0, 2, 4).reshape(side * side, -1)
        return
    start = 0
    for _, height, width in grids.tolist():
        yield height // MERGE, width // MERGE, pixels[start : start + height * width].reshape(-1, MERGE**2 * pixels.shape[1])
        start += height * width


def crops_of(inputs: dict[str, Any]) -> int:
    """Crops that enter a tower of pictures of one size."""
    return inputs["pixel_values"].view(-1, *inputs["pixel_values"].shape[-3:]).shape[0]


RAGGED = [["text3", "image", "text6"], ["text2", "image", "text3", "image", "text4"], ["image", "text5"]]
NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "llava")
assert set(NAMES) <= set(TINY)
