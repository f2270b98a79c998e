"""FasterVLM's rule (arXiv:2412.01818), loop by loop."""

from __future__ import annotations

from methods.loops.plain import mean_of, top


def cls(attention, keep: int) -> list[int]:
    """Kept ids: the highest means over heads of the attention [head, patch] from the CLS token."""
    return top(mean_of(attention), keep)
