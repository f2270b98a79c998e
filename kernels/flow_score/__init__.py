"""FlowCut's three criteria of one layer, in one read of its keys and values."""

from __future__ import annotations

from torch import Tensor

from vlmprune.kernels.dispatch import Impl, use_triton
from vlmprune.kernels.flow_score import reference
from vlmprune.kernels.flow_score.reference import entropy_ratio, share

__all__ = ["entropy_ratio", "flow_score", "share"]


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
    """`[view, token]` fp32 each: relation, semantic, magnitude; see `reference.flow_score`."""
    use_triton("flow_score", impl)
    return reference.flow_score(query, key, value, anchor, scaling, semantic_scaling, valid)
