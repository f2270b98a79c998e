"""Elementary arithmetic on lists of numbers, for the papers' formulas loop by loop.

The loops are written from the formulas (and, where those are silent, from facts read in the public code), sharing no code with
vlmprune. One picture, crop or sample at a time and no batch axis, so nothing can depend on a batch mate. Everything is computed
in float64; equal scores go to the lower index; kept indices are sorted ascending and exactly as many as asked for. A docstring
says what follows the paper, what the official code, and what is our own choice ("ours").
"""

from __future__ import annotations

import math

import torch


def floats(numbers) -> list:
    """A tensor or a list of numbers as nested lists of Python floats."""
    return torch.as_tensor(numbers, dtype=torch.float64).tolist()


def dot(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def length(a) -> float:
    return math.sqrt(dot(a, a))


def cosine(a, b) -> float:
    """0 for a zero vector, as a similarity that leans on no direction."""
    lengths = length(a) * length(b)
    return dot(a, b) / lengths if lengths > 0 else 0.0


def distance(a, b) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def mean(numbers) -> float:
    return sum(numbers) / len(numbers)


def mean_of(vectors) -> list:
    return [mean(column) for column in zip(*vectors, strict=True)]


def softmax(logits) -> list:
    high = max(logits)
    powers = [math.exp(x - high) for x in logits]
    total = sum(powers)
    return [x / total for x in powers]


def normalised(numbers) -> list:
    total = sum(numbers)
    return [x / total for x in numbers]


def ranking(scores) -> list:
    """Indices from the highest score to the lowest; the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def top(scores, keep: int) -> list:
    """The `keep` indices of the highest scores, ascending."""
    return sorted(ranking(scores)[:keep])
