"""A model family, as data. Families know no method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.videos import Videos
from vlmprune.adapters.vision_tower import Tower
from vlmprune.view import TowerFacts

NO_TOWER = TowerFacts()


def has_mrope(text_config: Any) -> bool:
    """Whether rotary positions are cells of the picture (M-RoPE), not a count of tokens."""
    return "mrope_section" in (getattr(text_config, "rope_parameters", None) or {})


@dataclass(frozen=True)
class Injected:
    """What a language model adds to its visual tokens between decoder layers (DeepStack, arXiv:2406.04334): after layer i, the
    i-th entry. Both are keyword arguments of the language model.

    Attributes:
        places: name of the argument that says which places are visual, `[batch, sequence]` bool.
        features: name of the argument with one entry per layer, `[visual, dim]` each, in the order of these places.
    """

    places: str
    features: str


@dataclass(frozen=True)
class Family:
    """Where the parts of a model are in one model family.

    Attributes:
        name: `config.model_type`.
        image_token: id of the image placeholder, from the config.
        tokens_per_image: visual tokens of each picture, or of each of its crops, from the arguments of a call with pixels.
        entries: the same, from the sizes of the entries of what `get_image_features` returns, where an entry is neither.
        joins: whether two crops are of one picture, from the ids between them; None if every entry is a picture of its own.
        image_grid: rows and columns of each picture's tokens, from the processor's output and the config (for drawing); None if
            `crops` is given.
        crops: the same if a picture is more than one grid of its tokens, see `cells`; None if it is one.
        overview: which row of `cells` shows the whole picture: the first (0) or the last (−1).
        language_model, layers, attention: module names, from the base model, the language model and a decoder layer.
        rotary, final_norm: names of the rotary embedding and of the last norm, from the language model. These and the names
            above are the usual ones; `vlmprune/live/decoder.py` looks up those of a given model.
        facts: traits of its vision tower that methods may ask for.
        tower: the vision tower.
        injected: what the language model adds to visual tokens between its layers.
        videos: what it does with videos; None if they are not supported.
        whole_prompt: all tokens of a prompt see each other, its question's too.
        newline: name of the parameter that separates the rows of a packed picture, from the base model.
        reads: the probes that methods may look at; None for all.
        as_built: returns the family with the entries of one base model, if checkpoints differ in them.
    """

    name: str
    image_token: Callable[[Any], int]
    tokens_per_image: Callable[[Mapping[str, Any], Any], list[int] | None]
    image_grid: Callable[[Mapping[str, Any], Any], list[tuple[int, int]]] | None = None
    crops: Callable[[Mapping[str, Any], Any], list[list[list[Tensor]]]] | None = None
    entries: Callable[[Sequence[int], Any], list[int]] = lambda sizes, config: list(sizes)
    joins: Callable[[Sequence[int]], bool] | None = None
    overview: int = 0
    language_model: str = "language_model"
    layers: str = "layers"
    attention: str = "self_attn"
    rotary: str = "rotary_emb"
    final_norm: str = "norm"
    facts: TowerFacts = NO_TOWER
    tower: Tower | None = None
    injected: Injected | None = None
    videos: Videos | None = None
    whole_prompt: bool = False
    newline: str | None = None
    reads: frozenset[str] | None = None
    as_built: Callable[[Family, nn.Module], Family] = lambda family, base: family

    def placeholders(self, config: Any) -> tuple[int, ...]:
        """Ids of all placeholders: of pictures, and of videos."""
        return (self.image_token(config), *(() if self.videos is None else (self.videos.token(config),)))

    def cells(self, inputs: Mapping[str, Any], config: Any) -> list[list[list[Tensor]]]:
        """Per picture, rows of its crops; per crop, `[rows, columns]` the index of the token that each cell became, −1 if the
        cell is padding."""
        if self.crops is not None:
            return self.crops(inputs, config)
        assert self.image_grid is not None
        return [[[torch.arange(rows * columns).view(rows, columns)]] for rows, columns in self.image_grid(inputs, config)]

    def video_cells(self, inputs: Mapping[str, Any], config: Any) -> list[list[Tensor]]:
        """Per video, its frames; per frame, `[rows, columns]` the index of the token that each cell became, counted over the
        whole video. Empty if there are no videos, or nothing says how large their frames are."""
        grids = None if self.videos is None else self.videos.grids(inputs, config)
        return [list(torch.arange(math.prod(grid)).view(grid)) for grid in grids or ()]
