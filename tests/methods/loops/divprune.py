"""DivPrune (arXiv:2503.02175, algorithm 1), loop by loop."""

from __future__ import annotations

import torch


def divprune(features: torch.Tensor, keep: int) -> list[int]:
    """DivPrune (arXiv:2503.02175, algorithm 1) for the features [n, dim] of one image, in the order of selection.

    First the token whose nearest other token is farthest away, then repeatedly the token farthest from the chosen set.
    """
    n = len(features)
    unit = [row / row.norm() for row in features.double()]
    distance = [[1 - float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)]
    chosen: list[int] = []
    while len(chosen) < keep:
        best, best_distance = -1, -float("inf")
        for j in range(n):
            if j in chosen:
                continue
            others = chosen or [i for i in range(n) if i != j]
            nearest = min((distance[i][j] for i in others), default=0.0)
            if nearest > best_distance:
                best, best_distance = j, nearest
        chosen.append(best)
    return chosen
