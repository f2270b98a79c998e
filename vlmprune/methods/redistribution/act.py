"""ACT, attention calibration. Yu et al., ICML 2024, arXiv:2406.15765; code GATECH-EIC/ACT @ a267af7. Made for text models.

    m_j = mean attention that token j gets from the prompt's rows that see it, per head
    sinks of a head = { j : m_j > α / N } without the first token,   N tokens in the prompt
    a′_k = β · a_k                                          k a sink
    a′_k = a_k · (1 + (1 − β) · μ_S / (1 − μ_S))            all others, the first token included; rows still sum to one

Differs from the official code in: threshold α/N, as the paper (there 0.1, here `threshold`); the first token is left out by its
place (there the first sink found, which may be a real one); decoding goes on with the prompt's sinks (there every step makes
new ones of a map with one row, and rows do not sum to one); all heads of the given layers, where the paper searches for heads
on labelled data. What is done to a row of the prompt depends on the rows after it, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.methods.parameters import number
from vlmprune.methods.redistributing import GroupEditor, Scene


@dataclass(frozen=True, kw_only=True)
class ACT(GroupEditor):
    """Take attention from each head's sinks after the first token.

    Args:
        beta: share of their attention that sinks keep.
        alpha: a sink gets at least this many times the attention of 1/N.
        threshold: a fixed one instead, as the code's 0.1.
    """

    name = "act"
    paper = "arXiv:2406.15765 (ICML 2024)"
    note = "safe in decoding; all heads of the given layers: no search"
    rows = "all"
    default_layers = "2:-1"
    group_count = 1
    causal = False
    presets = {"released-code": {"threshold": 0.1}}  # noqa: RUF012

    beta: float = number(0.4, low=0, high=1)
    alpha: float = number(5.0, low=0, high=1e6)
    threshold: float | None = number(None, low=0, high=1)

    @property
    def neutral(self) -> bool:
        return self.beta == 1

    def groups(self, see: Scene) -> Tensor:
        counts = see.prompt.sum(dim=1)[:, None, None]
        means = see.column_means()
        sinks = means > (self.alpha / counts if self.threshold is None else self.threshold)
        groups = (sinks & see.prompt[:, None]).to(torch.int8)
        return groups if see.first is None else groups.scatter(2, see.first[:, None, None].expand(-1, groups.shape[1], -1), 0)

    def coefficients(self, mass: Tensor, present: Tensor | None = None) -> Tensor:
        rest, sinks = mass.unbind(dim=-1)
        possible = rest > torch.finfo(mass.dtype).tiny  # a row that sees sinks only has nothing to give to
        one = torch.ones_like(rest)
        gain = torch.where(possible, 1 + (1 - self.beta) * sinks / torch.where(possible, rest, one), one)
        return torch.stack((gain, torch.where(possible, self.beta, one)), dim=-1)
