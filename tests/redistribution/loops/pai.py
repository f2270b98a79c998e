"""PAI (arXiv:2407.21771) as the paper writes it: the whole softmax, one row and one key at a time, then the edit."""

from __future__ import annotations

from redistribution.loops.plain import raised, softmax
from tiny_models import LAYERS


def pai(alpha):
    def edit(oracle, layer, sample, head, row, seen, scores):
        if row < oracle.prompt - 1:
            return softmax(scores[row])
        return raised(scores[row], [alpha * float(k < oracle.prompt and oracle.visual[sample, k]) for k in seen[row]])

    return edit


def edited(eager, inputs):
    """The layers that the row of `cases.py` edits in the tiny models, and the edit, for `redistribution.explicit.Explicit`."""
    return range(2, LAYERS), pai(0.5)
