"""CLS-attention top-k: what the vision tower itself finds salient. The selection rule of FasterVLM (arXiv:2412.01818).

    s_j = mean_h A^h[CLS, j]        attention of the CLS token to patch j in the block whose output feeds the projector

Needs a tower with a CLS token (CLIP). Each crop of a LLaVA-NeXT picture has its own: attention is a share of one crop, and is
compared within that crop only. Differs from FasterVLM: survivors keep their positions; scores are fp32 (official: the tower's
dtype); ties go to the lower index. On LLaVA-NeXT: K is the picture's, shared among its crops by their tokens (official: K of
each crop); padding is no candidate, because pictures are un-padded first (official: never); row separators stay unless
newlines="drop" (official: none).
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
    note = "fp32; K of a picture, not of each crop; row separators stay"
    needs = frozenset({"attention_from_cls"})
    official_positions = "compact"
    default = at(layer=0, fraction=0.25)
    per_crop = True

    def score(self, see: View) -> Tensor:  # [image, visual]
        return see.attention_from_cls.mean(dim=1)  # over heads
