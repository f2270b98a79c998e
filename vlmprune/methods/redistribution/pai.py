"""PAI, paying more attention to the image. Liu et al., ECCV 2024, arXiv:2407.21771; code LALBJ/PAI @ 9bbd8bd.

    s′_k = s_k + α · |s_k|        k a visual token; s: scaled scores before the softmax; the last row of a prompt, and decoding

Differs from the official code in: attention only; its second part, guidance of the logits against a text-only branch, is a
matter of decoding, which stays generate's. No fixed number of visual tokens; any batch, and padding on either side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.methods.parameters import number
from vlmprune.methods.redistributing import Scene, ScoreEditor


@dataclass(frozen=True, kw_only=True)
class PAI(ScoreEditor):
    """Raise the scores of visual tokens.

    Args:
        alpha: by which share of their size.
    """

    name = "pai"
    paper = "arXiv:2407.21771 (ECCV 2024)"
    note = "attention only, no guidance of the logits"
    rows = "last"
    default_layers = "2:"

    alpha: float = number(0.2, low=0, high=100)

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    @property
    def strengths(self) -> tuple[float, ...]:
        return (self.alpha,)

    def groups(self, see: Scene) -> Tensor:
        return see.visual.to(torch.int8)[:, None]
