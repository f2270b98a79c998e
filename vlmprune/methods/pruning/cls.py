"""CLS-attention top-k: what the vision tower itself finds salient. The selection rule of FasterVLM (arXiv:2412.01818).

    s_j = mean_h A^h[CLS, j]        attention of the CLS token to patch j in the block whose output feeds the projector

Needs a tower with a CLS token (CLIP). Differs from FasterVLM in: survivors keep their positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmprune.methods.base import ScorePruner
from vlmprune.schedule import at
from vlmprune.view import View


@dataclass(frozen=True, kw_only=True)
class CLS(ScorePruner):
    """Keep what the vision tower's CLS token attends to, whatever the question."""

    name = "cls"
    paper = "arXiv:2412.01818 (FasterVLM)"
    needs = frozenset({"attention_from_cls"})
    official_positions = "compact"
    default = at(layer=0, fraction=0.25)
    per_view = True

    def score(self, see: View) -> Tensor:  # [image, visual]
        return see.attention_from_cls.mean(dim=1)  # over heads
