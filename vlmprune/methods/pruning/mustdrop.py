"""MustDrop. Liu et al., arXiv:2411.10803. Three stages: merge in the vision tower, filter in the decoder, forget after prefill.

    tower    after the first block, windows of 3 × 3 patches whose mean pairwise cosine is at least `merge` become one token
             each, their mean. Key set: the ⌈0.08 · n⌉ tokens that CLS attends to most in the tower's last block; it is never
             dropped.
    decoder  a = mean over heads of the attention of the text after the picture, in the layer before the stage. Token j is
             dropped if Σ_t a_tj < g · Σ_j Σ_t a_tj  and  max_t a_tj < u                           (thresholds, as published),
             or if it is not among the key set and the best K by Σ_t a_tj                  (target count, ours)
    cache    once prefill is over, decoder layers from `cache_layer` on keep only what the last stage kept

g and the key set are of all tokens of a picture, LLaVA-NeXT's crops together. Differs from the official code: each crop merges
separately (official: as many windows as the batch's least similar crop); a merged token takes the middle of its window and
patches stay in raster order (official: merged first); the key set is the picture's, by the attention of each crop's own CLS
token (official: 8 % of each crop); what fills no window stays as it is; pictures are un-padded (official: never); row
separators stay unless newlines="drop" (official: none); scores are fp32; positions are kept, in decoding too (official: a
layer's count of cached tokens). The code prunes after layers 2, 6, 10, 14; here that is before 3, 7, 11, 15. Its defaults (1.0,
0.0) drop nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.device import on_device, on_host
from vlmprune.errors import UsageError
from vlmprune.methods.base import Choice, alive_top, top
from vlmprune.methods.parameters import number
from vlmprune.methods.tower import TowerPruner, TowerState
from vlmprune.schedule import Budget, Schedule, Stage, stages
from vlmprune.view import TowerFacts, View

WINDOW = 3
FILTERED = stages(dict.fromkeys((3, 7, 11, 15), 1.0))  # where thresholds are applied; they set no count
THRESHOLDS = {
    "textvqa-192": (0.001, 0.001),
    "textvqa-128": (0.0012, 0.001),
    "textvqa-64": (0.011, 0.01),
    "vizwiz-64": (0.005, 0.001),
}


@dataclass(frozen=True, kw_only=True)
class MustDrop(TowerPruner):
    """Merge what is alike, keep what the question reads. Default: target counts 40, 20, 14 and 10 % (our choice).

    Args:
        global_threshold: g; with u it replaces the target counts. Presets: the published pairs, by benchmark and tokens kept.
        individual_threshold: u, given together with g.
        merge: lowest similarity of a window that is merged in the tower; above 1, none is merged.
        windows: merge exactly this many windows of each crop, the most similar ones, instead of those above `merge`.
    """

    name = "mustdrop"
    paper = "arXiv:2411.10803"
    note = "merges in the tower; target counts beside the paper's thresholds are ours"
    needs = frozenset({"attention_from_text", "attention_from_cls_final"})
    watches = "patches of the tower"
    default = stages({3: 0.4, 7: 0.2, 11: 0.14, 15: 0.1})
    first_layer = 1
    official_positions = "compact"
    chooses = "keeps the key set of the tower, and what the text attends to most"
    chooses_in_tower = "merges windows of alike patches"
    presets = dict.fromkeys(THRESHOLDS, FILTERED)

    global_threshold: float | None = number(None, low=0)
    individual_threshold: float | None = number(None, low=0)
    merge: float = number(0.8, low=-1)
    windows: int | None = number(None, low=0, whole=True)
    cache_layer: int = number(2, low=-1, whole=True)

    def __post_init__(self, layer: Any, tokens: Any, fraction: Any, preset: Any, site: Any) -> None:
        if str(preset) in THRESHOLDS and self.global_threshold is None and self.individual_threshold is None:
            object.__setattr__(self, "global_threshold", THRESHOLDS[str(preset)][0])
            object.__setattr__(self, "individual_threshold", THRESHOLDS[str(preset)][1])
        if self.thresholds and all(given is None for given in (self.schedule, layer, tokens, fraction, preset, site)):
            object.__setattr__(self, "schedule", FILTERED)
        super().__post_init__(layer, tokens, fraction, preset, site)

    def validate(self) -> None:
        if (self.global_threshold is None) != (self.individual_threshold is None):
            raise UsageError("mustdrop: global_threshold and individual_threshold go together: give both or neither.")

    @property
    def thresholds(self) -> bool:
        """Whether thresholds decide instead of counts."""
        return self.global_threshold is not None

    @property
    def adaptive(self) -> bool:
        return self.thresholds

    def variant(self, facts: TowerFacts) -> str:
        return "thresholds" if self.thresholds else "target counts"

    def plan(self, facts: TowerFacts) -> Schedule:
        super().plan(facts)
        merges = self.merge <= 1 if self.windows is None else self.windows > 0
        if merges and facts.whole:
            raise UsageError("mustdrop merges patches in the tower, but this one needs all to its end: set merge=1.1 for none.")
        return Schedule(((Stage(0, Budget(fraction=1.0), "vision"),) if merges else ()) + self.stages)

    def drop(self, index: int, last: int, hidden: Tensor, state: TowerState) -> tuple[Tensor, Tensor] | None:
        if index or state.side < WINDOW:
            return None
        window, middle = _windows(state.side, hidden.device)  # [window, 9], [window]
        hidden, there = state.on_raster(hidden)
        whole = there[:, window].all(dim=-1)  # [crop, window]; a window that lost patches before the tower stays as it is
        unit = normalize(hidden.float(), dim=-1)[:, window]  # [crop, window, 9, dim]
        similar = (unit.sum(dim=2).square().sum(dim=-1) - unit.square().sum(dim=(2, 3))) / (WINDOW**2 * (WINDOW**2 - 1))
        merged = (similar >= self.merge) & whole
        if self.windows is not None:
            merged = whole & alive_top(similar, torch.full(similar.shape[:1], self.windows, device=hidden.device), whole)
        mean = hidden[:, window].float().mean(dim=2).to(hidden.dtype)
        hidden[:, middle] = torch.where(merged[..., None], mean, hidden[:, middle])
        there[:, window], there[:, middle] = ~merged[..., None], True
        return state.off_raster(there), state.off_raster(hidden)

    def scores(self, see: View) -> Tensor:
        keys = top(see.attention_from_cls_final.mean(dim=1), min(math.ceil(0.08 * see.entered), see.visual))
        key_set = torch.zeros(see.images, see.visual, dtype=torch.bool, device=keys.device).scatter(1, keys, True)
        mass = see.attention_from_text.mean(dim=1).sum(dim=1)
        return mass + key_set * (mass.sum(dim=-1, keepdim=True) + 1)  # the key set above all others

    def select(self, see: View, keep: int) -> Tensor | Choice:
        wanted = self.scores(see)
        if not self.thresholds:
            return top(wanted, keep)
        attention = see.attention_from_text.mean(dim=1)  # [image, text, visual]
        mass = attention.sum(dim=1)
        total = mass.sum(dim=-1, keepdim=True)
        weak = (mass < self.global_threshold * total) & (attention.amax(dim=1) < self.individual_threshold)
        best = torch.zeros_like(weak).scatter(1, top(wanted, keep), True)  # never more than the budget
        return Choice([on_device(row.nonzero()[0], best.device) for row in on_host(((wanted > total) | ~weak) & best)])


def _windows(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Raster indices of the patches of every full window `[window, 9]`, and of its middle `[window]`."""
    start = torch.arange(side // WINDOW, device=device) * WINDOW
    inside = torch.arange(WINDOW, device=device)
    row = start[:, None, None, None] + inside[:, None]  # [row of windows, 1, 3, 1]
    column = start[:, None, None] + inside  # [column of windows, 1, 3]
    window = (row * side + column).reshape(-1, WINDOW**2)
    return window, window[:, WINDOW**2 // 2]
