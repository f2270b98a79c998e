"""Attention of chosen query rows with an edit that is decided per row: by masses of groups of keys, or on the scores.

With R = rows · heads and K keys of size d: `grouped_attention` and `scored_attention` read queries, keys and values once and
write R · d fp32 numbers; 4 · batch · R · K · d FLOPs for the two products, half of it where rows are causal. `column_means`
reads queries and keys, and makes the one product twice: 4 · batch · R · K · d. Figures to measure against, on an H200:

    one row (decoding)    the memory's 4.8 TB/s. 32 heads of 128 over 32 768 keys in bf16 with 8 KV heads: 134 MB, 28 µs; with
                          32 of them 537 MB, 112 µs. Groups cost no further read of K or V. Short contexts are bound by
                          launches: three kernels, and a dozen small operations of `coefficients`, where plain attention has
                          one or two; 1.1 × SDPA is to be expected where keys and values take far longer than these.
    many rows (prefill)   the tensor cores' 989 TFLOP/s in bf16. 60 rows over 640 keys, 32 heads of 128: 0.6 GFLOP, 0.6 µs; all
                          4096 rows of a prompt: 275 GFLOP (half if causal), 0.3 ms. The scores are made twice: 1.5 × the FLOPs.
    fp32                  67 TFLOP/s, no tensor cores.

Gradients: the torch reference has them, kernels have none. With "auto", a call that needs a gradient (one of query, key and
value requires it, and gradients are enabled) therefore takes the reference; with "triton" it is refused. `column_means` has
none: callers detach its arguments, and it is for finding marks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmprune.errors import UsageError
from vlmprune.kernels.dispatch import Checked, Cost, Impl, bytes_of, check, check_dim, check_heads, use_triton
from vlmprune.kernels.grouped_attention import cpu, reference
from vlmprune.kernels.grouped_attention.reference import Coefficients
from vlmprune.kernels.grouped_attention.reference import grouped_attention as plain_grouped
from vlmprune.kernels.grouped_attention.reference import scored_attention as plain_scored

__all__ = [
    "Coefficients",
    "checked_grouped",
    "checked_scored",
    "column_means",
    "cost",
    "grouped_attention",
    "plain_grouped",
    "plain_scored",
    "scored_attention",
]


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
    """Output `[batch, row, head, dim]`, factors and masses `[batch, head, row, group]`, see `reference`.

    Raises:
        UsageError: shapes or dtypes that do not fit, more marked keys than keys, or an implementation that cannot run.
    """
    op = checked_grouped(query, key, value, position, valid, groups, impl)
    return op(query, key, value, scaling, position, valid, groups, coefficients)


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
    """`[batch, row, head, dim]`, see `reference.scored_attention`.

    Raises:
        UsageError: shapes or dtypes that do not fit, more weights than keys, or an implementation that cannot run.
    """
    op = checked_scored(query, key, value, position, valid, weight, impl)
    return op(query, key, value, scaling, position, valid, weight)


def checked_grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    valid: Tensor | None,
    groups: Tensor,
    impl: Impl = "auto",
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The implementation of `grouped_attention` for such arguments. Decoding calls it again and again, with one more key each
    time and without gradients, and no argument is checked again.

    Raises:
        UsageError: as `grouped_attention`.
    """
    gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not _grouped_attention(impl, gradients, query, key, value, position, valid, groups):
        plain = impl == "auto" and not gradients and groups.shape[2] == key.shape[2]
        lean = plain and cpu.fits(query, key, value, position, valid, groups)
        return cpu.grouped_attention if lean else reference.grouped_attention
    from vlmprune.kernels.grouped_attention import kernel

    return kernel.grouped_attention


def checked_scored(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    valid: Tensor | None,
    weight: Tensor,
    impl: Impl = "auto",
) -> Callable[..., Tensor]:
    """The implementation of `scored_attention` for such arguments, as `checked_grouped`.

    Raises:
        UsageError: as `scored_attention`.
    """
    gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not _scored_attention(impl, gradients, query, key, value, position, valid, weight):
        plain = impl == "auto" and not gradients and weight.shape[1] == key.shape[2]
        lean = plain and cpu.fits(query, key, value, position, valid, weight)
        return cpu.scored_attention if lean else reference.scored_attention
    from vlmprune.kernels.grouped_attention import kernel

    return kernel.scored_attention


def column_means(
    query: Tensor,
    key: Tensor,
    scaling: float,
    position: Tensor,
    valid: Tensor | None,
    counted: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """`[batch, head, key]` fp32, see `reference.column_means`.

    Raises:
        UsageError: shapes or dtypes that do not fit, or an implementation that cannot run.
    """
    if not _column_means(impl, False, query, key, position, valid, counted):
        return reference.column_means(query, key, scaling, position, valid, counted)
    from vlmprune.kernels.grouped_attention import kernel

    return kernel.column_means(query, key, scaling, position, valid, counted)


def cost(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, marks: Tensor) -> Cost:
    """What `grouped_attention` (marks: its groups) or `scored_attention` (its weight) must do, if rows see all keys."""
    batch, heads, rows, dim = query.shape
    width = value.shape[3]
    written = 4 * batch * heads * rows * width
    return Cost(bytes_of(query, key, value, valid, marks) + written, 2 * batch * heads * rows * key.shape[2] * (dim + width))


def _choose_grouped(
    op: str,
    impl: Impl,
    gradients: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    valid: Tensor | None,
    groups: Tensor,
) -> bool:
    _check(op, query, key, value, position, valid)
    check(op, "groups", groups, (query.shape[0], None, None, None))
    if groups.shape[1] not in (1, query.shape[1]):
        raise UsageError(f"{op}: groups must be of 1 or {query.shape[1]} heads as query has, found {groups.shape[1]}.")
    return _choose_marked(op, impl, gradients, query, key, value, position, valid, groups=groups)


def _choose_scored(
    op: str,
    impl: Impl,
    gradients: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    valid: Tensor | None,
    weight: Tensor,
) -> bool:
    _check(op, query, key, value, position, valid)
    check(op, "weight", weight, (query.shape[0], None))
    return _choose_marked(op, impl, gradients, query, key, value, position, valid, weight=weight)


def _choose_marked(
    op: str,
    impl: Impl,
    gradients: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    valid: Tensor | None,
    **marks: Tensor,
) -> bool:
    ((name, x),) = marks.items()
    marked = x.shape[-2] if name == "groups" else x.shape[-1]
    if marked > key.shape[2]:
        raise UsageError(f"{op}: {name} is about {marked} keys, but there are {key.shape[2]}.")
    if gradients and impl == "triton":
        raise UsageError(f"{op}: kernels have no gradients, but query, key or value needs one: pass impl='reference'.")
    impl = "reference" if gradients and impl == "auto" else impl
    kernel = use_triton(op, impl, False, query=query, key=key, value=value, position=position, valid=valid, **marks)
    if kernel:
        check_dim(op, "query", query.shape[3])
        check_dim(op, "value", value.shape[3])
    return kernel


def _choose_means(
    op: str, impl: Impl, _: bool, query: Tensor, key: Tensor, position: Tensor, valid: Tensor | None, counted: Tensor
) -> bool:
    _check(op, query, key, None, position, valid)
    check(op, "counted", counted, (query.shape[0], query.shape[2]), torch.bool)
    kernel = use_triton(op, impl, query=query, key=key, position=position, valid=valid, counted=counted)
    if kernel:
        check_dim(op, "query", query.shape[3])
    return kernel


def _check(op: str, query: Tensor, key: Tensor, value: Tensor | None, position: Tensor | None, valid: Tensor | None) -> None:
    check(op, "query", query, (None, None, None, None))
    batch, _, rows, dim = query.shape
    check(op, "key", key, (batch, None, None, dim))
    check_heads(op, query, key)
    if value is not None:
        check(op, "value", value, (batch, key.shape[1], key.shape[2], None))
        if value.dtype != query.dtype:
            raise UsageError(f"{op}: value is {value.dtype} but query {query.dtype}: convert one of them.")
    if position is not None:
        check(op, "position", position, (1 if position.shape[0] == 1 else batch, rows), torch.int64)
    if valid is not None:
        check(op, "valid", valid, (batch, key.shape[2]), torch.bool)


_grouped_attention = Checked("grouped_attention", _choose_grouped)
_scored_attention = Checked("scored_attention", _choose_scored)
_column_means = Checked("column_means", _choose_means)
