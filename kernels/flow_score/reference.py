"""The equations, in fp32, and fp64 for fp64 inputs (FlowCut, arXiv:2505.19536, section 3.1).

relation   a_j = mean_h softmax_j( q_g^h · k_j^h · scaling )
semantic   s_j = mean_h softmax_j( v_g^h · v_j^h · semantic_scaling )
magnitude  d_j = ‖ mean_h v_j^h ‖₁          (as the code: heads are averaged before the norm)
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.dispatch import in_fp32, wide


@in_fp32
def flow_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    anchor: Tensor,
    scaling: float,
    semantic_scaling: float,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of each token in the flow to a global token.

    Args:
        query: `[crop, head, dim]` of the global token.
        key, value: `[crop, kv_head, token, dim]`; `head` is a multiple of `kv_head`. The softmax runs over just these.
        anchor: `[crop, kv_head, dim]` value of the global token.
        scaling, semantic_scaling: factors on the two kinds of scores.
        valid: `[crop, token]` bool, False on padding, whose relation and semantic are zero.

    Returns:
        Relation, semantic and magnitude, `[crop, token]` fp32 each. One read of keys and values:
        `crop · kv_head · token · dim · 2` numbers, `2 · crop · (head + kv_head) · token · dim` FLOPs.
    """
    key, value = key.to(wide(key)), value.to(wide(value))
    crops, kv_heads, _, dim = key.shape
    grouped = query.to(wide(query)).reshape(crops, kv_heads, -1, dim)
    relation = _products(grouped, key).flatten(1, 2) * scaling  # [crop, head, token]
    semantic = _products(anchor.to(wide(anchor))[:, :, None], value)[:, :, 0] * semantic_scaling
    if valid is not None:
        lowest = torch.finfo(relation.dtype).min
        relation = relation.masked_fill(~valid[:, None], lowest)
        semantic = semantic.masked_fill(~valid[:, None], lowest)
    return relation.softmax(-1).mean(1), semantic.softmax(-1).mean(1), value.mean(1).abs().sum(-1)


def _products(rows: Tensor, x: Tensor) -> Tensor:
    """`[crop, head, row, token]` products of `rows` `[crop, head, row, dim]` with all of `x` `[crop, head, token, dim]`. Of a
    single row they are summed in place: a matrix product would first copy `x`, whose heads lie side by side in a tower."""
    return (rows * x).sum(dim=-1)[:, :, None] if rows.shape[2] == 1 else rows @ x.transpose(-1, -2)


def share(x: Tensor) -> Tensor:
    """`[…, token]` each over the sum of all."""
    return x / x.sum(dim=-1, keepdim=True)


def entropy_ratio(relation: Tensor, present: Tensor) -> Tensor:
    """`[crop]` entropy of the relation `[crop, token]`, divided by the highest possible one, the log of the number of `present`
    `[crop]` tokens: 1 if all tokens are alike, 0 if one has all of it. Zeros, as on padding, add nothing."""
    p = share(relation.float())
    return -torch.xlogy(p, p).sum(dim=-1) / present.clamp_min(2).float().log()
