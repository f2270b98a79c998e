"""Greedy selection over cosine similarity, in fp32 (fp64 for fp64 inputs): the equations. On a CPU `cpu.py` is faster.

max-min        first = argmax_j min_{i≠j} d(i, j);   next = argmax_{j∉S} min_{i∈S} d(i, j),   d = 1 − cosine
determinant    next = argmax_{j∉S} det L_{S∪{j}},   L_ij = w_i · cosine(i, j) · w_j

Similarities are computed one row at a time, and for the first pick of max-min in blocks of rows: nothing is n×n.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.kernels.dispatch import in_fp32, wide

RANK = 1e-6
"""A token whose remaining length is below this share of its own adds nothing: the rest is rounding."""

CHUNK = 256
"""Rows of the similarity matrix that exist at a time."""


@in_fp32
def greedy_order(features: Tensor, keep: int) -> Tensor:
    """Max-min selection, in the order of picking, `[image, keep]`.

    Args:
        features: `[image, visual, dim]`, any float dtype; computed in fp32, or fp64 if they are.
        keep: tokens to pick of each picture, at most `visual`. Ties go to the lower index; no index is picked twice, also
            where tokens are exact duplicates.
    """
    unit = normalize(features.detach().to(wide(features)), dim=-1)
    images, visual, _ = unit.shape
    rows = torch.arange(images, device=features.device)
    order = torch.empty(images, keep, dtype=torch.long, device=features.device)
    if keep == 0:
        return order
    pick = _nearest_other(unit).argmax(dim=-1)
    apart = unit.new_full((images, visual), torch.inf)  # distance to the nearest selected token; −inf once selected
    for step in range(keep):
        order[:, step] = pick
        torch.minimum(apart, 1.0 - _similarity(unit, pick), out=apart)
        apart[rows, pick] = -torch.inf
        pick = apart.argmax(dim=-1)
    return order


def _similarity(unit: Tensor, pick: Tensor) -> Tensor:
    """`[image, visual]` of every token to its picture's pick, `[image]`."""
    rows = torch.arange(len(unit), device=unit.device)
    return (unit @ unit[rows, pick][..., None])[..., 0]


def _nearest_other(unit: Tensor) -> Tensor:
    """`[image, visual]` distance of every token to the nearest other one."""
    nearest = unit.new_empty(unit.shape[:2])
    for start in range(0, unit.shape[1], CHUNK):
        block = unit[:, start : start + CHUNK] @ unit.transpose(-1, -2)  # [image, chunk, visual]
        block.diagonal(start, dim1=-2, dim2=-1).fill_(-torch.inf)
        nearest[:, start : start + CHUNK] = 1.0 - block.amax(dim=-1)
    return nearest


@in_fp32
def determinant_order(features: Tensor, weight: Tensor, keep: int) -> Tensor:
    """Greedy maximum a posteriori set of a determinantal point process, in the order of picking, `[image, keep]`.

    Incremental Cholesky factorisation (Chen et al., NeurIPS 2018, arXiv:1709.05135, algorithm 1): O(keep² · visual).

    Args:
        features: `[image, visual, dim]`, any float dtype; computed in fp32, or fp64 if they are.
        weight: `[image, visual]` w, at least 0.
        keep: tokens to pick of each picture, at most `visual`. Where the determinant is zero for all further tokens, picks
            continue by index, so that the count is exact.
    """
    unit = normalize(features.detach().to(wide(features)), dim=-1) * weight.detach().to(wide(features))[..., None]
    images, visual, _ = unit.shape
    rows = torch.arange(images, device=features.device)
    order = torch.empty(images, keep, dtype=torch.long, device=features.device)
    gain = unit.square().sum(-1)  # squared distance of each token to the span of the selected ones; −1 once selected
    rounding = RANK * gain
    factor = unit.new_zeros(images, keep, visual)
    for step in range(keep):
        pick = gain.argmax(dim=-1)
        order[:, step] = pick
        similarity = _similarity(unit, pick)
        shared = (factor[:, :step] * factor[rows, :step, pick][..., None]).sum(dim=1)
        length = gain[rows, pick].clamp_min(0).sqrt()
        length = torch.where(length > 0, length, torch.inf)  # the token adds nothing
        factor[:, step] = (similarity - shared) / length[:, None]
        left = gain - factor[:, step].square()
        gain = torch.where(gain < 0, gain, torch.where(left > rounding, left, 0))
        gain[rows, pick] = -1
    return order
