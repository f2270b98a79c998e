"""The equations, in fp32 (fp64 for fp64 inputs), a few rows at a time: nothing of size n×n is ever allocated.

a[q, k] = softmax_k( s[q, k] ),  s = q·k · scaling         over the keys that row q sees: not behind it, and valid

grouped    μ_g = Σ_{k ∈ g} a_k,   a′_k = c_g(μ) · a_k,   o = Σ_k a′_k v_k      groups g of keys; group 0 is everything else
scored     s′_k = s_k + w_k · |s_k|,   o = Σ_k softmax(s′)_k v_k
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vlmprune.kernels.dispatch import wide

CHUNK = 1 << 20
"""Numbers of an attention map `[batch, head, row, key]` that exist at one time: 4 MiB of fp32, which stays in a CPU's cache."""

Coefficients = Callable[[Tensor], Tensor]
"""From group masses `[batch, head, row, group]` to factors of the same shape."""


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    position: Tensor | None,
    valid: Tensor | None,
    groups: Tensor,
    coefficients: Coefficients,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of chosen rows, each key's weight multiplied by a factor that depends on the masses of groups of keys.

    Args:
        query: `[batch, head, row, dim]` the chosen rows, after rotary embedding.
        key, value: `[batch, kv_head, key, dim]`; `head` is a multiple of `kv_head` (grouped-query attention).
        scaling: factor on the scores, usually `dim ** -0.5`.
        position: `[batch or 1, row]` index of each row among the keys; it sees the keys up to itself. None: it sees all. What a
            row that sees no key gets (padding) is finite and means nothing.
        valid: `[batch, key]` bool, False on padding; None if all keys are real.
        groups: `[batch, 1 or head, marked, group]` 0 or 1: which group each of the first `marked` keys is in. All later keys
            are in group 0.
        coefficients: decides the factors.

    Returns:
        `[batch, row, head, dim]` fp32, factors and masses `[batch, head, row, group]`.
    """
    marked = groups.shape[2]
    groups = groups.to(wide(query))
    out, factors, masses = [], [], []
    for _, scores in _scores(query, key, scaling, position, valid):
        attention = scores.softmax(dim=-1)
        early, late = attention[..., :marked], attention[..., marked:]
        mass = early @ groups
        if late.shape[-1]:
            mass[..., 0] += late.sum(dim=-1)
        factor = coefficients(mass)
        edited = early * (factor @ groups.transpose(-1, -2))
        attention = torch.cat((edited, late * factor[..., :1]), dim=-1) if late.shape[-1] else edited
        out.append(_weighted(attention, value))
        factors.append(factor)
        masses.append(mass)
    return _joined(out, 1), _joined(factors, 2), _joined(masses, 2)


def scored_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, position: Tensor | None, valid: Tensor | None, weight: Tensor
) -> Tensor:
    """Attention of chosen rows whose scores are raised by `weight` times their size, before the softmax.

    Args:
        weight: `[batch, marked]` of the first `marked` keys; 0 leaves a score alone. The others as in `grouped_attention`.

    Returns:
        `[batch, row, head, dim]` fp32.
    """
    full = torch.nn.functional.pad(weight.to(wide(query)), (0, key.shape[2] - weight.shape[1]))[:, None, None]
    edited = _scores(query, key, scaling, position, valid, lambda scores: torch.addcmul(scores, full, scores.abs()))
    return _joined([_weighted(scores.softmax(dim=-1), value) for _, scores in edited], 1)


def column_means(query: Tensor, key: Tensor, scaling: float, position: Tensor, valid: Tensor | None, counted: Tensor) -> Tensor:
    """`[batch, head, key]` fp32: attention that a key gets, mean over the counted rows that see it (0 where none does).

    Args:
        counted: `[batch, row]` bool. The others as in `grouped_attention`.
    """
    keys = torch.arange(key.shape[2], device=key.device)
    total = torch.zeros(*query.shape[:2], key.shape[2], dtype=wide(query), device=key.device)
    seen = torch.zeros(total.shape[0], total.shape[2], dtype=total.dtype, device=key.device)
    for rows, scores in _scores(query, key, scaling, position, valid):
        counts = counted[:, rows].to(scores)
        total = total + torch.einsum("bhrk,br->bhk", scores.softmax(dim=-1), counts)
        seen = seen + ((keys <= position[:, rows, None]) * counts[..., None]).sum(dim=1)
    return total / seen.clamp_min(1)[:, None]


def _scores(
    query: Tensor,
    key: Tensor,
    scaling: float,
    position: Tensor | None,
    valid: Tensor | None,
    edit: Callable[[Tensor], Tensor] = lambda scores: scores,
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with their masked scores `[batch, head, row, key]`."""
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    columns = key.to(wide(query)).transpose(-1, -2)
    step = max(CHUNK // (batch * heads * keys), 1)
    places = torch.arange(keys, device=key.device)
    for start in range(0, rows, step):
        here = slice(start, min(start + step, rows))
        # Query heads that share a key head stand behind each other: grouped, no key is ever repeated.
        grouped = query[:, :, here].to(wide(query)).reshape(batch, kv_heads, -1, dim) * scaling
        scores = edit((grouped @ columns).view(batch, heads, -1, keys))
        visible = None if valid is None else valid[:, None, None]
        if position is not None:
            causal = (places <= position[:, here, None])[:, None]
            visible = causal if visible is None else visible & causal
        if visible is not None:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        yield here, scores


def _weighted(attention: Tensor, value: Tensor) -> Tensor:
    """`[batch, row, head, dim]` values under `[batch, head, row, key]` weights."""
    batch, heads, rows, keys = attention.shape
    grouped = attention.reshape(batch, value.shape[1], -1, keys) @ value.to(attention.dtype)
    return grouped.view(batch, heads, rows, -1).transpose(1, 2)


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)
