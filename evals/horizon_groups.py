"""Windows of visual tokens, and a pruning method that keeps another one in every row of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vlmprune
from vlmprune.adapters.registry import family_of
from vlmprune.view import View

Group = tuple[int, Tensor]
"""The number of an image in its prompt, and indices of some of its tokens."""


@dataclass(frozen=True, kw_only=True)
class Only(vlmprune.Pruner):
    """Keeps one group of visual tokens in each row of a batch that repeats one prompt; nothing where the group is None.

    Args:
        rows: per row, what is kept.
        visual: tokens of each image of the prompt.
    """

    name = "only"
    paper = "arXiv:2512.07580"
    needs = frozenset()
    default = vlmprune.at(layer=0, fraction=1.0)

    rows: tuple[Group | None, ...] = field(default=(), repr=False)
    visual: tuple[int, ...] = ()

    @property
    def adaptive(self) -> bool:
        """The groups decide how much is kept, and not the budget."""
        return True

    @property
    def keeps_newlines(self) -> bool:
        """Row separators are dropped with the tokens: in earlier layers they attended to the image."""
        return False

    def select(self, see: View, keep: int) -> vlmprune.Choice:
        """The group of each row."""
        device = see.position.device
        nothing = torch.empty(0, dtype=torch.long, device=device)
        # A view holds images of one size, in the order of rows and then of images.
        seen = [number for number, size in enumerate(self.visual) if size == see.original]
        return vlmprune.Choice(
            [
                group[1].to(device) if group is not None and group[0] == number else nothing
                for group in self.rows
                for number in seen
            ]
        )


def windows(rows: int, columns: int, side: int) -> list[Tensor]:
    """Cells of square windows that cover a raster. The last ones are smaller where `side` does not divide it."""
    raster = torch.arange(rows * columns).view(rows, columns)
    return [
        raster[top : top + side, left : left + side].flatten()
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]


def groups(config: Any, inputs: Mapping[str, Any], visual: Sequence[int], side: int) -> list[Group]:
    """The windows of all images of a prompt; in an image of several crops, each window lies in one crop.

    Args:
        config: the model's.
        inputs: the processor's output.
        visual: tokens of each image.
        side: tokens on a side of a window.

    Raises:
        vlmprune.UsageError: an image's tokens form no raster, and windows of more than one token were asked for.
    """
    if side == 1:
        return [(number, index) for number, size in enumerate(visual) for index in torch.arange(size).split(1)]
    images = [[crop for row in rows for crop in row] for rows in family_of(config).cells(inputs, config)]
    if [sum(int((crop >= 0).sum()) for crop in crops) for crops in images] != list(visual):
        raise vlmprune.UsageError(
            f"the tokens of a picture (here {visual[0]}) are no grids in this model, so there are no windows: take single "
            "tokens, window=1 (on the command line --window 1)."
        )
    found = [
        (number, tokens[tokens >= 0])  # padding is no token
        for number, crops in enumerate(images)
        for crop in crops
        for tokens in (crop.flatten()[cells] for cells in windows(crop.shape[0], crop.shape[1], side))
    ]
    return [(number, tokens) for number, tokens in found if len(tokens)]
