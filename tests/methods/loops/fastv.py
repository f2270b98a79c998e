"""FastV (arXiv:2403.06764), loop by loop."""

from __future__ import annotations

from methods.loops.plain import mean_of, top


def fastv(attention, keep: int) -> list[int]:
    """Kept ids: the highest means over heads of the attention [head, visual] from the last prompt token."""
    return top(mean_of(attention), keep)
