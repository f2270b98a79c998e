"""The softmax of one row, by a loop, and scores that are raised before it."""

from __future__ import annotations

import math


def softmax(scores: list[float]) -> list[float]:
    highest = max(scores)
    powers = [math.exp(score - highest) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


def raised(scores: list[float], shares: list[float]) -> list[float]:
    """PAI, PAINT: the softmax of scores that are raised by a share of their size."""
    return softmax([score + share * abs(score) for score, share in zip(scores, shares, strict=True)])
