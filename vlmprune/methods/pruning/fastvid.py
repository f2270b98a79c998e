"""FastVID. Shen et al., NeurIPS 2025, arXiv:2503.11187. Alike frames become a segment, whose tokens are merged over time.

    segments    cuts between frames t and t + 1 at the c − 1 lowest cos( f_t, f_{t+1} ), and wherever it is below τ;
                f_t: mean of the frame's tokens (DySeg)
    salient     K − ⌊d·K⌋ tokens: of each frame those with the most attention from the tower's CLS token (ATS)
    anchors     ⌊d·K⌋ of the others: of every p-th frame of a segment, counted from its last, those with the highest ρ·δ
                ρ: exp( −mean squared distance to the 4 nearest tokens of the frame, itself included ),
                δ: distance to the nearest denser token of the frame (DTM)
    merged      a ← α·a + (1 − α)·m,   α = max( β, 1 / (N + 1) );   m: mean of the N tokens, no salient ones, that are more like
                this anchor of their segment (cosine) than like any other

Each frame has the same share of K; of a segment, its anchor frames have it (p is at most n/K for n tokens, so that there is
room). With c = 8, τ = 0.9, p = 4, β = 0.6, as for LLaVA-OneVision. The paper has d = 0.4. Its attention comes from SigLIP's
pooling head, which VLMs in transformers do not have. Here it is that of a CLS token, where there is one; by default none is
salient: d = 1 (`context=1.0`), which works with any tower. Differs from the official code: exactly K tokens (there,
shares are rounded down frame by frame; here running sums of the shares are, and what an anchor frame has no room for goes to
the best other tokens); a token joins one anchor (there: one of each anchor frame); f_t is the mean of the language model's
tokens, as in its code for Qwen2.5-VL (LLaVA: the pooling head's); ties by index (there: by noise). A picture is a video of one
frame. In a video of up to c frames, every frame is a segment and nothing is merged over time: give `segments` for short ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, pad

from vlmprune.errors import UsageError
from vlmprune.methods.base import Choice, Pruner, top
from vlmprune.methods.frames import by_frame, by_token, exactly, first_of_each, running_shares
from vlmprune.methods.merging import chunks, peak_score, rows
from vlmprune.methods.parameters import number
from vlmprune.schedule import Schedule, Stage, at
from vlmprune.view import TowerFacts, View

NEAR = 4


@dataclass(frozen=True, kw_only=True)
class FastVID(Pruner):
    """Cut a video into segments of alike frames, and merge each into tokens of a few of its frames.

    Args:
        segments: c, the least number of segments; every frame is one in a video of fewer frames.
        threshold: τ, the cosine of two frames below which a segment ends.
        context: d, the share of merged tokens; the others are those that the tower's CLS token attends to.
        every: p, one of how many frames of a segment has anchors.
        own: β, the least weight of an anchor in what it becomes.
    """

    name = "fastvid"
    paper = "arXiv:2503.11187 (NeurIPS 2025)"
    note = "merges; exactly K tokens; no salient tokens unless context is below 1, which needs a CLS token"
    default = at(layer=0, fraction=0.1)
    needs = frozenset({"features", "frame", "attention_from_cls"})
    chooses = "cuts the video into segments of alike frames, and merges each into dense tokens of a few frames"
    compares_frames = True

    segments: int = number(8, low=1, whole=True)
    threshold: float = number(0.9, low=-1, high=1)
    context: float = number(1.0, low=0, high=1)
    every: int = number(4, low=1, whole=True)
    own: float = number(0.6, low=0, high=1)

    def plan(self, facts: TowerFacts) -> Schedule:
        if any(stage.layer for stage in self.stages):
            raise UsageError(
                f"fastvid merges what enters the language model: its only stage is layer=0, found {self.stages[-1].layer}."
            )
        return super().plan(facts)

    def needs_at(self, stage: Stage) -> frozenset[str]:
        return self.needs if self.context < 1 else self.needs - {"attention_from_cls"}

    def select(self, see: View, keep: int) -> Choice:
        x, there = by_frame(see, see.features.float())
        segment = _segments(x, there, self.segments, self.threshold)
        merged = int(self.context * keep)
        salient = self._salient(see, there, keep - merged)
        if not merged:
            return Choice(top(salient, keep))
        rest = there & by_frame(see, ~salient)[0]
        peak = peak_score(x.flatten(0, 1), NEAR, rest.flatten(0, 1)).view(rest.shape)
        quota = _anchor_quota(merged, segment, min(self.every, see.visual // keep))
        wanted = by_token(see, first_of_each(peak, quota, rest))
        anchors = exactly(wanted, by_token(see, peak).masked_fill(salient, -torch.inf), merged)
        return _joined(see, salient, anchors, segment.gather(1, see.frame), self.own, keep)

    def _salient(self, see: View, there: Tensor, count: int) -> Tensor:
        """`[image, visual]` bool, True for the salient tokens."""
        if not count:
            return torch.zeros_like(see.position, dtype=torch.bool)
        attention = see.attention_from_cls.mean(dim=1)  # over heads
        grid, _ = by_frame(see, attention)
        quota = running_shares(count, torch.ones_like(there[:, :, 0], dtype=torch.long))
        index = exactly(by_token(see, first_of_each(grid, quota, there)), attention, count)
        return torch.zeros_like(see.position, dtype=torch.bool).scatter(1, index, True)


def _segments(x: Tensor, there: Tensor, least: int, threshold: float) -> Tensor:
    """`[image, frame]` the segment of every frame, from 0, from tokens `[image, frame, cell, dim]`."""
    mean = x.sum(dim=2) / there.sum(dim=2).clamp_min(1)[..., None]
    alike = cosine_similarity(mean[:, 1:], mean[:, :-1], dim=-1)  # [image, frame − 1]
    rank = alike.argsort(dim=-1, stable=True).argsort(dim=-1)
    cut = (rank < least - 1) | (alike < threshold)
    return pad(cut.long(), (1, 0)).cumsum(dim=-1)


def _anchor_quota(total: int, segment: Tensor, every: int) -> Tensor:
    """`[image, frame]` anchors of every frame: each segment's share of the total, equally shared by its anchor frames."""
    none, one = torch.zeros_like(segment), torch.ones_like(segment)
    frames = none.scatter_add(1, segment, one)  # of each segment
    after = frames.cumsum(dim=1).gather(1, segment) - one.cumsum(dim=1)  # frames of the segment after this one
    hosts = (frames + every - 1) // every
    share, hosts = running_shares(total, frames).gather(1, segment), hosts.gather(1, segment)
    before = hosts - 1 - after // every  # anchor frames of the segment before this one
    return (share // hosts + (before < share % hosts)).masked_fill(after % every != 0, 0)


def _joined(see: View, salient: Tensor, anchors: Tensor, segment: Tensor, own: float, keep: int) -> Choice:
    """Every token that is not salient joins an anchor of its segment; of a segment without anchors, none does.

    Args:
        salient, segment: `[image, visual]`.
        anchors: `[image, anchor]`.
        own: the least weight of an anchor.
        keep: salient tokens and anchors.
    """
    x = see.features.float()
    target, theirs = rows(x, anchors), segment.gather(1, anchors)
    columns = normalize(target, dim=-1).transpose(1, 2)
    parts = chunks(normalize(x, dim=-1), anchors.shape[1])
    best = [
        (part @ columns).masked_fill(mine[:, :, None] != theirs[:, None], -torch.inf).max(dim=-1)
        for part, mine in zip(parts, segment.split(parts[0].shape[1], dim=1), strict=True)
    ]
    home = torch.cat([found.indices for found in best], dim=1)
    joins = torch.cat([found.values.isfinite() for found in best], dim=1) & ~salient
    count = torch.zeros_like(target[..., 0]).scatter_add(1, home, joins.float())[..., None]
    total = torch.zeros_like(target).scatter_add(1, home[..., None].expand_as(x), x * joins[..., None])
    weight = (1 / (count + 1)).clamp_min(own).masked_fill(count == 0, 1)
    merged = weight * target + (1 - weight) * total / count.clamp_min(1)
    places = torch.arange(see.visual, device=x.device).expand_as(segment)
    joined = torch.where(joins, anchors.gather(1, home), torch.where(salient, places, -1)).scatter(1, anchors, anchors)
    index = top(joined == places, keep)
    return Choice(index, rows(x.scatter(1, anchors[..., None].expand_as(target), merged), index).to(see.features.dtype), joined)
