"""A vision tower of a model family, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Patches:
    """How pictures enter a vision tower, where patches can be dropped behind its patch embedding.

    Attributes:
        embedding: path of the convolution that embeds patches, from the base model.
        grid: name of the tower's argument with frames, rows and columns of the patches of every picture, where the tower takes
            `[patch, value]`, the patches of all pictures one after the other; None where it takes `[crop, channel, height,
            width]`. Both are its first argument.
        before: number of tokens before the patches of a crop (CLS, registers), from the base model.
        order: in which order a picture's tokens run through the blocks, `[token]` indices, from the config and the rows and
            columns of tokens; None if row by row.
        early: path of a list of modules through which features leave the tower before its end (DeepStack), from the base model.
        refusal: why a given model's visual tokens are not those of its patches, or None.
    """

    embedding: str
    grid: str | None = None
    before: Callable[[nn.Module], int] = lambda base: 0
    order: Callable[[Any, int, int], Tensor] | None = None
    early: str | None = None
    refusal: Callable[[nn.Module], str | None] = lambda base: None


@dataclass(frozen=True)
class Tower:
    """A vision tower that methods may watch.

    Attributes:
        blocks: path of the list of blocks, from the base model.
        attention: name of a block's attention module.
        projector: path of the module whose output enters the language model, from the base model.
        feature_block: index of the block whose output feeds the projector.
        full_attention_blocks: numbers of the blocks whose attention is not limited to windows of the picture.
        refusal: why the CLS attention of a given model cannot be used, or None.
        patches: how pictures enter it; None where patches cannot be dropped before its first block.
    """

    blocks: str
    attention: str
    projector: str
    feature_block: Callable[[Any], int]
    full_attention_blocks: Callable[[Any], Sequence[int]]
    refusal: Callable[[nn.Module], str | None] = lambda base: None
    patches: Patches | None = None

    @property
    def root(self) -> str:
        """Path of the whole tower, from the base model."""
        return self.blocks.partition(".")[0]
