"""PyramidDrop (arXiv:2410.17247), loop by loop."""

from __future__ import annotations

from methods.loops.plain import mean_of, top


def pdrop(attention, keep: int) -> list[int]:
    """Kept ids: the highest means over heads of the attention [head, visual] that the coming layer would pay from the last
    prompt token."""
    return top(mean_of(attention), keep)
