"""Two passes over the keys, for one row as for many. No rows × keys buffer, except the result.

    1   m_r, l_r of every row and every split of the keys: the largest score, and Σ exp(score − m_r)
    2   exp(score − M_r) / L_r,  M_r = max m_r,  L_r = Σ l_r · exp(m_r − M_r)  over the splits; written, or summed over rows

Query heads that share a key head stand together in one tile: no key is repeated. Scores are computed anew in the second pass:
keys are few bytes, mostly still in the L2 cache, where scores would be many. Invisible keys get the lowest number, as in the
reference, so that a row that sees nothing is uniform here too; keys behind the end get −inf.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmprune.kernels.dispatch import check_dim
from vlmprune.kernels.launching import in_units, interpreted, on_its_device, packed, unit_of
from vlmprune.kernels.variants import Variant

PROGRAMS = 264
"""Programs that fill a GPU: two for each of an H200's 132 multiprocessors. Keys are split until there are as many."""

MOST_SPLITS = 64

STRIDES = ("query_batch", "query_head", "query_row", "key_batch", "key_head", "key_step")
MASK = ("visible_batch", "visible_row", "visible_step")


@triton.jit
def _queries(
    query,
    sample,
    head,
    row,
    real,
    query_batch,
    query_head,
    query_row,
    HEAD_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
):
    """`[row, DIM]` of one sample; `head` and `row` `[row]`."""
    place = tl.arange(0, DIM)
    start = sample * query_batch * UNIT + head.to(tl.int64) * query_head * UNIT + row.to(tl.int64) * query_row * UNIT
    return tl.load(query + start[:, None] + place[None, :], mask=real[:, None] & (place < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def _keys(
    key,
    sample,
    kv_head,
    column,
    keys,
    key_batch,
    key_head,
    key_step,
    HEAD_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
):
    """`[DIM, column]` of one key head of one sample."""
    place = tl.arange(0, DIM)
    start = sample * key_batch * UNIT + kv_head.to(tl.int64) * key_head * UNIT
    at = start + column.to(tl.int64) * key_step * UNIT
    return tl.load(key + at[None, :] + place[:, None], mask=(column < keys)[None, :] & (place < HEAD_SIZE)[:, None], other=0.0)


@triton.jit
def _scores(
    chosen,
    columns,
    scaling,
    visible,
    sample,
    row,
    real,
    column,
    keys,
    visible_batch,
    visible_row,
    visible_step,
    MASKED: tl.constexpr,
    IN_FP32: tl.constexpr,
):
    """`[row, column]` masked scores of queries `[row, DIM]` and keys `[DIM, column]`."""
    if IN_FP32:
        chosen = chosen.to(tl.float32)
        columns = columns.to(tl.float32)
    scores = tl.dot(chosen, columns, input_precision="ieee") * scaling
    inside = column < keys
    if MASKED:
        at = sample * visible_batch + row.to(tl.int64)[:, None] * visible_row + column.to(tl.int64)[None, :] * visible_step
        seen = tl.load(visible + at, mask=real[:, None] & inside[None, :], other=1)
        scores = tl.where(seen != 0, scores, -3.4028234663852886e38)
    return tl.where(inside[None, :], scores, float("-inf"))


@triton.jit
def _totals(maxima, sums, place, real, splits, SPLITS: tl.constexpr):
    """`[row]` largest score and sum of exponentials over all splits, of the rows at `place` of `[batch·head·row, split]`."""
    split = tl.arange(0, SPLITS)
    at = place[:, None] * splits + split[None, :]
    there = real[:, None] & (split < splits)[None, :]
    largest = tl.load(maxima + at, mask=there, other=float("-inf"))
    most = tl.where(real, tl.max(largest, axis=1), 0.0)
    total = tl.sum(tl.load(sums + at, mask=there, other=0.0) * tl.exp(largest - most[:, None]), axis=1)
    return most, tl.where(real, total, 1.0)


@triton.jit(do_not_specialize=[*STRIDES, *MASK, "rows", "keys", "kv_heads", "group", "splits", "blocks"])
def _row_totals(
    query,
    key,
    visible,
    maxima,
    sums,
    scaling,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_step,
    visible_batch,
    visible_row,
    visible_step,
    rows,
    keys,
    kv_heads,
    group,
    splits,
    blocks,
    MASKED: tl.constexpr,
    IN_FP32: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Pass 1: one split, of `blocks` blocks of keys, for a tile of the rows of the heads that share a key head."""
    sample = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % kv_heads
    split = tl.program_id(2)
    flat = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = flat < group * rows
    head = kv_head * group + flat // rows
    row = flat % rows
    chosen = _queries(query, sample, head, row, real, query_batch, query_head, query_row, HEAD_SIZE, DIM, UNIT)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    begin = split * blocks * KEYS
    for start in range(begin, tl.minimum(begin + blocks * KEYS, keys), KEYS):
        column = start + tl.arange(0, KEYS)
        tile = _keys(key, sample, kv_head, column, keys, key_batch, key_head, key_step, HEAD_SIZE, DIM, UNIT)
        scores = _scores(
            chosen,
            tile,
            scaling,
            visible,
            sample,
            row,
            real,
            column,
            keys,
            visible_batch,
            visible_row,
            visible_step,
            MASKED,
            IN_FP32,
        )
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(scores - larger[:, None]), axis=1)
        largest = larger
    at = ((sample * kv_heads * group + head) * rows + row) * splits + split
    tl.store(maxima + at, largest, mask=real)
    tl.store(sums + at, total, mask=real)


@triton.jit(do_not_specialize=[*STRIDES, *MASK, "rows", "keys", "kv_heads", "group", "splits"])
def _write_rows(
    query,
    key,
    visible,
    maxima,
    sums,
    out,
    scaling,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_step,
    visible_batch,
    visible_row,
    visible_step,
    rows,
    keys,
    kv_heads,
    group,
    splits,
    SPLITS: tl.constexpr,
    MASKED: tl.constexpr,
    IN_FP32: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Pass 2 of `attention_rows`: one block of keys for a tile of the rows of the heads that share a key head."""
    sample = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % kv_heads
    column = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    flat = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = flat < group * rows
    head = kv_head * group + flat // rows
    row = flat % rows
    chosen = _queries(query, sample, head, row, real, query_batch, query_head, query_row, HEAD_SIZE, DIM, UNIT)
    tile = _keys(key, sample, kv_head, column, keys, key_batch, key_head, key_step, HEAD_SIZE, DIM, UNIT)
    scores = _scores(
        chosen,
        tile,
        scaling,
        visible,
        sample,
        row,
        real,
        column,
        keys,
        visible_batch,
        visible_row,
        visible_step,
        MASKED,
        IN_FP32,
    )
    place = (sample * kv_heads * group + head) * rows + row
    most, total = _totals(maxima, sums, place, real, splits, SPLITS)
    attention = tl.exp(scores - most[:, None]) / total[:, None]
    tl.store(out + place[:, None] * keys + column[None, :], attention, mask=real[:, None] & (column < keys)[None, :])


@triton.jit(do_not_specialize=[*STRIDES, *MASK, "rows", "keys", "kv_heads", "group", "splits"])
def _sum_rows(
    query,
    key,
    visible,
    maxima,
    sums,
    out,
    scaling,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_step,
    visible_batch,
    visible_row,
    visible_step,
    rows,
    keys,
    kv_heads,
    group,
    splits,
    SPLITS: tl.constexpr,
    MASKED: tl.constexpr,
    IN_FP32: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Pass 2 of `attention_mass`: one block of keys for all rows of one head, a tile of them at a time."""
    heads = kv_heads * group
    sample = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    column = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    tile = _keys(key, sample, head // group, column, keys, key_batch, key_head, key_step, HEAD_SIZE, DIM, UNIT)
    mass = tl.zeros([KEYS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < rows
        every = tl.zeros([ROWS], tl.int32) + head
        chosen = _queries(query, sample, every, row, real, query_batch, query_head, query_row, HEAD_SIZE, DIM, UNIT)
        scores = _scores(
            chosen,
            tile,
            scaling,
            visible,
            sample,
            row,
            real,
            column,
            keys,
            visible_batch,
            visible_row,
            visible_step,
            MASKED,
            IN_FP32,
        )
        most, total = _totals(maxima, sums, (sample * heads + head) * rows + row, real, splits, SPLITS)
        attention = tl.exp(scores - most[:, None]) / total[:, None]
        mass += tl.sum(tl.where(real[:, None], attention, 0.0), axis=0)
    tl.store(out + (sample * heads + head) * keys + column, mass, mask=column < keys)


def options(rows: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Sizes of a tile, for the registers and the shared memory of an SM.

    Args:
        rows: rows that meet the same keys.
        dim: head size, padded to a power of two.
        dtype: of query and key. fp32 is multiplied exactly, without tensor cores: tiles are smaller, or registers would spill.
    """
    width = max(triton.next_power_of_2(dim), 16)
    exact = dtype == torch.float32
    most = 16 if exact else 32 if width > 128 else 64
    tile = min(max(triton.next_power_of_2(rows), 16), most)
    return {
        "HEAD_SIZE": dim,
        "DIM": width,
        "ROWS": tile,
        "KEYS": 64 if width <= 128 and not exact else 32 if width <= 128 or not exact else 16,
        "num_warps": 8 if tile == 64 else 4,
        "num_stages": 2 if exact else 3,
    }


@on_its_device
def attention_rows(query: Tensor, key: Tensor, scaling: float, visible: Tensor | None = None) -> Tensor:
    """See `reference.attention_rows`; detached. A tensor whose last axis is not contiguous is copied first."""
    batch, heads, rows, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    out = torch.empty(batch, heads, rows, keys, dtype=torch.float32, device=query.device)
    if not out.numel():
        return out
    arguments, chosen, splits = _first_pass("attention_rows", query, key, scaling, visible)
    tiles = triton.cdiv(heads // kv_heads * rows, chosen["ROWS"])
    grid = (batch * kv_heads, tiles, triton.cdiv(keys, chosen["KEYS"]))
    _write_rows[grid](*arguments[:5], out, *arguments[5:], SPLITS=triton.next_power_of_2(splits), **chosen)
    return out


@on_its_device
def attention_mass(query: Tensor, key: Tensor, scaling: float, visible: Tensor | None = None) -> Tensor:
    """See `reference.attention_mass`; detached. A tensor whose last axis is not contiguous is copied first."""
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    if rows == 1:
        return attention_rows(query, key, scaling, visible)[:, :, 0]  # one tile for all heads of a key head
    if not rows:
        return torch.zeros(batch, heads, keys, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, heads, keys, dtype=torch.float32, device=query.device)
    if not out.numel():
        return out
    arguments, chosen, splits = _first_pass("attention_mass", query, key, scaling, visible)
    chosen |= {name: value for name, value in options(rows, query.shape[3], query.dtype).items() if name != "num_stages"}
    grid = (batch * heads, triton.cdiv(keys, chosen["KEYS"]))
    _sum_rows[grid](*arguments[:5], out, *arguments[5:], SPLITS=triton.next_power_of_2(splits), **chosen)
    return out


def _first_pass(
    op: str, query: Tensor, key: Tensor, scaling: float, visible: Tensor | None
) -> tuple[list[Any], dict[str, Any], int]:
    """Totals of every row and split; arguments and constants that the second pass shares, and the number of splits."""
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    check_dim(op, "query", dim)
    query, key = packed(query), packed(key)
    unit = unit_of(query, key)
    group = heads // kv_heads
    chosen = options(group * rows, dim, query.dtype)
    chosen |= {"MASKED": visible is not None, "IN_FP32": interpreted(), "UNIT": unit}
    tiles, blocks = triton.cdiv(group * rows, chosen["ROWS"]), triton.cdiv(keys, chosen["KEYS"])
    wanted = min(triton.cdiv(PROGRAMS, batch * kv_heads * tiles), MOST_SPLITS, blocks)
    each = triton.cdiv(blocks, wanted)
    splits = triton.cdiv(blocks, each)
    maxima = torch.empty(batch, heads, rows, splits, dtype=torch.float32, device=query.device)
    sums = torch.empty_like(maxima)
    seen = query if visible is None else visible.view(torch.uint8)
    mask = (0, 0, 0) if visible is None else visible.stride()
    arguments = [query, key, seen, maxima, sums, float(scaling), *in_units(query, unit), *in_units(key, unit), *mask]
    arguments += [rows, keys, kv_heads, group, splits]
    _row_totals[(batch * kv_heads, tiles, splits)](*arguments, each, **chosen)
    return arguments, chosen, splits


def variants() -> list[Variant]:
    """Head sizes of 72, 80 and 128 share a tile: one of them stands for all where there are many rows."""
    found = []
    common = dict.fromkeys((*STRIDES, *MASK, "rows", "keys", "kv_heads", "group", "splits"), "i32") | {"scaling": "fp32"}
    cases = [("bf16", dim, 1, dim == 256) for dim in (64, 72, 80, 128, 256)] + [
        ("fp32", dim, 1, dim == 256) for dim in (72, 256)
    ]
    cases += [("bf16", dim, 64, True) for dim in (64, 72, 256)] + [("fp32", dim, 64, True) for dim in (64, 128, 256)]
    cases += [("bf16", 128, 64, False), ("fp16", 128, 64, True)]
    for dtype, dim, rows, masked in cases:
        size = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        chosen = options(rows, dim, size)
        warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
        chosen |= {"MASKED": masked, "IN_FP32": False, "UNIT": 16 // size.itemsize}
        case = f"head {dim}, {dtype}, {rows} row{'s' * (rows > 1)}" + (", masked" if masked else "")
        pointers = {"query": f"*{dtype}", "key": f"*{dtype}", "visible": "*u8" if masked else f"*{dtype}"}
        pointers |= {"maxima": "*fp32", "sums": "*fp32"}
        signature = pointers | common | {"blocks": "i32"}
        found.append(
            Variant("attention_mass", f"totals, {case}", _row_totals, signature, chosen, tuple(pointers), warps, stages)
        )
        kernel, name = (_write_rows, "rows") if rows == 1 else (_sum_rows, "mass")
        chosen = chosen | {"SPLITS": MOST_SPLITS if rows == 1 else 8}
        pointers["out"] = "*fp32"
        signature = pointers | common
        found.append(Variant("attention_mass", f"{name}, {case}", kernel, signature, chosen, tuple(pointers), warps, stages))
    return found
