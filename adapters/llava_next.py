"""LLaVA-NeXT (`model_type: llava_next`): a base view and crops of each picture, packed into one raster without the padding,
with a learned row separator after each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters.family import Family
from vlmprune.adapters.llava import CLIP
from vlmprune.errors import UsageError
from vlmprune.view import TowerFacts


def best_resolution(size: Sequence[int], resolutions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The canvas (height, width) that keeps most pixels of the picture; of several, the one with least padding."""
    height, width = size

    def merit(canvas: Sequence[int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - canvas[0] * canvas[1]

    best = max(resolutions, key=merit)
    return best[0], best[1]


def unpadded(size: Sequence[int], rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a raster that are left when the padding of a picture (height, width) is removed."""
    height, width = size
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return rows - 2 * padding, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return rows, columns - 2 * padding


def _tokens(size: Sequence[int], config: Any) -> int:
    """Base view, crops and row separators of one picture (height, width)."""
    view = config.vision_config.image_size
    side = view // config.vision_config.patch_size
    height, width = best_resolution(size, config.image_grid_pinpoints)
    rows, columns = unpadded(size, height // view * side, width // view * side)
    return side * side + rows * (columns + 1)


def _tokens_per_image(call: Mapping[str, Any], config: Any) -> list[int] | None:
    if call.get("pixel_values") is None or call.get("image_sizes") is None:
        return None
    sizes = call["image_sizes"]
    return [_tokens(size, config) for size in (sizes.tolist() if hasattr(sizes, "tolist") else sizes)]


def _image_grid(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]]:
    raise UsageError("the tokens of a picture are not one grid in LLaVA-NeXT: it is packed from a base view and crops.")


def _crops(inputs: Mapping[str, Any], config: Any) -> list[list[list[Tensor]]]:
    """The base view, then the crops; padding of crops becomes no token."""
    view = config.vision_config.image_size
    side = view // config.vision_config.patch_size
    pictures = []
    for size in inputs["image_sizes"].tolist():
        high, wide = (length // view for length in best_resolution(size, config.image_grid_pinpoints))
        rows, columns = unpadded(size, high * side, wide * side)
        raster = torch.full((high * side, wide * side), -1)
        top, left = (high * side - rows) // 2, (wide * side - columns) // 2
        raster[top : top + rows, left : left + columns] = side**2 + torch.arange(rows * columns).view(rows, columns)
        crops = raster.view(high, side, wide, side).transpose(1, 2)  # [crop row, crop column, row, column]
        pictures.append([[torch.arange(side**2).view(side, side)], *map(list, crops)])
    return pictures


LLAVA_NEXT = Family(
    name="llava_next",
    image_token=lambda config: config.image_token_id,
    tokens_per_image=_tokens_per_image,
    image_grid=_image_grid,
    crops=_crops,
    facts=TowerFacts(cls=True, crops=True),
    tower=CLIP,
    newline="image_newline",
)
