"""VisionZip. Yang et al., CVPR 2025, arXiv:2412.04467. What CLS attends to, and a summary of the rest.

    dominant    the K − C patches with the most attention from CLS, summed over heads, in the block that feeds the projector
    contextual  of the R others, every ⌊R / C⌋-th is a target; each remaining one joins the target with the most similar key
                (cosine, mean over heads); a target becomes itself plus the mean of those that joined it, before the projector

Attention, targets and merging are within one crop, as in the code. Differs from the official code: K counts patches (official:
the CLS token is one of the K); contextual tokens take their targets' places (official: after all others); survivors keep their
positions; scores and means are fp32 (official: the tower's dtype); any number of pictures. On LLaVA-NeXT: K is the picture's,
shared among its crops by their tokens (official: K of each crop); padding is neither kept nor merged, because pictures are
un-padded first (official: never); row separators stay unless newlines="drop" (official: none).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.errors import UsageError
from vlmprune.methods.base import Choice, Pruner, top
from vlmprune.methods.merging import gathered, nearest, others, rows
from vlmprune.methods.parameters import number
from vlmprune.schedule import Schedule, Stage, at
from vlmprune.view import TowerFacts, View


@dataclass(frozen=True, kw_only=True)
class VisionZip(Pruner):
    """Keep what the tower's CLS token attends to, and merge the rest into a few tokens.

    Args:
        contextual: how many of the kept tokens of each crop (LLaVA-1.5: of the picture) are merged ones; 5/32 of them if not
            given (10 of 64, 20 of 128, 30 of 192).
    """

    name = "visionzip"
    paper = "arXiv:2412.04467 (CVPR 2025)"
    note = "merges; K without the CLS token; merged tokens take their targets' places; row separators stay"
    needs = frozenset({"attention_from_cls", "tower_keys", "tower_features", "features", "project"})
    official_positions = "compact"
    default = at(layer=0, tokens=64)
    chooses = "keeps what CLS attends to most, and merges the rest into a few tokens"
    per_crop = True

    contextual: int | None = number(None, low=0, whole=True)

    def plan(self, facts: TowerFacts) -> Schedule:
        if any(stage.layer for stage in self.stages):
            raise UsageError(
                f"visionzip merges before the projector: its only stage is layer=0, found {self.stages[-1].layer}."
            )
        return super().plan(facts)

    def needs_at(self, stage: Stage) -> frozenset[str]:
        return self.needs

    def scores(self, see: View) -> Tensor:
        return see.attention_from_cls.sum(dim=1)  # over heads

    def select(self, see: View, keep: int) -> Choice:
        merged = min(math.floor(keep * 5 / 32 + 0.5) if self.contextual is None else self.contextual, keep)
        dominant = top(self.scores(see), keep - merged)
        if not merged:
            return Choice(dominant)
        rest = others(dominant, see.visual)  # [image, R]
        stride = max(1, rest.shape[1] // merged)
        split = stride * merged
        targets = rest[:, :split:stride]
        joining = torch.cat((rest[:, :split].unflatten(1, (merged, stride))[:, :, 1:].flatten(1), rest[:, split:]), dim=1)
        zipped, home = _join(see.tower_keys, see.tower_features, targets, joining)
        index, order = torch.cat((dominant, targets), dim=1).sort(dim=1)
        features = torch.cat((rows(see.features, dominant), see.project(zipped)), dim=1)
        joined = torch.empty(see.images, see.visual, dtype=torch.long, device=index.device).scatter(1, index, index)
        return Choice(index, rows(features, order), joined.scatter(1, joining, targets.gather(1, home)))


def _join(keys: Tensor, features: Tensor, targets: Tensor, joining: Tensor) -> tuple[Tensor, Tensor]:
    """`[image, target, dim]` features of the targets, plus the mean of those that joined each; and which target each joined."""
    home = nearest(rows(keys, joining), rows(keys, targets))
    total, count = gathered(rows(features, joining), home, targets.shape[1])
    return (rows(features, targets) + total / count.clamp_min(1)).to(features.dtype), home
