"""PAINT. Arif et al., arXiv:2501.12206; code hasanar1f/PAINT @ 2a9e8f8.

    c⁰, c¹ = attention of the tower's CLS token to each token, summed over heads: first block; block that feeds the projector
    summary = { j : c¹_j > Q₃ + 1.5 (Q₃ − Q₁) },   local = the top 25 % of c⁰, without the summary
    s′_k = s_k + α |s_k| (local),  s_k + β |s_k| (summary)      the last row of a prompt, and decoding; layers from 2; all heads

Differs from the official code in: its option `top_token_ratio` (here `local`) does something; the spatial set, which ranks
rounding errors (softmax rows sum to one) and is off by default, is left out; no guidance of the logits, as in `pai`; sets are
made of the whole picture, and what was pruned is gone from them. The first version's abstract speaks of modulating heads by
their visual sensitivity; the code has no such thing and no formula for it was found, so that all heads are edited alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmprune.device import on_device
from vlmprune.methods.parameters import number
from vlmprune.methods.redistributing import Scene, ScoreEditor

LOCAL, SUMMARY = 1, 2


@dataclass(frozen=True, kw_only=True)
class PAINT(ScoreEditor):
    """Raise the scores of visual tokens that the vision tower's CLS token looks at.

    Args:
        alpha: by which share of their size, for local tokens.
        beta: by which share of their size, for summary tokens.
        local: share of a picture's tokens that are local.
    """

    name = "paint"
    paper = "arXiv:2501.12206"
    note = "all heads, as its code; no spatial set, no guidance of the logits"
    rows = "last"
    default_layers = "2:"
    needs = frozenset({"attention_from_cls_first", "attention_from_cls"})
    presets = {"paper": {"alpha": 0.7, "beta": 0.4}, "released-code": {"alpha": 0.7, "beta": 0.3}}  # noqa: RUF012

    alpha: float = number(0.7, low=0, high=100)
    beta: float = number(0.4, low=0, high=100)
    local: float = number(0.25, low=0, high=1)

    @property
    def neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    @property
    def strengths(self) -> tuple[float, ...]:
        return self.alpha, self.beta

    def groups(self, see: Scene) -> Tensor:
        groups = torch.zeros(see.prompt.shape, dtype=torch.int8, device=see.prompt.device)
        for picture in see.pictures:
            early, late = (
                picture.tower[name].float().sum(dim=-1) for name in ("attention_from_cls_first", "attention_from_cls")
            )
            sets = torch.zeros(picture.original, dtype=torch.int8, device=early.device)
            sets[early.argsort(descending=True, stable=True)[: int(self.local * picture.original)]] = LOCAL
            low, high = late.quantile(on_device(np.array([0.25, 0.75]), late.device).to(late))
            sets[late > high + 1.5 * (high - low)] = SUMMARY
            groups[picture.sample, picture.rows] = sets[picture.index.to(sets.device)].to(groups.device)
        return groups[:, None]
