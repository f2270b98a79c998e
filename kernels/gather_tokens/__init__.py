"""Kept tokens copied to compact buffers: hidden states, rotary embeddings, keys and values.

The least work is: kept rows read once and written once, `2 · batch · … · kept · dim` numbers, and the indices; no FLOPs. The
bound to measure against is the bandwidth of a copy on the same machine. On an H200 (4.8 TB/s), keys and values of 28 layers,
8 heads of size 128, 640 tokens kept, bf16: 2 · 28 · 2 · 8 · 640 · 128 · 2 bytes = 147 MB, 31 µs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune.errors import UsageError
from vlmprune.kernels.dispatch import Checked, Cost, Impl, bytes_of, check, use_triton
from vlmprune.kernels.gather_tokens import reference

__all__ = ["cost", "cost_of_all", "gather_all", "gather_tokens"]


def gather_tokens(x: Tensor, rows: Tensor, valid: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """`[batch, …, kept, dim]`, see `reference.gather_tokens`. Any dtype, differentiable in every implementation.

    An index outside `x` raises an error in the torch reference, and gives a row of NaN in the kernel.

    Raises:
        UsageError: shapes or dtypes that do not fit; an implementation that cannot run.
    """
    if not _gather_tokens(impl, False, rows, valid, x):
        return reference.gather_tokens(x, rows, valid)
    from vlmprune.kernels.gather_tokens import kernel

    return kernel.gather_tokens(x, rows, valid)


def gather_all(tensors: Sequence[Tensor], rows: Tensor, valid: Tensor | None = None, impl: Impl = "auto") -> list[Tensor]:
    """`gather_tokens` of several tensors, of any shapes and dtypes, in one launch.

    Args:
        tensors: `[batch or 1, …, token, dim]` each.
        rows, valid: as in `gather_tokens`, for all of them.

    Raises:
        UsageError: shapes or dtypes that do not fit; an implementation that cannot run.
    """
    if not _gather_all(impl, False, rows, valid, *tensors):
        return reference.gather_all(tensors, rows, valid)
    from vlmprune.kernels.gather_tokens import kernel

    return kernel.gather_all(tensors, rows, valid)


def cost(x: Tensor, rows: Tensor, valid: Tensor | None = None) -> Cost:
    """The least work of `gather_tokens`."""
    return cost_of_all([x], rows, valid)


def cost_of_all(tensors: Sequence[Tensor], rows: Tensor, valid: Tensor | None = None) -> Cost:
    """The least work of `gather_all`; kept rows that a batch shares are read once."""
    moved = bytes_of(rows, valid)
    for x in tensors:
        row = x.element_size() * x.shape[1:-2].numel() * x.shape[-1] * rows.shape[1]
        moved += row * (rows.shape[0] + min(x.shape[0], rows.shape[0]))
    return Cost(moved, 0)


def _choose_one(op: str, impl: Impl, _: bool, rows: Tensor, valid: Tensor | None, x: Tensor) -> bool:
    _check(op, rows, valid, x=x)
    return use_triton(op, impl, any_dtype=True, x=x, rows=rows, valid=valid)


def _choose_all(op: str, impl: Impl, _: bool, rows: Tensor, valid: Tensor | None, *tensors: Tensor) -> bool:
    named = {f"tensors[{place}]": x for place, x in enumerate(tensors)}
    _check(op, rows, valid, **named)
    return use_triton(op, impl, any_dtype=True, rows=rows, valid=valid, **named)


def _check(op: str, rows: Tensor, valid: Tensor | None, **named: Tensor) -> None:
    for place, (name, x) in enumerate(named.items()):
        if not place:
            check(op, "rows", rows, (None, None), torch.int64)
        if x.ndim < 3 or x.shape[0] not in (1, rows.shape[0]):
            raise UsageError(
                f"{op}: {name} must have shape [{rows.shape[0]} or 1, …, token, dim] as rows has, found {list(x.shape)}."
            )
        if valid is not None and not place:
            check(op, "valid", valid, tuple(rows.shape), torch.bool)


_gather_tokens, _gather_all = Checked("gather_tokens", _choose_one), Checked("gather_all", _choose_all)
