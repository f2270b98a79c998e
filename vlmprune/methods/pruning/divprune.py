"""DivPrune. Alvar et al., CVPR 2025, arXiv:2503.02175, algorithm 1. Written from the formula.

    S = argmax_{|S|=K} min_{i≠j∈S} d(i, j),   d = 1 − cosine of the tokens entering the language model, solved greedily

Distances are within a picture, for LLaVA-NeXT across all its crops. Differs from the official code: distances are fp32
(official: the model's dtype); no token is picked twice; one selection per picture; survivors keep their positions (official:
renumbered). Row separators of LLaVA-NeXT stay, on top of K, unless newlines="drop" (official: they are candidates like any
token; as all of them are equal, one is among the K).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmprune.kernels.select_diverse import greedy_order, select_diverse
from vlmprune.methods.base import Pruner
from vlmprune.schedule import at
from vlmprune.view import View


@dataclass(frozen=True, kw_only=True)
class DivPrune(Pruner):
    """Keep the most diverse tokens, whatever the question."""

    name = "divprune"
    paper = "arXiv:2503.02175 (CVPR 2025)"
    note = "fp32; no token twice; row separators stay and are no candidates"
    needs = frozenset({"features"})
    official_positions = "compact"
    default = at(layer=0, fraction=0.098)  # 56 of 576
    chooses = "picks tokens one after the other, each the one farthest from those before"

    def select(self, see: View, keep: int) -> Tensor:
        return select_diverse(see.features, keep)

    def order(self, see: View, keep: int) -> Tensor:
        return greedy_order(see.features, keep)
