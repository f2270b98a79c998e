"""Greedy max-min selection over cosine distance, in fp32.

d(i, j) = 1 − x_i·x_j / (|x_i| |x_j|)
first = argmax_j min_{i≠j} d(i, j);   next = argmax_{j∉S} min_{i∈S} d(i, j)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def greedy_order(features: Tensor, keep: int) -> Tensor:
    """Indices in the order of their selection, `[image, keep]`.

    Args:
        features: `[image, visual, dim]`, any float dtype; computed in fp32.
        keep: tokens to pick of each picture, at most `visual`. Ties go to the lower index; no index is picked twice, also
            where tokens are exact duplicates.
    """
    unit = normalize(features.float(), dim=-1)
    distance = 1.0 - unit @ unit.transpose(-1, -2)  # [image, visual, visual]
    images, visual, _ = distance.shape
    rows = torch.arange(images, device=features.device)
    order = torch.empty(images, keep, dtype=torch.long, device=features.device)
    if keep == 0:
        return order
    itself = torch.eye(visual, dtype=torch.bool, device=features.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(dim=-1)  # distance to the nearest other token
    pick = nearest.argmax(dim=-1)
    apart = torch.full_like(nearest, torch.inf)  # distance to the nearest selected token; −inf once taken
    for step in range(keep):
        order[:, step] = pick
        apart = torch.minimum(apart, distance[rows, pick])
        apart[rows, pick] = -torch.inf
        pick = apart.argmax(dim=-1)
    return order


def select_diverse(features: Tensor, keep: int) -> Tensor:
    """The selected indices `[image, keep]`, rising."""
    return greedy_order(features, keep).sort(dim=-1).values
