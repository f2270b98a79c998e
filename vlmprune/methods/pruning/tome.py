"""Token merging in the manner of ToMe. Bolya et al., ICLR 2023, arXiv:2210.09461. Similar tokens are averaged, none is dropped.

    repeat  A = every other token, B = the rest; each of A finds its most similar one in B (cosine of features);
            the r most similar pairs become one token each: the mean, weighted by how many tokens each represents
    until   K tokens are left; r = min(n − K, ⌊n / 2⌋)

Differs from the paper: it merges the language model's tokens, all at one stage (paper: a few in every block of the tower);
similarity of features (paper: of keys); no proportional attention. A merged token takes the place of its token of B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.methods.base import Choice, Pruner
from vlmprune.methods.merging import most_similar, rows
from vlmprune.schedule import at
from vlmprune.view import View


@dataclass(frozen=True, kw_only=True)
class ToMe(Pruner):
    """Merge the most similar tokens, pair by pair, whatever the question."""

    name = "tome"
    paper = "arXiv:2210.09461 (ICLR 2023)"
    note = "merges; on the language model's tokens, not in the tower"
    needs = frozenset({"features"})
    default = at(layer=0, fraction=0.25)
    chooses = "merges the most similar pairs"

    def select(self, see: View, keep: int) -> Choice:
        x = see.features.float()
        weight = torch.ones(x.shape[:2], device=x.device)
        joined = place = torch.arange(see.visual, device=x.device).expand(see.images, see.visual)
        while x.shape[1] > keep:
            x, weight, place, joined = _merge_once(x, weight, place, joined, keep)
        return Choice(place, x.to(see.features.dtype), joined)


def _merge_once(x: Tensor, weight: Tensor, place: Tensor, joined: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One round: `[image, token, dim]`, `[image, token]` tokens each stands for, `[image, token]` where it stands, and
    `[image, visual]` the place of the token that each token of the picture is a part of."""
    a, b = x[:, ::2], x[:, 1::2]
    pairs = min(x.shape[1] - keep, x.shape[1] // 2)
    best, partner = most_similar(a, b)  # [image, a]
    order = best.argsort(dim=-1, descending=True, stable=True)
    gone, stays = order[:, :pairs], order[:, pairs:].sort(dim=-1).values
    home = partner.gather(1, gone)
    weight_a, weight_b = weight[:, ::2], weight[:, 1::2]

    moved = weight_a.gather(1, gone)
    total = (b * weight_b[..., None]).scatter_add(
        1, home[..., None].expand(-1, -1, b.shape[-1]), rows(a, gone) * moved[..., None]
    )
    weight_b = weight_b.scatter_add(1, home, moved)
    into = torch.zeros_like(joined).scatter(1, place, place)
    joined = into.scatter(1, place[:, ::2].gather(1, gone), place[:, 1::2].gather(1, home)).gather(1, joined)
    place = torch.cat((place[:, ::2].gather(1, stays), place[:, 1::2]), dim=1)
    place, order = place.sort(dim=1)
    x = rows(torch.cat((rows(a, stays), total / weight_b[..., None]), dim=1), order)
    return x, torch.cat((weight_a.gather(1, stays), weight_b), dim=1).gather(1, order), place, joined
