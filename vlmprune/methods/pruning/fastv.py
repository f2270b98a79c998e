"""FastV. Chen et al., ECCV 2024, arXiv:2403.06764, section 4.

    s_j = mean_h A^h[last, j]        attention from the last prompt token to visual token j, in the layer before the stage

Differs from the official code: any batch; a KV cache; survivors keep their positions, as in its in-place form.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmprune.methods.base import ScorePruner
from vlmprune.schedule import at
from vlmprune.view import View


@dataclass(frozen=True, kw_only=True)
class FastV(ScorePruner):
    """Keep what the last prompt token attends to."""

    name = "fastv"
    paper = "arXiv:2403.06764 (ECCV 2024)"
    needs = frozenset({"attention_from_last"})
    default = at(layer=2, fraction=0.5)  # K = 2, R = 50 %
    first_layer = 1

    def score(self, see: View) -> Tensor:  # [image, visual]
        return see.attention_from_last.mean(dim=1)  # over heads
