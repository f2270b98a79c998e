"""Evenly spaced tokens, loop by loop."""

from __future__ import annotations

import math


def uniform(visual: int, keep: int) -> list[int]:
    """Kept ids: the middle of each of `keep` equal parts of 0 to `visual`, rounded down."""
    return [math.floor((i + 0.5) * visual / keep) for i in range(keep)]
