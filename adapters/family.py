"""What a model family looks like, as data. Families know no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Tower:
    """A vision tower that has a CLS token.

    Attributes:
        blocks: path of the list of blocks, from the base model.
        attention: name of a block's attention module.
        projector: path of the module whose output enters the language model, from the base model.
        feature_block: index of the block whose output feeds the projector.
        refusal: why this model's CLS attention cannot be used, or None.
    """

    blocks: str
    attention: str
    projector: str
    feature_block: Callable[[Any], int]
    refusal: Callable[[nn.Module], str | None]


@dataclass(frozen=True)
class Family:
    """Where things are in one model family.

    Attributes:
        name: `config.model_type`.
        image_token: id of the image placeholder, from the config.
        tokens_per_image: visual tokens of each picture, from the arguments of a call that carries pixels.
        image_grid: rows and columns of each picture's tokens, from the processor's output and the config (for drawing).
        language_model, layers, attention: module names, from the base model, the language model and a decoder layer.
        tower: the vision tower, where it has a CLS token.
    """

    name: str
    image_token: Callable[[Any], int]
    tokens_per_image: Callable[[Mapping[str, Any], Any], list[int] | None]
    image_grid: Callable[[Mapping[str, Any], Any], list[tuple[int, int]]]
    language_model: str = "language_model"
    layers: str = "layers"
    attention: str = "self_attn"
    tower: Tower | None = None
