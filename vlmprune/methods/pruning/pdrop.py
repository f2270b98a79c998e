"""PyramidDrop. Xing et al., CVPR 2025, arXiv:2410.17247. Fewer tokens, layer by layer.

    s_j = mean_h softmax_j( q^h(last) · k^h(j) / √d )       with the projections of the layer that comes next

At each boundary the next layer's own norm, projections and rotary embedding score the tokens that are about to enter it.
Differs from the official code: fractions are rounded half up (official: down); survivors keep their positions (official:
renumbered); left padding and any batch; heads are averaged in fp32 (official: the model's dtype); row separators of LLaVA-NeXT
stay, on top of the budget, unless newlines="drop" (official: they are candidates like the picture's other tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmprune.methods.base import ScorePruner
from vlmprune.schedule import stages
from vlmprune.view import View


@dataclass(frozen=True, kw_only=True)
class PDrop(ScorePruner):
    """Keep what the last prompt token is about to attend to. Default: half, a quarter, an eighth before layers 8, 16, 24."""

    name = "pdrop"
    paper = "arXiv:2410.17247 (CVPR 2025)"
    needs = frozenset({"attention_of_layer"})
    official_positions = "compact"
    default = stages({8: 0.5, 16: 0.25, 24: 0.125})

    def score(self, see: View) -> Tensor:  # [image, visual]
        return see.attention_of_layer.mean(dim=1)  # over heads
