"""Random tokens: the baseline that every method has to beat; after the information horizon, the method of choice.

    S ~ uniform over the subsets of size K

Drawn per picture from (seed, layer, prompt, n-th picture of the prompt): the same set whatever the batch, another one for
another prompt. Pictures that are asked the same question share one draw per seed; average over seeds in that case. Before the
vision tower (site=pixels) the prompt is not known: there it is drawn from (seed, pixels), the same for equal pictures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.methods.base import Pruner
from vlmprune.methods.parameters import number
from vlmprune.schedule import at
from vlmprune.view import View


@dataclass(frozen=True, kw_only=True)
class Random(Pruner):
    """Keep a uniformly random subset.

    Args:
        seed: whole number; another seed gives another draw.
    """

    name = "random"
    paper = "the baseline"
    needs = frozenset({"identity"})
    official_positions = "compact"
    default = at(layer=0, fraction=0.25)
    chooses = "draws tokens at random"

    seed: int = number(0, whole=True)

    def select(self, see: View, keep: int) -> Tensor:
        drawn = [self._draw(identity, see.layer, see.visual)[:keep].sort().values for identity in see.identity]
        return torch.stack(drawn).to(see.position.device, non_blocking=True)

    def _draw(self, identity: int, layer: int, visual: int) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}/{layer}/{identity}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randperm(visual, generator=generator)
