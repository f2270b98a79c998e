"""VScan. Zhang et al., arXiv:2505.22654. A local and a global scan of the picture, and a second stage half-way through the
decoder.

    local    in each of 4 × 4 windows of a crop, the ⌊⌊K/2⌋ / 16⌋ patches with the most attention from CLS in an early block
    global   of the rest, those with the most attention from CLS in the block that feeds the projector, until there are K
    merge    every other token is added to its nearest kept one (cosine), which is then divided by 1 + the number added
    decoder  at later stages, what the last prompt token is about to attend to (PyramidDrop's rule)

Both scans and merging are within one crop, as in the code. Differs from the official code: exactly K tokens (the global scan
fills up what windows cannot share evenly; official: fewer survive); windows need not divide the picture; survivors keep their
positions; scores and means are fp32 (official: the model's dtype). On LLaVA-NeXT: K is the picture's, shared among its crops by
their tokens (official: K of each crop); padding is no candidate and joins nothing (official: K of all 576 patches of a crop,
padding included, are chosen and un-padded afterwards, so that fewer than K stay, some with padding merged in). Row separators
stay, as in the code, unless newlines="drop". The early block is a quarter into the tower (5 of 24).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.methods.base import Choice, Pruner, top
from vlmprune.methods.merging import gathered, nearest, others, rows
from vlmprune.schedule import Stage, stages
from vlmprune.view import View

WINDOWS = 4
"""Per side."""


@dataclass(frozen=True, kw_only=True)
class VScan(Pruner):
    """Keep salient patches of every part of the picture, then what the question needs. Default: 96, and 32 from layer 16 on."""

    name = "vscan"
    paper = "arXiv:2505.22654"
    note = "merges; exactly K tokens"
    needs = frozenset({"attention_from_cls", "attention_from_cls_early", "features", "cell"})
    official_positions = "compact (LLaVA), original (Qwen)"
    default = stages({0: 96, 16: 32})
    chooses = "scans windows first and the whole picture then, and merges the rest into what it keeps"
    per_crop = True

    def needs_at(self, stage: Stage) -> frozenset[str]:
        return self.needs if stage.layer == 0 else frozenset({"attention_of_layer"})

    def scores(self, see: View) -> Tensor:
        return (see.attention_of_layer if see.layer else see.attention_from_cls).mean(dim=1)  # [image, visual]

    def select(self, see: View, keep: int) -> Tensor | Choice:
        if see.layer:
            return top(self.scores(see), keep)
        local = self._local(see, keep)
        kept = top(self.scores(see).masked_fill(local, torch.inf), keep)
        return Choice(kept, *merge_into_nearest(see.features, kept))

    def _local(self, see: View, keep: int) -> Tensor:
        """`[image, visual]` bool of what the local scan keeps."""
        row, column = see.cell // see.side, see.cell % see.side
        window = row * WINDOWS // see.side * WINDOWS + column * WINDOWS // see.side
        early = see.attention_from_cls_early.mean(dim=1)
        local = torch.zeros_like(window, dtype=torch.bool)
        for number in range(WINDOWS**2):
            here = window == number
            rank = early.masked_fill(~here, -1).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            local |= here & (rank < keep // 2 // WINDOWS**2)
        return local


def merge_into_nearest(features: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """`[image, keep, dim]` kept tokens, each averaged with the others of `[image, visual, dim]` that are nearest to it; and
    `Choice.joined`."""
    rest = others(kept, features.shape[1])
    centres, joining = rows(features, kept), rows(features, rest)
    home = nearest(joining, centres)
    total, count = gathered(joining, home, kept.shape[1])
    joined = torch.empty(features.shape[:2], dtype=torch.long, device=kept.device).scatter(1, kept, kept)
    return ((centres.float() + total) / (1 + count)).to(features.dtype), joined.scatter(1, rest, kept.gather(1, home))
