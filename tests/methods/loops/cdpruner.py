"""CDPruner (arXiv:2506.10967), loop by loop."""

from __future__ import annotations

import math

import torch
from methods.loops.plain import cosine, floats, mean


def cdpruner_relevance(features_cosine) -> list:
    """Relevance of every token from its cosines [n, m] with the m texts (code).

    Code: r = -mean over texts, then (r - min + 1e-6) / (max - min).  Ours: min and max over all views of this picture (the
    code: of all pictures in the batch), and 1 for all if they are equal.
    """
    relevance = [-mean(row) for row in floats(features_cosine)]
    low, high = min(relevance), max(relevance)
    if high == low:
        return [1.0] * len(relevance)
    return [(r - low + 1e-6) / (high - low) for r in relevance]


def cdpruner(features, relevance, keep: int) -> list:
    """Greedy MAP of the determinantal point process with kernel r_i cos_ij r_j (paper and code), done naively.

    Every step takes the token that makes the determinant of the chosen tokens' kernel largest; the official incremental
    Cholesky form takes the same ones.  Meaningful only up to the rank of the features: beyond it every determinant is 0 but
    for rounding, and the lowest index left is taken (ours).
    """
    features, relevance = floats(features), floats(relevance)
    n = len(features)
    kernel = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            kernel[i, j] = relevance[i] * cosine(features[i], features[j]) * relevance[j]
    chosen = []
    while len(chosen) < keep:
        best, best_value = None, -math.inf
        for j in range(n):
            if j in chosen:
                continue
            rows = torch.tensor([*chosen, j])
            sign, value = torch.linalg.slogdet(kernel[rows][:, rows])
            value = float(value) if sign > 0 else -math.inf
            if best is None or value > best_value:
                best, best_value = j, value
        chosen.append(best)
    return sorted(chosen)
