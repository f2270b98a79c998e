"""ZeroTuning. Han et al., ICLR 2026, arXiv:2505.11739; code FeijiangHan/ZeroTuning @ 51df35b.

    a′_0 = g · a_0 / (1 + (g − 1) a_0),   a′_k = a_k / (1 + (g − 1) a_0)       token 0: the first of the conversation

Exactly a constant log g on the first token's score. g > 1 flattens the rest of a row, g < 1 sharpens it. The divisor is made of
all other weights plus g · a_0: the paper's form cancels where a_0 is nearly 1 and g small. A row that sees the first token only
stays as it is, also for g = 0. Differs from the paper in: heads and layers are given, not searched for on labelled data or by
the output's entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.methods.parameters import number
from vlmprune.methods.redistributing import GroupEditor, Scene, first_token


@dataclass(frozen=True, kw_only=True)
class ZeroTuning(GroupEditor):
    """Scale the attention to the first token, and share what changes among all others.

    Args:
        gain: g; 1, the default, changes nothing, which is the paper's starting point: give one. Reports say so.
    """

    name = "zerotuning"
    paper = "arXiv:2505.11739 (ICLR 2026)"
    note = "all heads of the given layers: no search"
    rows = "all"
    default_layers = ":"
    group_count = 1

    gain: float = number(1.0, low=0, high=1e4)

    @property
    def neutral(self) -> bool:
        return self.gain == 1

    def groups(self, see: Scene) -> Tensor:
        return first_token(see, see.prompt.shape[0])

    def coefficients(self, mass: Tensor, present: Tensor | None = None) -> Tensor:
        others, first = mass.unbind(dim=-1)
        total = torch.add(others, first, alpha=self.gain)
        nothing = total <= torch.finfo(mass.dtype).tiny
        rest = total.masked_fill(nothing, 1).reciprocal()
        return torch.stack((rest, (self.gain * rest).masked_fill(nothing, 1)), dim=-1)
