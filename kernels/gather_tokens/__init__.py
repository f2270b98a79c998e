"""Surviving tokens moved to compact buffers: hidden states, rotary embeddings, keys and values."""

from __future__ import annotations

from torch import Tensor

from vlmprune.kernels.dispatch import Impl, use_triton
from vlmprune.kernels.gather_tokens import reference

__all__ = ["gather_tokens"]


def gather_tokens(x: Tensor, rows: Tensor, valid: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """`[batch, …, kept, dim]`, see `reference.gather_tokens`."""
    use_triton("gather_tokens", impl)
    return reference.gather_tokens(x, rows, valid)
