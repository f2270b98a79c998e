"""FlowCut's three criteria of one layer, in one read of its keys and values.

`crop` counts pictures, or crops of a picture where the model cuts it up. The least work is: keys and values read once, three
fp32 numbers written for each token, `2 · crop · (head + kv_head) · token · dim` FLOPs for the scores, and one FLOP for each
value for the magnitude. The read is the bound to measure against. The kernel also writes and reads again `head + kv_head` fp32
scores of each token: each time 2 / dim of what it reads, in bf16 without grouped queries.

On an H200 (4.8 TB/s, 67 TFLOP/s in fp32), five crops of 577 tokens of CLIP-L (16 heads of 64, bf16): 11.8 MB, 2.5 µs; 12 MFLOP
of scores and 3 of magnitudes, 0.2 µs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.errors import UsageError
from vlmprune.kernels.dispatch import Checked, Cost, Impl, bytes_of, check, check_heads, use_triton
from vlmprune.kernels.flow_score import reference
from vlmprune.kernels.flow_score.reference import entropy_ratio, share

__all__ = ["cost", "entropy_ratio", "flow_score", "share"]


def flow_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    anchor: Tensor,
    scaling: float,
    semantic_scaling: float,
    valid: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`[crop, token]` fp32 each: relation, semantic, magnitude; see `reference.flow_score`. The kernel's results are detached.

    Raises:
        UsageError: shapes or dtypes that do not fit; an implementation that cannot run.
    """
    if not _flow_score(impl, False, query, key, value, anchor, valid):
        return reference.flow_score(query, key, value, anchor, scaling, semantic_scaling, valid)
    from vlmprune.kernels.flow_score import kernel

    return kernel.flow_score(query, key, value, anchor, scaling, semantic_scaling, valid)


def cost(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    anchor: Tensor,
    scaling: float,
    semantic_scaling: float,
    valid: Tensor | None = None,
) -> Cost:
    """The least work of `flow_score`."""
    crops, kv_heads, tokens, dim = key.shape
    scores = crops * (query.shape[1] + kv_heads) * tokens
    flops = scores * (2 * dim + 4) + crops * kv_heads * tokens * dim + 2 * crops * tokens * dim
    return Cost(bytes_of(query, key, value, anchor, valid) + 12 * crops * tokens, flops)


def _choose(
    op: str, impl: Impl, _: bool, query: Tensor, key: Tensor, value: Tensor, anchor: Tensor, valid: Tensor | None
) -> bool:
    check(op, "query", query, (None, None, None))
    check(op, "key", key, (query.shape[0], None, None, query.shape[2]))
    check(op, "value", value, tuple(key.shape))
    check(op, "anchor", anchor, (key.shape[0], key.shape[1], key.shape[3]))
    check_heads(op, query, key)
    for name, x in (("value", value), ("anchor", anchor)):
        if x.dtype != key.dtype:
            raise UsageError(f"{op}: {name} is {x.dtype} but key {key.dtype}: convert one of them.")
    if valid is not None:
        check(op, "valid", valid, (key.shape[0], key.shape[2]), torch.bool)
    return use_triton(op, impl, query=query, key=key, value=value, anchor=anchor, valid=valid)


_flow_score = Checked("flow_score", _choose)
