"""The equation, in fp32 (fp64 for fp64 inputs).

m[b, h, k] = Σ_r softmax_k( q[b, h, r] · k[b, h, k] · scaling )
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.dispatch import in_fp32, wide


@in_fp32
def attention_rows(query: Tensor, key: Tensor, scaling: float, visible: Tensor | None = None) -> Tensor:
    """Softmax attention of some query rows.

    Args:
        query: `[batch, head, row, dim]` the chosen rows, after rotary embedding.
        key: `[batch, kv_head, key, dim]`; `head` is a multiple of `kv_head` (grouped-query attention).
        scaling: factor on the scores, usually `dim ** -0.5`.
        visible: `[batch, row, key]` bool, False where a row must not look; every row needs one True.

    Returns:
        `[batch, head, row, key]` fp32. Costs one read of the keys and `2 · batch · head · row · key · dim` FLOPs.
    """
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.to(wide(query)).reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    scores = (grouped @ key.to(wide(key)).transpose(-1, -2)).reshape(batch, heads, rows, key.shape[2]) * scaling
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


@in_fp32
def attention_mass(query: Tensor, key: Tensor, scaling: float, visible: Tensor | None = None) -> Tensor:
    """`[batch, head, key]` fp32: the attention of `attention_rows`, summed over the rows."""
    return attention_rows(query, key, scaling, visible).sum(dim=2)
