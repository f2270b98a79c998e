"""ACT (arXiv:2406.15765) as the paper writes it: the whole softmax, one row and one key at a time, then the edit."""

from __future__ import annotations

import math

from redistribution.loops.plain import softmax
from tiny_models import LAYERS


def act_row(a: list[float], sinks: list[bool], beta: float) -> list[float]:
    held = math.fsum(w for w, sink in zip(a, sinks, strict=True) if sink)
    rest = math.fsum(w for w, sink in zip(a, sinks, strict=True) if not sink)
    if not rest:
        return a
    return [beta * w if sink else w + (1 - beta) * held * w / rest for w, sink in zip(a, sinks, strict=True)]


def act(beta, alpha):
    known: dict = {}

    def sinks(oracle, layer, sample, head, seen, scores):
        name = layer, sample, head
        if name not in known:
            real = oracle.real[sample].nonzero()[:, 0].tolist()
            rows = {row: dict(zip(seen[row], softmax(scores[row]), strict=True)) for row in real}
            means = {k: math.fsum(rows[row][k] for row in real if row >= k) / sum(row >= k for row in real) for k in real}
            known[name] = {k for k in real[1:] if means[k] > alpha / len(real)}
        return known[name]

    def edit(oracle, layer, sample, head, row, seen, scores):
        found = sinks(oracle, layer, sample, head, seen, scores)
        return act_row(softmax(scores[row]), [k in found for k in seen[row]], beta)

    return edit


def edited(eager, inputs):
    """The layers that the row of `cases.py` edits in the tiny models, and the edit, for `redistribution.explicit.Explicit`."""
    return range(2, LAYERS - 1), act(0.4, 2.0)
