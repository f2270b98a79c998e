"""What families have in common that cut a picture into crops of one size: how the crops of a prompt make pictures.

A crop's tokens stand together in the prompt, and ids between two crops say whether both are of one picture
(`Family.joins`). A budget is the picture's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmprune.device import on_host

Joins = Callable[[Sequence[int]], bool]


def without_gap(between: Sequence[int]) -> bool:
    """Crops of one picture follow each other, with nothing between them."""
    return not len(between)


def crops_of_pictures(ids: Tensor, image_token: int, tokens: int, joins: Joins) -> Iterator[list[list[int]]]:
    """Per picture of a prompt, in its order, the ids before each of its crops; of the first, none.

    Args:
        ids: `[batch, sequence]`.
        image_token: id of the placeholder.
        tokens: of a crop.
        joins: as `Family.joins`.
    """
    for row in on_host(ids).tolist():
        places = [place for place, token in enumerate(row) if token == image_token]
        starts = places[::tokens]
        picture: list[list[int]] = []
        for number, start in enumerate(starts):
            between = row[places[number * tokens - 1] + 1 : start] if number else []
            if number and joins(between):
                picture.append(between)
            else:
                if picture:
                    yield picture
                picture = [[]]
        if picture:
            yield picture


def in_one_row(ids: Tensor, image_token: int, side: int, joins: Joins, overview: int) -> list[list[list[Tensor]]]:
    """The crops of every picture as `Family.crops` wants them, where the processor does not say how they are arranged: in one
    row, and the whole picture, crop number `overview` (0 or −1), in a row of its own.

    Args:
        ids, image_token, joins: as in `crops_of_pictures`.
        side: tokens on a side of a crop.
        overview: as `Family.overview`.
    """
    pictures = []
    for picture in crops_of_pictures(ids, image_token, side * side, joins):
        crops = rasters(len(picture), side)
        whole = [crops.pop(overview)]
        rows = [whole, crops] if overview == 0 else [crops, whole]
        pictures.append([row for row in rows if row])
    return pictures


def in_rows(
    ids: Tensor, image_token: int, side: int, joins: Joins, beside: Callable[[list[int]], bool]
) -> list[list[list[Tensor]]]:
    """The same where the ids between two crops say whether the second stands `beside` the first, or begins a row."""
    pictures = []
    for picture in crops_of_pictures(ids, image_token, side * side, joins):
        rows: list[list[Tensor]] = []
        for between, crop in zip(picture, rasters(len(picture), side), strict=True):
            if beside(between):
                rows[-1].append(crop)
            else:
                rows.append([crop])
        pictures.append(rows)
    return pictures


def rasters(crops: int, side: int) -> list[Tensor]:
    """Of each of a picture's crops, `[side, side]` indices of its tokens."""
    return list(torch.arange(crops * side * side).view(crops, side, side))


def side_of(config: Any, merged: int) -> int:
    """Tokens on a side of a crop, where squares of `merged` × `merged` patches become one."""
    size, patch = (value[0] if isinstance(value, list | tuple) else value for value in (config.image_size, config.patch_size))
    return int(size // patch // merged)
