"""Uniform grid: every (n / K)-th token in raster order. A baseline that looks at nothing.

S = { ⌊(i + ½) · n / K⌋ : i = 0 … K − 1 }
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.methods.base import Pruner
from vlmprune.schedule import at
from vlmprune.view import View


@dataclass(frozen=True, kw_only=True)
class Uniform(Pruner):
    """Keep evenly spaced tokens."""

    name = "uniform"
    paper = "a baseline"
    needs = frozenset()
    default = at(layer=0, fraction=0.25)
    chooses = "keeps every n-th token"

    def select(self, see: View, keep: int) -> Tensor:
        return evenly(see, keep)


def evenly(see: View, keep: int) -> Tensor:
    """`[image, keep]` indices of evenly spaced tokens."""
    # In whole numbers: (2i + 1)·n / 2K, exact for every n and K.
    steps = (2 * torch.arange(keep, device=see.position.device) + 1) * see.visual // (2 * keep)
    return steps.expand(see.images, keep)
