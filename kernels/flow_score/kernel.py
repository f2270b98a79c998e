"""Pass 1 reads keys and values once; pass 2 computes the softmax over its result, a few numbers for each token.

    1   for each block of tokens: scores of both kinds, the largest and Σ exp(score − largest); the magnitude, complete
    2   relation and semantic from the scores: exp(score − M) / L, M and L over all blocks, mean over heads

A program of pass 1 loops over all heads, because the magnitude is the norm of a mean over heads. Products are sums in fp32
without tensor cores: each key is multiplied with a few queries only, and reading it takes longer. Hidden tokens get the lowest
number, as in the reference; tokens after the end get −inf.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmprune.kernels.dispatch import check_dim
from vlmprune.kernels.launching import in_units, on_its_device, packed, unit_of
from vlmprune.kernels.variants import Variant

PROGRAMS = 264
"""Programs that fill a GPU: two for each of an H200's 132 multiprocessors."""

STRIDES = (
    *("query_crop", "query_head", "key_crop", "key_head", "key_step", "value_crop", "value_head", "value_step"),
    *("anchor_crop", "anchor_head", "valid_crop", "valid_step"),
)


@triton.jit
def _note(score, token, tokens, seen, scores, maxima, sums, softmax, block, blocks):
    """Store masked scores `[token]` of one softmax, and their largest and sum of exponentials as those of `block`."""
    score = tl.where(seen, score, -3.4028234663852886e38)
    inside = token < tokens
    score = tl.where(inside, score, float("-inf"))
    tl.store(scores + softmax * tokens + token, score, mask=inside)
    largest = tl.max(score, axis=0)
    tl.store(maxima + softmax * blocks + block, largest)
    tl.store(sums + softmax * blocks + block, tl.sum(tl.exp(score - largest), axis=0))


@triton.jit(do_not_specialize=[*STRIDES, "kv_heads", "tokens", "blocks"])
def _read(
    query,
    key,
    value,
    anchor,
    valid,
    scores,
    maxima,
    sums,
    magnitude,
    scaling,
    semantic_scaling,
    query_crop,
    query_head,
    key_crop,
    key_head,
    key_step,
    value_crop,
    value_head,
    value_step,
    anchor_crop,
    anchor_head,
    valid_crop,
    valid_step,
    kv_heads,
    tokens,
    blocks,
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Pass 1: one block of tokens of one crop."""
    crop = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    token = block * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    seen = inside
    if MASKED:
        seen = tl.load(valid + crop * valid_crop + token.to(tl.int64) * valid_step, mask=inside, other=0) != 0
    place = tl.arange(0, DIM)
    there = place < HEAD_SIZE
    mask = inside[:, None] & there[None, :]
    keys = key + crop * key_crop * UNIT + token.to(tl.int64)[:, None] * key_step * UNIT + place[None, :]
    values = value + crop * value_crop * UNIT + token.to(tl.int64)[:, None] * value_step * UNIT + place[None, :]
    first = crop * kv_heads * (GROUP + 1)  # of the softmaxes of this crop: those of the query heads, then of the anchor heads
    total = tl.zeros([TOKENS, DIM], tl.float32)
    for kv_head in tl.range(0, kv_heads, num_stages=STAGES):  # Triton prefetches without a matrix product only on request
        wide = tl.cast(kv_head, tl.int64)
        tile = tl.load(keys + wide * key_head * UNIT, mask=mask, other=0.0).to(tl.float32)
        for member in tl.static_range(GROUP):
            head = wide * GROUP + member
            chosen = tl.load(query + crop * query_crop * UNIT + head * query_head * UNIT + place, mask=there, other=0.0)
            score = tl.sum(tile * chosen.to(tl.float32)[None, :], axis=1) * scaling
            _note(score, token, tokens, seen, scores, maxima, sums, first + head, block, blocks)
        tile = tl.load(values + wide * value_head * UNIT, mask=mask, other=0.0).to(tl.float32)
        chosen = tl.load(anchor + crop * anchor_crop * UNIT + wide * anchor_head * UNIT + place, mask=there, other=0.0)
        score = tl.sum(tile * chosen.to(tl.float32)[None, :], axis=1) * semantic_scaling
        _note(score, token, tokens, seen, scores, maxima, sums, first + kv_heads * GROUP + wide, block, blocks)
        total += tile
    norm = tl.sum(tl.abs(total / kv_heads), axis=1)
    tl.store(magnitude + crop * tokens + token, norm, mask=inside)


@triton.jit
def _mean_softmax(
    scores, maxima, sums, first, heads, token, tokens, blocks, HEADS: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr
):
    """`[token]` mean of `heads` softmaxes, the first is `first`; all heads at once, so that no head waits for another."""
    head = tl.arange(0, HEADS)
    real = head < heads
    softmax = first + head
    most = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        at = softmax[:, None] * blocks + block[None, :]
        there = real[:, None] & (block < blocks)[None, :]
        largest = tl.load(maxima + at, mask=there, other=float("-inf"))
        more = tl.where(real, tl.maximum(most, tl.max(largest, axis=1)), 0.0)
        here = tl.load(sums + at, mask=there, other=0.0) * tl.exp(largest - more[:, None])
        total = total * tl.exp(most - more) + tl.sum(here, axis=1)
        most = more
    mask = real[:, None] & (token < tokens)[None, :]
    score = tl.load(scores + softmax[:, None] * tokens + token[None, :], mask=mask, other=float("-inf"))
    return tl.sum(tl.exp(score - most[:, None]) / tl.where(real, total, 1.0)[:, None], axis=0) / heads


@triton.jit(do_not_specialize=["heads", "kv_heads", "tokens", "blocks"])
def _softmax(
    scores,
    maxima,
    sums,
    relation,
    semantic,
    heads,
    kv_heads,
    tokens,
    blocks,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Pass 2: some tokens of one crop."""
    tiles = tl.cdiv(tokens, TOKENS)
    crop = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    first = crop * (heads + kv_heads)
    at = crop * tokens + token
    mean = _mean_softmax(scores, maxima, sums, first, heads, token, tokens, blocks, HEADS, BLOCKS, TOKENS)
    tl.store(relation + at, mean, mask=token < tokens)
    mean = _mean_softmax(scores, maxima, sums, first + heads, kv_heads, token, tokens, blocks, KV_HEADS, BLOCKS, TOKENS)
    tl.store(semantic + at, mean, mask=token < tokens)


def options(crops: int, tokens: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of pass 1.

    Args:
        crops, tokens: a block has as many tokens as give `PROGRAMS` blocks, at least 16.
        dim: head size, padded to a power of two; a block of keys has at most 4096 numbers, 16 for each thread.
        dtype: of key and value; fp32 is prefetched one block less.
    """
    width = max(triton.next_power_of_2(dim), 16)
    block = min(triton.next_power_of_2(max(triton.cdiv(crops * tokens, PROGRAMS), 16)), 4096 // width, 64)
    stages = 2 if dtype == torch.float32 else 3
    warps = 8 if block * width > 2048 else 4
    return {"HEAD_SIZE": dim, "DIM": width, "TOKENS": block, "STAGES": stages, "num_warps": warps, "num_stages": stages}


def softmax_options(crops: int, tokens: int, heads: int, kv_heads: int, blocks: int) -> dict[str, Any]:
    """Constants of pass 2: tiles of all heads by blocks of pass 1, and by tokens, have at most 1024 numbers."""
    padded = triton.next_power_of_2(heads)
    enough = triton.next_power_of_2(max(triton.cdiv(crops * tokens, PROGRAMS), 16))
    return {
        "HEADS": padded,
        "KV_HEADS": triton.next_power_of_2(kv_heads),
        "BLOCKS": min(triton.next_power_of_2(blocks), max(1024 // padded, 1)),
        "TOKENS": min(enough, max(1024 // padded, 16)),
        "num_warps": 4,
        "num_stages": 1,
    }


@on_its_device
def flow_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    anchor: Tensor,
    scaling: float,
    semantic_scaling: float,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.flow_score`; detached. A tensor whose last axis is not contiguous is copied first."""
    heads = query.shape[1]
    crops, kv_heads, tokens, dim = key.shape
    check_dim("flow_score", "key", dim)
    relation, semantic, magnitude = (
        torch.empty(crops, tokens, dtype=torch.float32, device=key.device) for _ in ("relation", "semantic", "magnitude")
    )
    if not relation.numel():
        return relation, semantic, magnitude
    query, key, value, anchor = packed(query), packed(key), packed(value), packed(anchor)
    unit = unit_of(query, key, value, anchor)
    chosen = options(crops, tokens, dim, key.dtype)
    blocks = triton.cdiv(tokens, chosen["TOKENS"])
    scores = torch.empty(crops, heads + kv_heads, tokens, dtype=torch.float32, device=key.device)
    maxima = torch.empty(crops, heads + kv_heads, blocks, dtype=torch.float32, device=key.device)
    sums = torch.empty_like(maxima)
    seen = key if valid is None else valid.view(torch.uint8)
    mask = (0, 0) if valid is None else valid.stride()
    strides = [stride for x in (query, key, value, anchor) for stride in in_units(x, unit)]
    pointers = (query, key, value, anchor, seen, scores, maxima, sums, magnitude)
    numbers = (float(scaling), float(semantic_scaling), *strides, *mask, kv_heads, tokens, blocks)
    chosen |= {"GROUP": heads // kv_heads, "MASKED": valid is not None, "UNIT": unit}
    _read[(crops * blocks,)](*pointers, *numbers, **chosen)
    chosen = softmax_options(crops, tokens, heads, kv_heads, blocks)
    grid = (crops * triton.cdiv(tokens, chosen["TOKENS"]),)
    _softmax[grid](scores, maxima, sums, relation, semantic, heads, kv_heads, tokens, blocks, **chosen)
    return relation, semantic, magnitude


def variants() -> list[Variant]:
    found = []
    numbers = dict.fromkeys((*STRIDES, "kv_heads", "tokens", "blocks"), "i32") | {"scaling": "fp32", "semantic_scaling": "fp32"}
    results = dict.fromkeys(("scores", "maxima", "sums", "magnitude"), "*fp32")
    cases = [("bf16", dim, 1, 1, 577) for dim in (64, 72, 80, 256)] + [("fp32", dim, 1, 1, 577) for dim in (72, 256)]
    cases += [("bf16", 128, 7, 1, 2880), ("bf16", 128, 8, 8, 4096), ("fp32", 128, 8, 8, 4096)]
    cases += [("bf16", 64, 1, 64, 577), ("fp32", 64, 1, 64, 577), ("fp16", 64, 1, 5, 577)]
    for dtype, dim, group, crops, tokens in cases:
        size = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        chosen = options(crops, tokens, dim, size)
        warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
        case = f"head {dim}, {dtype}, {group} to a key head, {chosen['TOKENS']} tokens" + (", padded" if crops > 1 else "")
        chosen |= {"GROUP": group, "MASKED": crops > 1, "UNIT": 16 // size.itemsize}
        pointers = dict.fromkeys(("query", "key", "value", "anchor"), f"*{dtype}") | results
        pointers["valid"] = "*u8" if crops > 1 else f"*{dtype}"
        found.append(Variant("flow_score", f"read, {case}", _read, pointers | numbers, chosen, tuple(pointers), warps, stages))
    for crops, tokens, heads, kv_heads, blocks in ((1, 577, 16, 16, 37), (1, 65536, 32, 8, 2048)):
        chosen = softmax_options(crops, tokens, heads, kv_heads, blocks)
        warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
        pointers = dict.fromkeys(("scores", "maxima", "sums", "relation", "semantic"), "*fp32")
        signature = pointers | dict.fromkeys(("heads", "kv_heads", "tokens", "blocks"), "i32")
        case = f"softmax, {heads} heads on {kv_heads}, {chosen['TOKENS']} tokens, {chosen['BLOCKS']} blocks at a time"
        found.append(Variant("flow_score", case, _softmax, signature, chosen, tuple(pointers), warps, stages))
    return found
