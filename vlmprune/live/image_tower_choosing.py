"""What a stage in an image tower keeps: its method is shown the pictures that have equally many patches left, together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmprune.device import on_device, on_host
from vlmprune.errors import UsageError
from vlmprune.live.choosing import BoundStage, check_choice
from vlmprune.live.pixels import cut_out, identities_of
from vlmprune.methods import Choice
from vlmprune.methods.tower import TowerState
from vlmprune.view import View, known_probes

OF_STAGE = frozenset({"features", "tower_features", "cell", "identity", "project", "pixels"})
"""Probes of what enters the block of a stage, or of the pictures."""
OF_BLOCK_BEFORE = frozenset({"attention_from_cls", "tower_keys", "keys", "values"})
"""Probes of the attention of the block before a stage."""
OF_EARLIER = frozenset({"attention_from_cls_first", "attention_from_cls_early"})
"""Probes of the attention of a block that the probe names."""


class Pictures:
    """The pictures of one pass, as the tower was given them.

    Args:
        pixels: `[picture, channel, row, column]`.
        grid: rows and columns of patches.
        patch: height and width of a patch; None where patches are not squares of pixels side by side.
    """

    def __init__(self, pixels: Tensor, grid: tuple[int, int], patch: tuple[int, int] | None) -> None:
        self._pixels, self.grid, self._patch = pixels, grid, patch

    @cached_property
    def identities(self) -> list[int]:
        """A number for each picture, equal for equal pixels, whatever the batch."""
        return on_host(identities_of(self._pixels.detach().transpose(1, 2).flatten(2))).tolist()

    @cached_property
    def patches(self) -> Tensor:
        """`[picture, patch, value]` the pixels of each patch."""
        assert self._patch is not None  # the plan refuses other towers
        return cut_out(self._pixels.detach(), self._patch, self._patch)[1]


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a stage keeps.

    Attributes:
        stays: `[picture, patch]` bool.
        patches: `[picture, patch, dim]` with merged patches in the places of those that stand for several.
        counts: how many are kept of each picture.
        merges: some patches are merged ones.
    """

    stays: Tensor
    patches: Tensor
    counts: list[int]
    merges: bool


def choose(bound: BoundStage, keep: int, patches: Tensor, state: TowerState, pictures: Pictures) -> Chosen:
    """What one stage keeps of `keep` patches of each picture.

    Args:
        patches: `[picture, patch, dim]` what enters the block.
        state: which patches these are, and what was seen of them.
    """
    stays = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
    counts, merges = [0] * len(patches), False
    for group, left in _groups(state):
        wanted, start = min(keep, left), patches.shape[1] - left
        if wanted == left and not bound.adaptive:
            stays[group, start:] = True
            counts = _noted(counts, group, [left] * len(group))
            continue
        see = _view(bound, group, start, patches, state, pictures)
        chosen = bound.method.select(see, wanted)
        choice = chosen if isinstance(chosen, Choice) else Choice(chosen)
        check_choice(bound.method, choice, see.images, left, wanted, patches.shape[-1])
        merges |= choice.features is not None
        # a batch of them in one go, where all pictures keep equally many
        rows = [choice.index] if isinstance(choice.index, Tensor) else [index[None] for index in choice.index]
        pieces = [group] if len(rows) == 1 and len(rows[0]) == len(group) else [[picture] for picture in group]
        for number, (piece, index) in enumerate(zip(pieces, rows, strict=True)):
            places = start + index.to(patches.device)
            at = on_device(np.array(piece), patches.device)[:, None].expand_as(places)
            stays[at, places] = True
            if choice.features is not None:
                merged = choice.features if len(piece) == len(group) else choice.features[number, None, : index.shape[1]]
                patches = patches.index_put((at, places), merged.to(patches.dtype))
            counts = _noted(counts, piece, [index.shape[1]] * len(piece))
    return Chosen(stays, patches, counts, merges)


def _groups(state: TowerState) -> Iterator[tuple[list[int], int]]:
    """Pictures with equally many patches left, by number, and how many these are. The patches are at the end of each row."""
    if state.valid is None:
        yield list(range(len(state.cells))), state.cells.shape[1]
        return
    counts = on_host(state.valid.sum(dim=1))
    for count in np.unique(counts).tolist():
        yield (counts == count).nonzero()[0].tolist(), count


def _noted(counts: list[int], group: list[int], of_group: list[int]) -> list[int]:
    found = dict(zip(group, of_group, strict=True))
    return [found.get(picture, count) for picture, count in enumerate(counts)]


def _view(bound: BoundStage, group: list[int], start: int, patches: Tensor, state: TowerState, pictures: Pictures) -> View:
    """What a method sees of some pictures with equally many patches left."""
    rows, columns = pictures.grid
    if "cell" in bound.needs and rows != columns:
        raise UsageError(
            f"{bound.method.name} looks at places in a square raster of patches, but this tower has {rows} × {columns}: choose "
            "another method."
        )
    own: Any = slice(None) if len(group) == len(patches) else on_device(np.array(group), patches.device)
    cells = state.cells[own, start:]
    probes: dict[str, Any] = {}
    for name in bound.needs:
        if name in ("features", "tower_features"):
            probes[name] = patches[own, start:]
        elif name == "cell":
            probes[name] = cells
        elif name == "identity":
            probes[name] = tuple(pictures.identities[picture] for picture in group)
        elif name == "project":  # between blocks, features of the tower are what goes on
            probes[name] = _same
        elif name == "pixels":
            probes[name] = pictures.patches[own].gather(1, cells[..., None].expand(-1, -1, pictures.patches.shape[-1]))
        else:
            carried = state.carried[name][own, start:]
            by_head = known_probes()[name].shape.startswith(("[image, head", "[image, kv_head"))
            probes[name] = carried.transpose(1, 2) if by_head else carried
    original = rows * columns
    grid = pictures.grid if bound.stage.site == "pixels" else None
    return View(bound.stage.layer, original, cells, probes, original, side=columns, grid=grid)


def _same(features: Tensor) -> Tensor:
    return features
