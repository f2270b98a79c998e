"""AdaptInfer. arXiv:2508.06084, section 3.2.2. Attention among the words weighs how much each word counts for visual tokens.

    M' = M + Mᵀ − diag(M)           M = A[T, T], text after the picture, in the layer before the stage
    w  = Σ_rows M'                  one weight per head and text token
    s_j = Σ_h Σ_t w_h,t · A^h[t, j]

Differs from the official code: exactly K tokens (official: min(K, v − 1)); fractions of the picture's original tokens, rounded
once (official: chained ratios, rounded down at each stage); survivors keep their positions (the LLaVA code renumbers them); any
batch. The paper prunes after a layer, we prune before one: its layers 1, 10, 20 are 2, 11, 21 here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmprune.methods.base import ScorePruner
from vlmprune.schedule import stages
from vlmprune.view import View


@dataclass(frozen=True, kw_only=True)
class AdaptInfer(ScorePruner):
    """Keep what the text attends to; words that other words attend to count more. The presets are the published schedules."""

    name = "adaptinfer"
    paper = "arXiv:2508.06084"
    note = "exactly K tokens; fractions are of the picture's original tokens, not of what is left"
    needs = frozenset({"attention_from_text", "attention_among_text"})
    official_positions = "compact (LLaVA), original (Qwen)"
    default = stages({2: 133, 11: 27, 21: 3})
    first_layer = 1
    presets = {  # noqa: RUF012
        "llava-128": stages({2: 290, 11: 72, 21: 18}),
        "llava-64": stages({2: 133, 11: 27, 21: 3}),
        "llava-48": stages({2: 80, 11: 24, 21: 2}),
        "llava-32": stages({2: 40, 11: 12, 21: 0}),
        "llava-13b-128": stages({2: 300, 11: 94, 21: 30}),  # layers as for 7B: no list for 13B is published
        "llava-13b-64": stages({2: 148, 11: 40, 21: 5}),
        "qwen2-vl-10": stages({1: 0.17, 10: 0.17 * 0.6, 20: 0.17 * 0.6 * 0.3}),
        "qwen2-vl-30": stages({1: 0.5, 10: 0.5 * 0.6, 20: 0.5 * 0.6 * 0.3}),
        "qwen2-vl-50": stages({1: 0.7, 10: 0.7 * 0.9, 20: 0.7 * 0.9 * 0.3}),
    }

    def score(self, see: View) -> Tensor:  # [image, visual]
        among = see.attention_among_text  # [image, head, text, text]
        symmetric = among + among.transpose(-1, -2) - among.diagonal(dim1=-2, dim2=-1).diag_embed()
        weight = symmetric.sum(dim=-1)
        return (weight[..., None] * see.attention_from_text).sum(dim=(1, 2))
