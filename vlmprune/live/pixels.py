"""Before the vision tower: a method chooses, by the pixels of patches, which tokens of every picture enter the first block.

Patches are dropped behind the patch embedding, which computes every patch by itself, and behind the embeddings of positions:
what is left keeps its true place (`live/tower_sequence.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.family import Family
from vlmprune.device import on_host
from vlmprune.errors import UsageError
from vlmprune.live.choosing import BoundStage, check_choice
from vlmprune.live.feature_index import multipliers
from vlmprune.methods import Choice
from vlmprune.schedule import Budget
from vlmprune.view import TowerFacts, View


@dataclass(frozen=True, eq=False)
class Alike:
    """Pictures, or crops, of one size that enter the tower.

    Attributes:
        numbers: which they are, in the order in which they enter.
        grid: rows and columns of their tokens.
        pixels: `[image, token, value]`.
    """

    numbers: list[int]
    grid: tuple[int, int]
    pixels: Tensor


def check_pixels(family: Family, base: nn.Module, bound: BoundStage) -> None:
    """Whether patches can be dropped before the tower of a model.

    Raises:
        UsageError: it is not known how pictures enter it, visual tokens are not those of its patches, or patches overlap.
    """
    name = bound.method.name
    patches = None if family.tower is None else family.tower.patches
    if patches is None:
        raise UsageError(
            f"{name} drops patches before the vision tower, but how patches enter that of {family.name} is not known to this "
            "library: choose a method that prunes in the language model."
        )
    if (why := patches.refusal(base)) is not None:
        raise UsageError(
            f"{name} drops patches before the vision tower, and needs a visual token for each patch, but {why}: choose a "
            "method that prunes in the language model."
        )
    embedding = base.get_submodule(patches.embedding)
    kernel, stride, padding = (_spatial(embedding, what) for what in ("kernel_size", "stride", "padding"))
    if kernel is None or stride is None or padding is None:
        raise UsageError(
            f"{name} drops patches before the vision tower, whose patch embedding must be a convolution, found "
            f"{type(embedding).__name__}: choose a method that prunes in the language model."
        )
    if any(size > step for size, step in zip(kernel, stride, strict=True)) or any(padding):
        raise UsageError(
            f"{name} drops patches before the vision tower, but the patches of this one overlap: its patch embedding has a "
            f"kernel of {_times(kernel)}, a stride of {_times(stride)} and a padding of {_times(padding)}, so that a pixel is "
            "in several patches; choose a method that prunes in the language model."
        )


def _spatial(embedding: nn.Module, what: str) -> tuple[int, int] | None:
    """Height and width of a setting of a convolution."""
    found: Any = getattr(embedding, what, None)
    if found == "valid":
        return 0, 0
    if not isinstance(found, tuple | list) or len(found) < 2:
        return None
    return int(found[-2]), int(found[-1])


def _times(sizes: tuple[int, int]) -> str:
    return "×".join(map(str, sizes))


# -- what enters -------------------------------------------------------------------------------------------------------------


def patches_of_crops(pixels: Tensor, embedding: nn.Module) -> list[Alike]:
    """The patches of crops of one size, row by row.

    Args:
        pixels: `[crop, channel, height, width]`.
        embedding: the convolution that embeds patches.
    """
    kernel, stride = _spatial(embedding, "kernel_size"), _spatial(embedding, "stride")
    assert kernel is not None
    assert stride is not None
    grid, values = cut_out(pixels, kernel, stride)
    return [Alike(list(range(len(pixels))), grid, values)]


def cut_out(pixels: Tensor, size: tuple[int, int], step: tuple[int, int]) -> tuple[tuple[int, int], Tensor]:
    """Rows and columns of the patches of pictures `[picture, channel, height, width]`, and `[picture, patch, value]` the pixels
    of each. `size`: of a patch, `step`: from one to the next."""
    cut = pixels.unfold(2, size[0], step[0]).unfold(3, size[1], step[1])  # [picture, channel, row, column, y, x]
    rows, columns = cut.shape[2:4]
    return (rows, columns), cut.permute(0, 2, 3, 1, 4, 5).reshape(len(pixels), rows * columns, -1)


def patches_of_list(pixels: Tensor, grids: list[list[int]], unit: int, method: str) -> list[Alike]:
    """The patches of pictures that follow each other in one list, by the size of the pictures.

    Args:
        pixels: `[patch, value]`.
        grids: per picture, its frames, and rows and columns of patches.
        unit: patches that become one token, which follow each other.
        method: name of the method that asks.

    Raises:
        UsageError: one of them is a video.
    """
    groups: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    side, start = isqrt(unit), 0
    for number, (frames, height, width) in enumerate(grids):
        if frames > 1:
            raise UsageError(
                f"{method} drops patches before the vision tower, which is followed for pictures only, found a video of "
                f"{frames} frames: pass the frames as pictures, or choose a method that prunes in the language model."
            )
        mine = pixels[start : start + height * width].unflatten(0, (-1, unit)).flatten(1)
        groups.setdefault((height // side, width // side), []).append((number, mine))
        start += height * width
    return [
        Alike([number for number, _ in found], grid, torch.stack([mine for _, mine in found])) for grid, found in groups.items()
    ]


# -- what stays --------------------------------------------------------------------------------------------------------------


def choose_tokens(bound: BoundStage, budget: Budget, facts: TowerFacts, entering: list[Alike]) -> list[Tensor | None]:
    """Which tokens of every picture stay: `[kept]` indices, rising; None where all do.

    Raises:
        UsageError: the method chose what it was not asked for, or nothing of a picture.
    """
    chosen: dict[int, Tensor | None] = {}
    for alike in entering:
        images, tokens = alike.pixels.shape[:2]
        keep = budget.resolve(tokens)
        if keep == tokens and not bound.adaptive:
            chosen |= dict.fromkeys(alike.numbers)
            continue
        found = bound.method.select(_view(bound, facts, alike), keep)
        choice = found if isinstance(found, Choice) else Choice(found)
        check_choice(bound.method, choice, images, tokens, keep, None)
        for number, index in zip(alike.numbers, choice.index, strict=True):
            if not len(index):
                raise UsageError(f"{bound.method.name}.select kept nothing of a picture, of which the tower needs one patch.")
            chosen[number] = None if len(index) == tokens else index.to(alike.pixels.device)
    return [chosen[number] for number in sorted(chosen)]


def _view(bound: BoundStage, facts: TowerFacts, alike: Alike) -> View:
    images, tokens = alike.pixels.shape[:2]
    position = torch.arange(tokens, device=alike.pixels.device).expand(images, tokens)
    needs, probes = bound.method.needs_at(bound.stage), dict[str, Any]()
    if "pixels" in needs:
        probes["pixels"] = alike.pixels
    if "cell" in needs:
        probes["cell"] = position
    if "identity" in needs:
        probes["identity"] = tuple(on_host(identities_of(alike.pixels)).tolist())
    side = alike.grid[0] if facts.crops and len(set(alike.grid)) == 1 else 0
    return View(0, tokens, position, probes, entered=tokens, side=side, grid=alike.grid)


def identities_of(pixels: Tensor) -> Tensor:
    """`[image]` int64 of `[image, row, value]`, equal for equal pictures: sums of whole numbers, in whatever order."""
    bits = pixels.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[pixels.element_size()])
    tokens = bits.sum(dim=2, dtype=torch.int64)
    return (tokens * multipliers(tokens.shape[1], tokens.device)).sum(dim=1)
