"""HoloV. Zou et al., NeurIPS 2025, arXiv:2510.02912. Every part of the picture gets its share.

    The sequence is split into 16 segments. In a segment of m tokens, with cosines c_ij of its features (c_ii = 0):
    e_i = 1000 · CLS attention of token i          v_i = variance of c_ij over j, around Σ_j c_ij / (m − 1)
    score of the segment = mean_i( e_i + 0.09 · v_i · mean|e| / (mean v + 10⁻⁶) )
    quota = ⌊K · score / Σ score⌋; the rest is given one by one to the best segments; a segment keeps its highest attention

Every normalisation is within one segment. A LLaVA-NeXT picture is one sequence, as in the code: the base view, then the
un-padded crops row by row; so attention is compared across crops, although each crop's CLS token distributes its own. Differs
from the official code: exactly K tokens (a quota above the segment's length goes to the best segments with room; official:
zeros are padded); rising order (official: by score); a segment of one token counts like the others; positions are kept; each
picture is split separately; row separators of LLaVA-NeXT stay unless newlines="drop" (official: none).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmprune.device import on_device
from vlmprune.methods.base import Pruner, alive_top, top
from vlmprune.schedule import at
from vlmprune.view import View

SEGMENTS = 16


@dataclass(frozen=True, kw_only=True)
class HoloV(Pruner):
    """Keep what CLS attends to, part by part, more where a part is salient and varied."""

    name = "holov"
    paper = "arXiv:2510.02912 (NeurIPS 2025)"
    note = "rising order; exactly K tokens; row separators stay"
    needs = frozenset({"attention_from_cls", "features"})
    official_positions = "compact (LLaVA), original (Qwen)"
    default = at(layer=0, tokens=64)
    chooses = "gives each part of the picture a quota, and keeps what CLS attends to most in it"

    def scores(self, see: View) -> Tensor:
        return see.attention_from_cls.float().mean(dim=1)  # within a part

    def select(self, see: View, keep: int) -> Tensor:
        attention = self.scores(see)  # [image, visual]
        segments = min(SEGMENTS, see.visual)
        sizes = [see.visual // segments + (segment < see.visual % segments) for segment in range(segments)]
        pieces = zip(attention.split(sizes, dim=1), see.features.split(sizes, dim=1), strict=True)
        score = torch.stack([_score(piece, features.float()) for piece, features in pieces], dim=1)  # [image, segment]
        quotas = _quotas(score, sizes, keep)
        kept = [
            alive_top(piece, quota, None)
            for piece, quota in zip(attention.split(sizes, dim=1), quotas.unbind(dim=1), strict=True)
        ]
        return top(torch.cat(kept, dim=1), keep)


def _score(attention: Tensor, features: Tensor) -> Tensor:
    """`[image]` score of one segment, from `[image, m]` and `[image, m, dim]`."""
    unit = features / (features.norm(dim=-1, keepdim=True) + 1e-6)
    cosine = unit @ unit.transpose(1, 2)
    cosine = cosine - torch.diag_embed(cosine.diagonal(dim1=1, dim2=2))
    others = max(1, attention.shape[1] - 1)
    centre = cosine.sum(dim=-1, keepdim=True) / others
    variance = (cosine - centre).square().sum(dim=-1) / others
    salience = 1000 * attention
    scale = salience.abs().mean(dim=-1, keepdim=True) / (variance.abs().mean(dim=-1, keepdim=True) + 1e-6)
    return (salience + 0.09 * variance * scale).mean(dim=-1)


def _quotas(score: Tensor, sizes: list[int], keep: int) -> Tensor:
    """`[image, segment]` tokens of each segment, exactly `keep` in all: shares rounded down, then one more each in the
    order of scores, round after round, while there is room."""
    size = on_device(np.array(sizes), score.device).expand_as(score)
    quotas = (score / (score.sum(dim=-1, keepdim=True) + 1e-6) * keep).floor().long().minimum(size)
    missing = keep - quotas.sum(dim=-1)
    best = score.argsort(dim=-1, descending=True, stable=True)
    turn = torch.arange(max(sizes), device=score.device)[:, None]
    room = (quotas.gather(1, best)[:, None] + turn < size.gather(1, best)[:, None]).flatten(1)  # [image, round × segment]
    more = (room & (room.cumsum(dim=-1) <= missing[:, None])).unflatten(1, (-1, len(sizes))).sum(dim=1)
    return quotas.scatter_add(1, best, more)
