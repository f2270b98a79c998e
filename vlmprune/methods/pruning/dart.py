"""DART. Wen et al., EMNLP 2025, arXiv:2502.11494. Not importance but duplication: keep what pivots do not resemble.

    pivots   the 4 visual and the 4 text tokens (of the text after the picture) with the largest L1 norm of their keys in the
             layer before the stage, all key heads together
    for each pivot in turn, keep the q tokens not yet kept that are least similar to it: cosine of hidden states after the
    language model's final norm

Needs no attention. Differs from the official code: exactly K tokens (official: 4 + 8·⌊K / 8⌋: 68 for 64, 132 for 128, 196 for
192; the port in LightCompress keeps 4 + 8·⌊n · fraction / 8⌋: 124 of 576 at 0.222); the remainder goes to the first pivots;
pivots are visited visual first, by norm (official: the order of a Python set); norms and cosines are fp32 (official: the
model's dtype); row separators of LLaVA-NeXT stay, on top of K, unless newlines="drop" (official: they are candidates).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.methods.base import Pruner, top
from vlmprune.methods.merging import rows
from vlmprune.schedule import at
from vlmprune.view import View

PIVOTS = 4
"""Of each kind."""


@dataclass(frozen=True, kw_only=True)
class DART(Pruner):
    """Keep a few pivots and, for each, what resembles it least."""

    name = "dart"
    paper = "arXiv:2502.11494 (EMNLP 2025)"
    note = "exactly K tokens (its code: 4 more for K = 64, 128, 192); explicit pivot order"
    needs = frozenset({"keys", "text_keys", "text_valid", "normed_features", "normed_text_features"})
    default = at(layer=2, fraction=0.222)
    chooses = "keeps what resembles its pivots least, pivot by pivot"
    first_layer = 1

    def select(self, see: View, keep: int) -> Tensor:
        norm, text_norm = _norm(see.keys), _norm(see.text_keys).masked_fill(~see.text_valid, -1)
        own = _largest(norm, min(PIVOTS, keep))  # [image, pivot], largest first
        words = _largest(text_norm, min(PIVOTS, text_norm.shape[1]))
        visual, text = normalize(see.normed_features.float(), dim=-1), normalize(see.normed_text_features.float(), dim=-1)
        pivots = torch.cat((rows(visual, own), rows(text, words)), dim=1)  # [image, pivot, dim]
        real = torch.cat((torch.ones_like(own, dtype=torch.bool), text_norm.gather(1, words) >= 0), dim=1)
        kept = torch.zeros(see.images, see.visual, dtype=torch.bool, device=visual.device).scatter(1, own, True)
        likeness = pivots @ visual.transpose(1, 2)  # [image, pivot, visual]
        share = _shares(keep - own.shape[1], real)
        for pivot in range(pivots.shape[1]):
            rank = likeness[:, pivot].masked_fill(kept, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
            kept |= rank < share[:, pivot, None]
        return top(kept, keep)


def _shares(total: int, real: Tensor) -> Tensor:
    """`[image, pivot]` tokens each pivot adds: equal shares, the remainder one each to the first; none to padding."""
    count = real.sum(dim=1, keepdim=True)
    share = total // count + (real.cumsum(dim=1) <= total % count)
    return share.masked_fill(~real, 0)


def _norm(keys: Tensor) -> Tensor:
    """`[image, token]` L1 norm over all key heads of `[image, kv_head, token, dim]`."""
    return keys.float().abs().sum(dim=(1, 3))


def _largest(norm: Tensor, count: int) -> Tensor:
    return norm.argsort(dim=-1, descending=True, stable=True)[:, :count]
