"""A model family, as data. Families know no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.view import TowerFacts

NO_TOWER = TowerFacts()


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
    """

    blocks: str
    attention: str
    projector: str
    feature_block: Callable[[Any], int]
    full_attention_blocks: Callable[[Any], Sequence[int]]
    refusal: Callable[[nn.Module], str | None] = lambda base: None

    @property
    def root(self) -> str:
        """Path of the whole tower, from the base model."""
        return self.blocks.partition(".")[0]


def has_mrope(text_config: Any) -> bool:
    """Whether rotary positions are cells of the picture (M-RoPE), not a count of tokens."""
    return "mrope_section" in (getattr(text_config, "rope_parameters", None) or {})


@dataclass(frozen=True)
class Family:
    """Where the parts of a model are in one model family.

    Attributes:
        name: `config.model_type`.
        image_token: id of the image placeholder, from the config.
        tokens_per_image: visual tokens of each picture, from the arguments of a call with pixels.
        image_grid: rows and columns of each picture's tokens, from the processor's output and the config (for drawing).
        crops: the same if a picture is more than one grid of its tokens, see `cells`; None if it is one.
        language_model, layers, attention: module names, from the base model, the language model and a decoder layer.
        rotary, final_norm: names of the rotary embedding and of the last norm, from the language model. These and the names
            above are the usual ones; `vlmprune/live/decoder.py` looks up those of a given model.
        facts: traits of its vision tower that methods may ask for.
        tower: the vision tower.
        newline: name of the parameter that separates the rows of a packed picture, from the base model.
        as_built: returns the family with the entries of one base model, if checkpoints differ in them.
    """

    name: str
    image_token: Callable[[Any], int]
    tokens_per_image: Callable[[Mapping[str, Any], Any], list[int] | None]
    image_grid: Callable[[Mapping[str, Any], Any], list[tuple[int, int]]]
    crops: Callable[[Mapping[str, Any], Any], list[list[list[Tensor]]]] | None = None
    language_model: str = "language_model"
    layers: str = "layers"
    attention: str = "self_attn"
    rotary: str = "rotary_emb"
    final_norm: str = "norm"
    facts: TowerFacts = NO_TOWER
    tower: Tower | None = None
    newline: str | None = None
    as_built: Callable[[Family, nn.Module], Family] = lambda family, base: family

    def cells(self, inputs: Mapping[str, Any], config: Any) -> list[list[list[Tensor]]]:
        """Per picture, rows of its crops; per crop, `[rows, columns]` the index of the token that each cell became, −1 if the
        cell is padding."""
        if self.crops is not None:
            return self.crops(inputs, config)
        return [[[torch.arange(rows * columns).view(rows, columns)]] for rows, columns in self.image_grid(inputs, config)]
