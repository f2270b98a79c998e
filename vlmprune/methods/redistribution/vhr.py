"""VHR, vision-aware head reinforcement. He et al., ACL 2025, arXiv:2412.13949, algorithm 1.

    VHD_h = ‖ A_h(picture and text) − A_h(text only) ‖      A_h: output of head h at the last prompt token, before W_O
    TA_h = ‖ A_h(text only) ‖²
    VHD_h ← 0  where both VHD_h and TA_h exceed mean + standard deviation over the layer's heads (outliers against vision)
    A_h ← α A_h  for heads with VHD_h > median, at every row of the prompt and of decoding

Layer by layer: a layer is measured behind reinforced layers, in both streams. The text-only stream is one pass of the prompt
without its image tokens, beside the prompt's own; heads are chosen once, at the prompt. Ours where the paper is silent: the
text-only stream is reinforced too; its positions are counted anew; the population's standard deviation; in other depths than
32, layer 1 and the last 44 %. Qwen's marks around a picture stay in the text-only stream. The released code is said, by a
third party's port of it (unverified: the code itself was not at hand), to differ from the paper and from this file in three
things: VHD is the squared distance (`distance=l2sq`), the standard deviation is the unbiased one, and outliers are removed
only where the deviation of VHD exceeds 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.methods.parameters import choice, number
from vlmprune.methods.redistributing import HeadScaler


@dataclass(frozen=True, kw_only=True)
class VHR(HeadScaler):
    """Strengthen the heads whose output depends most on the picture.

    Args:
        alpha: factor on their outputs.
        distance: "l2", or "l2sq" as the code is said to have it; it moves the bound of outliers only.
    """

    name = "vhr"
    paper = "arXiv:2412.13949 (ACL 2025)"
    note = "text-only stream reinforced too; fractions of the depth; outliers by the paper's rule, not the code's"
    rows = "all"
    default_layers = ""
    causal = False

    alpha: float = number(2.0, low=0, high=100)
    distance: Literal["l2", "l2sq"] = choice("l2", "l2sq")

    @property
    def neutral(self) -> bool:
        return self.alpha == 1

    def layers_of(self, depth: int) -> tuple[int, ...]:
        if self.layers:
            return super().layers_of(depth)
        return tuple(sorted({min(1, depth - 1), *range(depth - round(depth * 14 / 32), depth)}))

    def scale(self, with_image: Tensor, text_only: Tensor) -> Tensor:
        differs = (with_image - text_only).norm(dim=-1)
        if self.distance == "l2sq":
            differs = differs.square()
        alone = text_only.square().sum(dim=-1)
        outlier = _exceptional(differs) & _exceptional(alone)
        differs = differs.masked_fill(outlier, 0)
        middle = differs.quantile(0.5, dim=-1, keepdim=True)
        return torch.where(differs > middle, self.alpha, torch.ones_like(differs))


def _exceptional(x: Tensor) -> Tensor:
    return x > x.mean(dim=-1, keepdim=True) + x.std(dim=-1, correction=0, keepdim=True)
