"""Attention that chosen query rows pay to every key, without the other rows: no n×n map is ever built.

Moved at least: keys and the chosen rows read once, the result written once in fp32; `2 · batch · head · row · key · dim` FLOPs
for the scores and 3 for each number of the softmax. The figure to measure against is one read of the keys. The kernels read
them twice, the second time mostly from the L2 cache: softmax totals of each row first (the keys split among programs, so that a
single row fills the GPU too), then the numbers themselves.

On an H200 (4.8 TB/s, 989 TFLOP/s in bf16), the last row of 2,880 keys of Qwen2.5-VL-7B (28 heads on 4, size 128, bf16): 2.9 MB
of keys and 0.3 MB of result, 0.7 µs; 21 MFLOP, 0.02 µs. All 577 rows of CLIP-L (16 heads of 64, bf16): 2.4 MB, 0.5 µs;
0.7 GFLOP, 0.7 µs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.attention_mass import reference
from vlmprune.kernels.dispatch import Checked, Cost, Impl, bytes_of, check, check_heads, use_triton

__all__ = ["attention_mass", "attention_rows", "cost", "rows_cost"]


def attention_rows(query: Tensor, key: Tensor, scaling: float, visible: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """`[batch, head, row, key]` fp32, see `reference.attention_rows`. Detached, where a kernel computes it.

    Raises:
        UsageError: shapes or dtypes that do not fit; an implementation that cannot run.
    """
    if not _attention_rows(impl, False, query, key, visible):
        return reference.attention_rows(query, key, scaling, visible)
    from vlmprune.kernels.attention_mass import kernel

    return kernel.attention_rows(query, key, scaling, visible)


def attention_mass(query: Tensor, key: Tensor, scaling: float, visible: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """`[batch, head, key]` fp32, see `reference.attention_mass`. Detached, where a kernel computes it.

    The kernel has no buffer of rows by keys.

    Raises:
        UsageError: shapes or dtypes that do not fit; an implementation that cannot run.
    """
    if not _attention_mass(impl, False, query, key, visible):
        return reference.attention_mass(query, key, scaling, visible)
    from vlmprune.kernels.attention_mass import kernel

    return kernel.attention_mass(query, key, scaling, visible)


def cost(query: Tensor, key: Tensor, scaling: float, visible: Tensor | None = None) -> Cost:
    """What `attention_mass` must do."""
    batch, heads, rows, dim = query.shape
    keys = key.shape[2]
    return Cost(bytes_of(query, key, visible) + 4 * batch * heads * keys, batch * heads * rows * keys * (2 * dim + 4))


def rows_cost(query: Tensor, key: Tensor, scaling: float, visible: Tensor | None = None) -> Cost:
    """What `attention_rows` must do."""
    batch, heads, rows, dim = query.shape
    keys = key.shape[2]
    return Cost(bytes_of(query, key, visible) + 4 * batch * heads * rows * keys, batch * heads * rows * keys * (2 * dim + 3))


def _choose(op: str, impl: Impl, _: bool, query: Tensor, key: Tensor, visible: Tensor | None) -> bool:
    check(op, "query", query, (None, None, None, None))
    check(op, "key", key, (query.shape[0], None, None, query.shape[3]))
    check_heads(op, query, key)
    if visible is not None:
        check(op, "visible", visible, (query.shape[0], query.shape[2], key.shape[2]), torch.bool)
    return use_triton(op, impl, query=query, key=key, visible=visible)


_attention_rows, _attention_mass = Checked("attention_rows", _choose), Checked("attention_mass", _choose)
