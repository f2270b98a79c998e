"""SparseVLM. Zhang et al., ICML 2025, arXiv:2410.04417. Words about the picture rate its tokens; what they drop is recycled.

    raters   r_t = mean_v softmax_t( x_v · x_t ) of what enters the language model; the words with r_t above the mean of all
    v1.5     s_j = mean over heads and raters of the attention in the layer before the stage. Of the n dropped tokens, the best
             ⌊0.3 · n⌋ + 1 are clustered (density peaks) into c = ⌊(⌊0.3 · n⌋ + 1) / 10⌋ + 1, which are kept as their means
    v2       attention is divided by what rotary positions alone would give, B = (rotated 1)·(rotated 1) / √d, and only the 14
             heads with the largest mass count; nothing is recycled

K counts clusters too: K = k + c; the presets add c to the published k. Differs from the official code: a cluster takes its
centre's place (official: after all kept tokens); positions are kept (its v1.5 renumbers, its v2 does not); of equal densities
the lower index is denser (official: noise decides); all words rate if none is above the mean. The code prunes after layers 2,
6, 15; here that is before 3, 7, 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.methods.base import Choice, Pruner, top
from vlmprune.methods.merging import density_peaks, gathered, rows
from vlmprune.methods.parameters import choice
from vlmprune.schedule import Stage, stages
from vlmprune.view import View

HEADS = 14


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Pruner):
    """Keep what the words attend to that are close to the picture.

    Args:
        version: 1.5 (recycles) or 2 (corrects for position); a preset brings its own.
    """

    name = "sparsevlm"
    paper = "arXiv:2410.04417 (ICML 2025)"
    note = "K counts recycled clusters; they take their centres' places"
    default = stages({3: 82, 7: 32, 16: 18})  # v1.5-64
    first_layer = 1
    presets = {  # noqa: RUF012
        "v1.5-192": stages({3: 309, 7: 204, 16: 113}),
        "v1.5-128": stages({3: 312, 7: 117, 16: 39}),
        "v1.5-96": stages({3: 249, 7: 55, 16: 27}),
        "v1.5-64": stages({3: 82, 7: 32, 16: 18}),
        "v2-192": stages({3: 300, 7: 200, 16: 118}),
        "v2-128": stages({3: 238, 7: 108, 16: 60}),
        "v2-96": stages({3: 246, 7: 54, 16: 28}),
        "v2-64": stages({3: 66, 7: 34, 16: 20}),
    }
    needs = frozenset({"embeddings", "text_embeddings", "text_valid", "attention_from_text", "features"})
    official_positions = "compact (1.5), original (2)"
    chooses = "keeps the highest scores, and recycles some of the rest as clusters"

    version: float = choice(1.5, 2)

    def __post_init__(self, layer: Any, tokens: Any, fraction: Any, preset: Any, site: Any) -> None:
        super().__post_init__(layer, tokens, fraction, preset, site)
        if preset is not None:
            object.__setattr__(self, "version", 2 if preset.startswith("v2") else 1.5)

    def needs_at(self, stage: Stage) -> frozenset[str]:
        return self.needs if self.version == 1.5 else self.needs - {"features"} | {"rotary", "text_rotary"}

    def scores(self, see: View) -> Tensor:
        rating = raters(see.embeddings, see.text_embeddings, see.text_valid)  # [image, text]
        attention = see.attention_from_text
        if self.version == 2:
            attention = attention / _rotary_alone(see.text_rotary, see.rotary)[:, None]
        attention = attention.masked_fill(~rating[:, None, :, None], 0)
        if self.version == 2:
            attention = _strongest_heads(attention)
        return attention.sum(dim=(1, 2))  # the mean's divisors are the same for every token

    def select(self, see: View, keep: int) -> Tensor | Choice:
        score = self.scores(see)
        plain, clusters = _split(keep, see.visual) if self.version == 1.5 else (keep, 0)
        if not clusters:
            return top(score, keep)
        kept = top(score, plain)
        centres, means, joined = _recycle(see.features, score, kept, clusters)
        index, order = torch.cat((kept, centres), dim=1).sort(dim=1)
        return Choice(index, rows(torch.cat((rows(see.features, kept), means), dim=1), order), joined)


def raters(visual: Tensor, text: Tensor, valid: Tensor) -> Tensor:
    """`[image, text]` bool of the words that rate, from embeddings `[image, visual, dim]` and `[image, text, dim]`."""
    likeness = visual.float() @ text.float().transpose(1, 2)
    share = likeness.masked_fill(~valid[:, None], -torch.inf).softmax(dim=-1)
    weight = share.nanmean(dim=1)  # rows that the tower dropped are NaN
    above = (weight > weight.sum(dim=-1, keepdim=True) / valid.sum(dim=-1, keepdim=True)) & valid
    return torch.where(above.any(dim=-1, keepdim=True), above, valid)


def recycled(dropped: int) -> tuple[int, int]:
    """Of so many dropped tokens: how many are recycled, and into how many clusters."""
    tokens = int(0.3 * dropped) + 1 if dropped else 0
    return tokens, tokens // 10 + 1 if dropped else 0


def _split(keep: int, visual: int) -> tuple[int, int]:
    """K as plain tokens and clusters: as few clusters as there can be; a K of one cluster only is one plain token."""
    for plain in range(keep, 0, -1):
        clusters = recycled(visual - plain)[1]
        if plain + clusters == keep:
            return plain, clusters
    return keep, 0


def _recycle(features: Tensor, score: Tensor, kept: Tensor, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centres `[image, cluster]`, means `[image, cluster, dim]` of the best dropped tokens' clusters, and `Choice.joined`."""
    ranked = score.scatter(1, kept, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    chosen = ranked[:, : recycled(features.shape[1] - kept.shape[1])[0]]  # [image, n], best first
    x = rows(features, chosen)
    centre, home = density_peaks(x, clusters)
    total, count = gathered(x, home, clusters)
    centres = chosen.gather(1, centre)
    joined = torch.full_like(ranked, -1).scatter(1, kept, kept).scatter(1, chosen, centres.gather(1, home))
    return centres, (total / count).to(features.dtype), joined


def _rotary_alone(text: Tensor, visual: Tensor) -> Tensor:
    """`[image, text, visual]` score of a query and a key of ones, from cosines and sines `[image, token, 2, dim]`."""

    def rotated(table: Tensor) -> Tensor:
        cos, sin = table.float().unbind(dim=2)
        half = cos.shape[-1] // 2
        return torch.cat((cos[..., :half] - sin[..., :half], cos[..., half:] + sin[..., half:]), dim=-1)

    return rotated(text) @ rotated(visual).transpose(1, 2) / visual.shape[-1] ** 0.5


def _strongest_heads(attention: Tensor) -> Tensor:
    """`[image, head, text, visual]` with all but the heads of the largest mass at zero."""
    heads = top(attention.sum(dim=(2, 3)), min(HEADS, attention.shape[1]))
    return attention * torch.zeros_like(attention[:, :, :1, :1]).scatter(1, heads[..., None, None], 1)
