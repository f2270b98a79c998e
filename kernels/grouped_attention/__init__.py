"""Attention of chosen query rows with an edit that is decided per row: by masses of groups of keys, or on the scores."""

from __future__ import annotations

from torch import Tensor

from vlmprune.kernels.dispatch import Impl, use_triton
from vlmprune.kernels.grouped_attention import reference
from vlmprune.kernels.grouped_attention.reference import Coefficients

__all__ = ["Coefficients", "column_means", "grouped_attention", "scored_attention"]


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    position: Tensor | None,
    valid: Tensor | None,
    groups: Tensor,
    coefficients: Coefficients,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[batch, row, head, dim]`, factors and masses `[batch, head, row, group]`, see `reference`."""
    use_triton("grouped_attention", impl)
    return reference.grouped_attention(query, key, value, scaling, position, valid, groups, coefficients)


def scored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    position: Tensor | None,
    valid: Tensor | None,
    weight: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """`[batch, row, head, dim]`, see `reference.scored_attention`."""
    use_triton("scored_attention", impl)
    return reference.scored_attention(query, key, value, scaling, position, valid, weight)


def column_means(
    query: Tensor,
    key: Tensor,
    scaling: float,
    position: Tensor,
    valid: Tensor | None,
    counted: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """`[batch, head, key]` fp32, see `reference.column_means`."""
    use_triton("column_means", impl)
    return reference.column_means(query, key, scaling, position, valid, counted)
