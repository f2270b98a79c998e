"""Diverse subsets of the tokens of each picture: greedy max-min distance, and greedy determinants."""

from __future__ import annotations

from torch import Tensor

from vlmprune.kernels.dispatch import Impl, use_triton
from vlmprune.kernels.select_diverse import reference

__all__ = ["determinant_order", "greedy_order", "select_diverse"]


def greedy_order(features: Tensor, keep: int, impl: Impl = "auto") -> Tensor:
    """`[image, keep]` in the order of selection, see `reference.greedy_order`."""
    use_triton("select_diverse", impl)
    return reference.greedy_order(features, keep)


def select_diverse(features: Tensor, keep: int, impl: Impl = "auto") -> Tensor:
    """The same selected indices `[image, keep]`, rising."""
    return greedy_order(features, keep, impl).sort(dim=-1).values


def determinant_order(features: Tensor, weight: Tensor, keep: int, impl: Impl = "auto") -> Tensor:
    """`[image, keep]` in the order of selection, see `reference.determinant_order`."""
    use_triton("select_diverse", impl)
    return reference.determinant_order(features, weight, keep)
