"""Attention that chosen query rows pay to every key, without the other rows: no n×n map is ever built."""

from __future__ import annotations

from torch import Tensor

from vlmprune.kernels.attention_mass import reference
from vlmprune.kernels.dispatch import Impl, use_triton

__all__ = ["attention_mass", "attention_rows"]


def attention_rows(query: Tensor, key: Tensor, scaling: float, visible: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """`[batch, head, row, key]` fp32, see `reference.attention_rows`."""
    use_triton("attention_rows", impl)
    return reference.attention_rows(query, key, scaling, visible)


def attention_mass(query: Tensor, key: Tensor, scaling: float, visible: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """`[batch, head, key]` fp32, see `reference.attention_mass`."""
    use_triton("attention_mass", impl)
    return reference.attention_mass(query, key, scaling, visible)
