"""EVS (arXiv:2510.14624) on features, loop by loop."""

from __future__ import annotations

import math

from methods.loops.plain import cosine, floats, ranking


def evs(features, position, frames: int, cells: int, keep: int) -> list:
    """Kept places of one video's tokens `[n, d]`; `position` says which of the `frames · cells` tokens each is.

    Formula (section 3, on embeddings as in vLLM's code): a token differs from the token at its cell in the frame before by
    1 − cosine; tokens of the first frame differ infinitely; the K largest differences of the video stay, the earlier token
    among equals. Ours: where the frame before has lost the cell, the last frame that has it counts, and none means infinitely.
    """
    x = floats(features)
    at = {(place // cells, place % cells): token for token, place in enumerate(position)}
    differs = []
    for token, place in enumerate(position):
        frame, cell = divmod(place, cells)
        before = [earlier for earlier in range(frame) if (earlier, cell) in at]
        differs.append(1 - cosine(x[token], x[at[before[-1], cell]]) if before else math.inf)
    assert len(position) == len(x)
    assert max(position) < frames * cells
    return sorted(ranking(differs)[:keep])


def vllm_count(cells: int, frames: int, rate: float) -> int:
    """How many tokens vLLM keeps at a pruning rate: at least those of the first frame."""
    return max(cells, int(cells * frames * (1 - rate)))
