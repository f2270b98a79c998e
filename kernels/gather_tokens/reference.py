"""y[b, …, i, :] = x[b, …, rows[b, i], :], and zero where `valid` is False."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_tokens(x: Tensor, rows: Tensor, valid: Tensor | None = None) -> Tensor:
    """Take some tokens of every sample.

    Args:
        x: `[batch or 1, …, token, dim]`: hidden states, rotary embeddings, or keys and values with a head axis.
        rows: `[batch, kept]` int64 indices of tokens.
        valid: `[batch, kept]` bool, False on padding; None if there is none. Padding becomes zero, never a dropped token: a NaN
            in it would spread through masked attention.

    Returns:
        `[batch, …, kept, dim]`. Moves `2 · batch · … · kept · dim` numbers.
    """
    batch, kept = rows.shape
    between = [1] * (x.ndim - 3)
    if x.ndim == 3:  # whole rows are copied, which is faster on a CPU than number by number
        taken = x.expand(batch, -1, -1)[torch.arange(batch, device=rows.device)[:, None], rows]
    else:
        index = rows.view(batch, *between, kept, 1).expand(batch, *x.shape[1:-2], kept, x.shape[-1])
        taken = x.expand(batch, *x.shape[1:]).gather(-2, index)
    return taken if valid is None else taken.masked_fill(~valid.view(batch, *between, kept, 1), 0)


def gather_all(tensors: Sequence[Tensor], rows: Tensor, valid: Tensor | None = None) -> list[Tensor]:
    """`gather_tokens` of each of the tensors."""
    return [gather_tokens(x, rows, valid) for x in tensors]
