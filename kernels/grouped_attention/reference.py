"""The equations, in fp32 (fp64 for fp64 inputs), a few rows at a time: nothing of size n×n is ever allocated.

a[q, k] = softmax_k( s[q, k] ),  s = q·k · scaling         over the keys that row q sees: not behind it, and valid

grouped    μ_g = Σ_{k ∈ g} a_k,   a′_k = c_g(μ) · a_k,   o = Σ_k a′_k v_k      groups g of keys; group 0 is everything else
scored     s′_k = s_k + w_k · |s_k|,   o = Σ_k softmax(s′)_k v_k
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

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
    dtype = torch.promote_types(query.dtype, torch.float32)
    if not query.dtype == key.dtype == value.dtype == groups.dtype == dtype:
        query, key, value, groups = query.to(dtype), key.to(dtype), value.to(dtype), groups.to(dtype)
    batch, heads, rows, dim = query.shape
    kv_lead, keys, marked, kinds = batch * key.shape[1], key.shape[2], *groups.shape[2:]
    if (step := max(CHUNK // (batch * heads * keys), 1)) < rows:
        pieces = [
            grouped_attention(some, key, value, scaling, places, valid, groups, coefficients)
            for some, places in _pieces(query, position, step)
        ]
        outs, factors, masses = zip(*pieces, strict=True)
        return torch.cat(outs, dim=1), torch.cat(factors, dim=2), torch.cat(masses, dim=2)
    # Query heads that share a key head are rows of one product, so that keys and values are never repeated.
    lines = (query * scaling).reshape(kv_lead, -1, dim)
    scores = torch.bmm(lines, key.reshape(kv_lead, keys, dim).transpose(1, 2)).view(batch, heads, rows, keys)
    if position is not None or valid is not None:
        scores = _seen(scores, position, valid)
    attention = scores.softmax(dim=-1)
    # Heads that share their groups are rows of one product, so that groups are never repeated.
    lead = batch * groups.shape[1]
    groups = groups.reshape(lead, marked, kinds)
    early = attention if marked == keys else attention[..., :marked]
    mass = torch.bmm(early.reshape(lead, -1, marked), groups).view(batch, heads, rows, kinds)
    if marked < keys:
        mass[..., 0] += attention[..., marked:].sum(dim=-1)
    factor = coefficients(mass)
    change = torch.bmm(factor.reshape(lead, -1, kinds), groups.transpose(1, 2)).view(batch, heads, rows, marked)
    if attention.requires_grad or change.requires_grad:
        late = attention[..., marked:]
        attention = early * change if marked == keys else torch.cat((early * change, late * factor[..., :1]), dim=-1)
    else:
        early *= change
        if marked < keys:
            attention[..., marked:] *= factor[..., :1]
    out = torch.bmm(attention.view(kv_lead, -1, keys), value.reshape(kv_lead, keys, -1))
    return out.view(batch, heads, rows, -1).transpose(1, 2), factor, mass


def scored_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, position: Tensor | None, valid: Tensor | None, weight: Tensor
) -> Tensor:
    """Attention of chosen rows whose scores are raised by `weight` times their size, before the softmax.

    Args:
        weight: `[batch, marked]` of the first `marked` keys; 0 leaves a score alone. The others as in `grouped_attention`.

    Returns:
        `[batch, row, head, dim]` fp32.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    if not query.dtype == key.dtype == value.dtype == weight.dtype == dtype:
        query, key, value, weight = query.to(dtype), key.to(dtype), value.to(dtype), weight.to(dtype)
    batch, heads, rows, dim = query.shape
    kv_lead, keys, marked = batch * key.shape[1], key.shape[2], weight.shape[1]
    if (step := max(CHUNK // (batch * heads * keys), 1)) < rows:
        pieces = [
            scored_attention(some, key, value, scaling, places, valid, weight)
            for some, places in _pieces(query, position, step)
        ]
        return torch.cat(pieces, dim=1)
    lines, weight = (query * scaling).reshape(kv_lead, -1, dim), weight[:, None, None]
    scores = torch.bmm(lines, key.reshape(kv_lead, keys, dim).transpose(1, 2)).view(batch, heads, rows, keys)
    early = scores if marked == keys else scores[..., :marked]
    if scores.requires_grad:
        raised = torch.addcmul(early, weight, early.abs())
        scores = raised if marked == keys else torch.cat((raised, scores[..., marked:]), dim=-1)
    else:
        early.addcmul_(weight, early.abs())
    if position is not None or valid is not None:
        scores = _seen(scores, position, valid)
    out = torch.bmm(scores.softmax(dim=-1).view(kv_lead, -1, keys), value.reshape(kv_lead, keys, -1))
    return out.view(batch, heads, rows, -1).transpose(1, 2)


def column_means(query: Tensor, key: Tensor, scaling: float, position: Tensor, valid: Tensor | None, counted: Tensor) -> Tensor:
    """`[batch, head, key]` fp32: attention that a key gets, mean over the counted rows that see it (0 where none does).

    Args:
        counted: `[batch, row]` bool. The others as in `grouped_attention`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys, key = torch.arange(key.shape[2], device=key.device), key.to(dtype)
    batch, heads, _, dim = query.shape
    total = torch.zeros(batch, heads, len(keys), dtype=dtype, device=key.device)
    seen = torch.zeros(batch, len(keys), dtype=dtype, device=key.device)
    step = max(CHUNK // (batch * heads * len(keys)), 1)
    for some, places, counts in zip(
        query.split(step, 2), position.split(step, 1), counted.to(dtype).split(step, 1), strict=True
    ):
        grouped = some.to(dtype).reshape(batch, key.shape[1], -1, dim) * scaling
        scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, -1, len(keys))
        attention = _seen(scores, places, valid).softmax(dim=-1)
        total = total + torch.einsum("bhrk,br->bhk", attention, counts)
        seen = seen + ((keys <= places[..., None]) * counts[..., None]).sum(dim=1)
    return total / seen.clamp_min(1)[:, None]


def _pieces(query: Tensor, position: Tensor | None, step: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """`step` rows at a time, and their positions."""
    for start in range(0, query.shape[2], step):
        yield query[:, :, start : start + step], None if position is None else position[:, start : start + step]


def _seen(scores: Tensor, position: Tensor | None, valid: Tensor | None) -> Tensor:
    """The scores, with the lowest number where a row must not look."""
    visible = None if valid is None else valid[:, None, None]
    if position is not None:
        causal = (torch.arange(scores.shape[3], device=scores.device) <= position[..., None])[:, None]
        visible = causal if visible is None else visible & causal
    return scores if visible is None else scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
