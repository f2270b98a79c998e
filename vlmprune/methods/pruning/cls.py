"""CLS-attention top-k: what the vision tower itself finds salient. The selection rule of FasterVLM (arXiv:2412.01818).

    s_j = mean_h A^h[CLS, j]        attention of the CLS token to patch j in the block whose output feeds the projector

Needs a tower with a CLS token (CLIP). Every view of a LLaVA-NeXT picture has its own: attention is a share of one view, and is
compared within it only. Differs from FasterVLM in: survivors keep their positions; scores are fp32 (there the tower's dtype);
ties go to the lower index. On LLaVA-NeXT: K is the picture's, shared among its views by their tokens (there K of each view);
un-padding leaves padding no candidate (there pictures are never un-padded); row separators stay unless newlines="drop" (there
none).
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
    note = "fp32; K of a picture, not of each view; row separators stay"
    needs = frozenset({"attention_from_cls"})
    official_positions = "compact"
    default = at(layer=0, fraction=0.25)
    per_crop = True

    def score(self, see: View) -> Tensor:  # [image, visual]
        return see.attention_from_cls.mean(dim=1)  # over heads
