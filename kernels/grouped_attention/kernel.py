"""The same equations on a GPU. Keys are read in tiles, with an online softmax: nothing of size rows × keys is ever allocated.

Few rows (decoding)     `_partial`: programs share out the keys. The query heads of a KV head stand in one tile, each once for
                        every group, so that K and V are read once. Maximum, total, mass and Σ e^s·v of every share of the keys
                        go to memory; `_group_masses` and `_combine` put them together, before and behind `coefficients`.
Many rows (prefill)     `_row_masses`: masses, and the logarithm of the softmax's denominator; then `_weighted`: the scores
                        again, each weight under its own factor, one product with V. That is one accumulator a row instead of
                        one a group: with G groups 3 products of rows × keys × dim instead of 2·G, and no G outputs in memory.
Column means            `_row_masses` without groups, then `_column_means`: a tile of keys passes over all rows.

Exponents are to base 2: a score in here is s · log2(e). Products of fp16 and bf16 accumulate in fp32, probabilities rounded to
the dtype of the values, as in flash attention; masses are sums before that rounding. Products of fp32 are fp32's own ("ieee",
no tf32). A row that sees no key gets zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmprune.kernels.dispatch import in_fp32
from vlmprune.kernels.grouped_attention.reference import Coefficients
from vlmprune.kernels.launching import in_units, interpreted, on_its_device, packed, unit_of
from vlmprune.kernels.variants import Variant

LOG2E = 1.4426950408889634

FEW_LINES = 128
"""Rows × query heads of a KV head × groups up to which programs share out the keys."""

TALLEST = 32
"""Lines of one tile at most."""

PROGRAMS = 264
"""Programs that few rows are shared out among where there are keys enough: two for each of an H200's 132 multiprocessors. The
same on every card, so that sums are taken in the same order everywhere."""

MOST_SHARES = 128
"""Shares of the keys at most."""

VARYING = (
    *("query_batch", "query_head", "query_row", "key_batch", "key_head", "key_row"),
    *("position_batch", "valid_batch", "rows", "keys"),
)
"""Numbers that change with the keys and rows of a call. Specialised to multiples of 16, a kernel would be compiled once more in
the middle of decoding. Loads stay wide: strides of queries, keys and values are counted in units."""

VALUE_STRIDES = ("value_batch", "value_head", "value_row")
GROUPS_STRIDES = ("marked", "groups_batch", "groups_head")


@triton.jit
def _product(a, b, WIDE: tl.constexpr):
    """a · b in fp32."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _scores(q, k, scale, keys_at, there, limit, valid, HAS_VALID: tl.constexpr, WIDE: tl.constexpr):
    """Scores to base 2 `[line, key]`, and which of the keys each line sees."""
    if HAS_VALID:
        there = there & (tl.load(valid + keys_at, mask=there, other=0) != 0)
    return _product(q, k, WIDE) * scale, there[None, :] & (keys_at[None, :] <= limit[:, None])


@triton.jit(do_not_specialize=[*VARYING, *VALUE_STRIDES, "marked", "marks_batch", "marks_head"])
def _partial(
    query, key, value, marks, position, valid, sums, stats,
    scale, rows, keys, marked, share, kv_heads,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    marks_batch, marks_head, marks_key, marks_group, position_batch, valid_batch,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, RAISED: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_VALID: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr,
    LINES: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One share of the keys for one tile of lines; a line is a row × query head × group.

    Grid: tiles of lines, shares, batch × KV head. `stats` `[batch, kv_head, line, share, 3]` gets maximum, total and mass,
    `sums` `[batch, kv_head, line, share, value_dim]` Σ e^(s − maximum) · v over the group. RAISED: `marks` are weights on |s|.
    """
    split, shares = tl.program_id(1), tl.num_programs(1)
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), (tl.program_id(2) % kv_heads).to(tl.int64)
    lines = rows * HEADS * GROUPS
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    real = line < lines
    group, row = line % GROUPS, line // (GROUPS * HEADS)
    head = (tl.program_id(2) % kv_heads) * HEADS + line // GROUPS % HEADS
    at, value_at = tl.arange(0, DIMS), tl.arange(0, VALUE_DIMS)
    query += batch * query_batch * UNIT
    q = tl.load(
        query + head[:, None].to(tl.int64) * query_head * UNIT + row[:, None].to(tl.int64) * query_row * UNIT + at[None, :],
        mask=real[:, None] & (at[None, :] < DIM), other=0,
    )  # fmt: skip
    limit = tl.full([LINES], 0, tl.int32) + (keys - 1)
    if HAS_POSITION:
        limit = tl.load(position + batch * position_batch + row, mask=real, other=-1).to(tl.int32)
    key += (batch * key_batch + kv_head * key_head) * UNIT
    value += (batch * value_batch + kv_head * value_head) * UNIT
    valid += batch * valid_batch
    marks += batch * marks_batch
    begin = split * share
    end = tl.minimum(tl.minimum(begin + share, keys), tl.max(tl.where(real, limit, -1), 0) + 1)
    top = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    mass = tl.zeros([LINES], tl.float32)
    kept = tl.zeros([LINES, VALUE_DIMS], tl.float32)
    for start in range(begin, end, KEYS):
        keys_at = start + tl.arange(0, KEYS)
        there = keys_at < end
        k = tl.load(
            key + keys_at[None, :].to(tl.int64) * key_row * UNIT + at[:, None],
            mask=there[None, :] & (at[:, None] < DIM),
            other=0,
        )
        v = tl.load(
            value + keys_at[:, None].to(tl.int64) * value_row * UNIT + value_at[None, :],
            mask=there[:, None] & (value_at[None, :] < VALUE_DIM), other=0,
        )  # fmt: skip
        scores, seen = _scores(q, k, scale, keys_at, there, limit, valid, HAS_VALID, WIDE)
        if RAISED:
            weight = tl.load(marks + keys_at * marks_key, mask=keys_at < marked, other=0).to(tl.float32)
            scores += weight[None, :] * tl.abs(scores)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(top - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if not RAISED:
            inside = tl.load(
                marks + head[:, None] * marks_head + keys_at[None, :] * marks_key + group[:, None] * marks_group,
                mask=real[:, None] & (keys_at[None, :] < marked), other=0,
            ).to(tl.float32)  # fmt: skip
            weights *= tl.where((keys_at[None, :] >= marked) & (group[:, None] == 0), 1.0, inside)
            mass = mass * shrink + tl.sum(weights, 1)
        kept = kept * shrink[:, None] + _product(weights.to(v.dtype), v, WIDE)
        top = new
    place = (tl.program_id(2).to(tl.int64) * lines + line) * shares + split
    tl.store(stats + place * 3, top, mask=real)
    tl.store(stats + place * 3 + 1, total, mask=real)
    tl.store(stats + place * 3 + 2, mass, mask=real)
    tl.store(sums + place[:, None] * VALUE_DIM + value_at[None, :], kept, mask=real[:, None] & (value_at[None, :] < VALUE_DIM))


@triton.jit(do_not_specialize=["rows", "shares"])
def _settle(stats, masses, rows, shares, HEADS: tl.constexpr, GROUPS: tl.constexpr, RAISED: tl.constexpr, SHARES: tl.constexpr):
    """Combine the shares of the keys, for one line. Grid: batch × KV head × line.

    In `stats` the maximum of each share is replaced by what its sums are to be multiplied with, so that the softmax sums to 1.
    `masses` `[batch, head, row, group]` unless RAISED.
    """
    line = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SHARES)
    inside = split < shares
    place = stats + (line * shares + split) * 3
    top = tl.load(place, mask=inside, other=float("-inf"))
    total = tl.load(place + 1, mask=inside, other=0.0)
    highest = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    whole = tl.sum(weight * total, 0)
    weight = weight / tl.where(whole == 0, 1.0, whole)
    tl.store(place, weight, mask=inside)
    if not RAISED:
        mass = tl.sum(weight * tl.load(place + 2, mask=inside, other=0.0), 0)
        group, head, row = line % GROUPS, line // GROUPS % HEADS, line // (GROUPS * HEADS) % rows
        head += line // (GROUPS * HEADS * rows) * HEADS  # of all batches
        tl.store(masses + (head * rows + row) * GROUPS + group, mass)


@triton.jit(do_not_specialize=["rows", "shares"])
def _combine(
    sums, stats, factors, out, rows, kv_heads, shares,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, RAISED: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_DIMS: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Output `[batch, row, head, value_dim]`: every group under its factor. Grid: batch × KV head × row × query head of it."""
    number = tl.program_id(0).to(tl.int64)
    heads = kv_heads * HEADS
    row, kv_head, batch = number // HEADS % rows, number // (HEADS * rows) % kv_heads, number // (HEADS * rows * kv_heads)
    head = kv_head * HEADS + number % HEADS
    at = tl.arange(0, VALUE_DIMS)
    found = tl.zeros([VALUE_DIMS], tl.float32)
    for group in tl.static_range(GROUPS):
        factor = 1.0
        if not RAISED:
            factor = tl.load(factors + ((batch * heads + head) * rows + row) * GROUPS + group)
        for first in range(0, shares, TOGETHER):
            split = first + tl.arange(0, TOGETHER)
            inside = split < shares
            place = (number * GROUPS + group) * shares + split
            weight = tl.load(stats + place * 3, mask=inside, other=0.0)
            part = tl.load(
                sums + place[:, None] * VALUE_DIM + at[None, :], mask=inside[:, None] & (at[None, :] < VALUE_DIM), other=0.0
            )
            found += factor * tl.sum(weight[:, None] * part, 0)
    tl.store(out + ((batch * rows + row) * heads + head) * VALUE_DIM + at, found, mask=at < VALUE_DIM)


@triton.jit(do_not_specialize=[*VARYING, *GROUPS_STRIDES])
def _row_masses(
    query, key, groups, position, valid, masses, logs,
    scale, rows, keys, marked, heads,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    groups_batch, groups_head, groups_key, groups_group, position_batch, valid_batch,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_VALID: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Masses `[batch, head, row, group]`, and log2 of the softmax's denominator `[batch, head, row]`, −inf if nothing is seen.

    Grid: tiles of rows, batch × head. HEADS: query heads of a KV head. GROUPS = 0: no masses.
    """
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    at = tl.arange(0, DIMS)
    query += (batch * query_batch + head * query_head) * UNIT
    q = tl.load(
        query + row[:, None].to(tl.int64) * query_row * UNIT + at[None, :], mask=real[:, None] & (at[None, :] < DIM), other=0
    )
    limit = tl.full([ROWS], 0, tl.int32) + (keys - 1)
    if HAS_POSITION:
        limit = tl.load(position + batch * position_batch + row, mask=real, other=-1).to(tl.int32)
    key += (batch * key_batch + head // HEADS * key_head) * UNIT
    valid += batch * valid_batch
    groups += batch * groups_batch + head * groups_head
    end = tl.minimum(keys, tl.max(tl.where(real, limit, -1), 0) + 1)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    column = tl.arange(0, GROUPS_PADDED)
    mass = tl.zeros([ROWS, GROUPS_PADDED], tl.float32)
    for start in range(0, end, KEYS):
        keys_at = start + tl.arange(0, KEYS)
        there = keys_at < end
        k = tl.load(
            key + keys_at[None, :].to(tl.int64) * key_row * UNIT + at[:, None],
            mask=there[None, :] & (at[:, None] < DIM),
            other=0,
        )
        scores, seen = _scores(q, k, scale, keys_at, there, limit, valid, HAS_VALID, WIDE)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(top - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mass *= shrink[:, None]
        for group in tl.static_range(GROUPS):
            inside = _inside(groups, keys_at, marked, groups_key, groups_group, group)
            mass += tl.where(column == group, 1.0, 0.0)[None, :] * tl.sum(weights * inside[None, :], 1)[:, None]
        top = new
    numbers = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(logs + numbers, top + tl.log2(tl.where(total == 0, 1.0, total)), mask=real)
    if GROUPS:
        mass = mass / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(masses + numbers[:, None] * GROUPS + column[None, :], mass, mask=real[:, None] & (column[None, :] < GROUPS))


@triton.jit
def _inside(groups, keys_at, marked, groups_key, groups_group, group):
    """Whether each key is in a group, `[key]` fp32: as marked, and in group 0 behind the marks."""
    inside = tl.load(groups + keys_at * groups_key + group * groups_group, mask=keys_at < marked, other=0).to(tl.float32)
    return tl.where((keys_at >= marked) & (group == 0), 1.0, inside)


@triton.jit(do_not_specialize=[*VARYING, *VALUE_STRIDES, *GROUPS_STRIDES])
def _weighted(
    query, key, value, groups, position, valid, logs, factors, out,
    scale, rows, keys, marked, heads,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    groups_batch, groups_head, groups_key, groups_group, position_batch, valid_batch,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_VALID: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Output `[batch, row, head, value_dim]` under `factors` `[batch, head, row, group]`. Grid: tiles of rows, batch × head."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    at, value_at = tl.arange(0, DIMS), tl.arange(0, VALUE_DIMS)
    query += (batch * query_batch + head * query_head) * UNIT
    q = tl.load(
        query + row[:, None].to(tl.int64) * query_row * UNIT + at[None, :], mask=real[:, None] & (at[None, :] < DIM), other=0
    )
    limit = tl.full([ROWS], 0, tl.int32) + (keys - 1)
    if HAS_POSITION:
        limit = tl.load(position + batch * position_batch + row, mask=real, other=-1).to(tl.int32)
    key += (batch * key_batch + head // HEADS * key_head) * UNIT
    value += (batch * value_batch + head // HEADS * value_head) * UNIT
    valid += batch * valid_batch
    groups += batch * groups_batch + head * groups_head
    end = tl.minimum(keys, tl.max(tl.where(real, limit, -1), 0) + 1)
    numbers = tl.program_id(1).to(tl.int64) * rows + row
    log = tl.load(logs + numbers, mask=real, other=0.0)
    log = tl.where(log == float("-inf"), 0.0, log)
    found = tl.zeros([ROWS, VALUE_DIMS], tl.float32)
    for start in range(0, end, KEYS):
        keys_at = start + tl.arange(0, KEYS)
        there = keys_at < end
        k = tl.load(
            key + keys_at[None, :].to(tl.int64) * key_row * UNIT + at[:, None],
            mask=there[None, :] & (at[:, None] < DIM),
            other=0,
        )
        v = tl.load(
            value + keys_at[:, None].to(tl.int64) * value_row * UNIT + value_at[None, :],
            mask=there[:, None] & (value_at[None, :] < VALUE_DIM), other=0,
        )  # fmt: skip
        scores, seen = _scores(q, k, scale, keys_at, there, limit, valid, HAS_VALID, WIDE)
        weights = tl.where(seen, tl.exp2(scores - log[:, None]), 0.0)
        changed = tl.zeros([ROWS, KEYS], tl.float32)
        for group in tl.static_range(GROUPS):
            factor = tl.load(factors + numbers * GROUPS + group, mask=real, other=0.0)
            changed += factor[:, None] * _inside(groups, keys_at, marked, groups_key, groups_group, group)[None, :]
        found += _product((weights * changed).to(v.dtype), v, WIDE)
    place = (batch * rows + row) * heads + head
    tl.store(out + place[:, None] * VALUE_DIM + value_at[None, :], found, mask=real[:, None] & (value_at[None, :] < VALUE_DIM))


@triton.jit(do_not_specialize=[*VARYING, "counted_batch"])
def _column_means(
    query, key, position, valid, counted, logs, out,
    scale, rows, keys, heads,
    query_batch, query_head, query_row, key_batch, key_head, key_row, position_batch, valid_batch, counted_batch,
    HEADS: tl.constexpr, HAS_VALID: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Means `[batch, head, key]` over the counted rows that see a key. Grid: tiles of keys, batch × head."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    keys_at = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    there = keys_at < keys
    at = tl.arange(0, DIMS)
    query += (batch * query_batch + head * query_head) * UNIT
    key += (batch * key_batch + head // HEADS * key_head) * UNIT
    k = tl.load(
        key + keys_at[None, :].to(tl.int64) * key_row * UNIT + at[:, None], mask=there[None, :] & (at[:, None] < DIM), other=0
    )
    total = tl.zeros([KEYS], tl.float32)
    seeing = tl.zeros([KEYS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < rows
        q = tl.load(
            query + row[:, None].to(tl.int64) * query_row * UNIT + at[None, :],
            mask=real[:, None] & (at[None, :] < DIM),
            other=0,
        )
        limit = tl.load(position + batch * position_batch + row, mask=real, other=-1).to(tl.int32)
        counts = real & (tl.load(counted + batch * counted_batch + row, mask=real, other=0) != 0)
        log = tl.load(logs + tl.program_id(1).to(tl.int64) * rows + row, mask=real, other=0.0)
        scores, seen = _scores(q, k, scale, keys_at, there, limit, valid + batch * valid_batch, HAS_VALID, WIDE)
        weights = tl.where(seen & counts[:, None], tl.exp2(scores - log[:, None]), 0.0)
        total += tl.sum(weights, 0)
        seeing += tl.sum(tl.where(counts[:, None] & (keys_at[None, :] <= limit[:, None]), 1.0, 0.0), 0)
    mean = total / tl.maximum(seeing, 1.0)
    tl.store(out + tl.program_id(1).to(tl.int64) * keys + keys_at, mean, mask=there)


def _padded(size: int) -> int:
    return max(triton.next_power_of_2(size), 16)


def _few_options(lines: int, dim: int, value_dim: int, dtype: torch.dtype) -> tuple[dict[str, Any], int, int]:
    """Constants, warps and stages of `_partial`.

    fp32 products are made without tensor cores, whose operands stand in registers: short tiles.
    """
    widest = max(_padded(dim), _padded(value_dim))
    tall = min(_padded(lines), TALLEST)
    if dtype == torch.float32:
        tile, warps, stages = {"LINES": 16, "KEYS": 32}, 4 if widest <= 64 else 8, 1
    else:
        tile, warps, stages = {"LINES": tall, "KEYS": 64 if widest <= 128 else 32}, 4, 3
    return {**tile, **_dims(dim), **_value_dims(value_dim), "WIDE": interpreted()}, warps, stages


def _many_options(dim: int, dtype: torch.dtype) -> tuple[dict[str, Any], int, int]:
    """Constants, warps and stages of the kernels over many rows."""
    widest = _padded(dim)
    if dtype == torch.float32:
        tile, warps, stages = {"ROWS": 16, "KEYS": 32 if widest <= 64 else 16}, 4, 1
    else:
        tile, warps, stages = {"ROWS": 64, "KEYS": 64 if widest <= 128 else 32}, 4 if widest <= 64 else 8, 3
    return {**tile, **_dims(dim), "WIDE": interpreted()}, warps, stages


def _dims(dim: int) -> dict[str, int]:
    return {"DIM": dim, "DIMS": _padded(dim)}


def _value_dims(dim: int) -> dict[str, int]:
    return {"VALUE_DIM": dim, "VALUE_DIMS": _padded(dim)}


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """A unit, and in it the strides of batch, head and row of every tensor."""
    unit = unit_of(*tensors)
    return unit, [stride for x in tensors for stride in in_units(x, unit)]


def _shares(lines: int, keys: int, programs: int, tile: int, tall: int) -> tuple[int, int]:
    """How many shares of the keys there are, and how many keys there are in one, a multiple of `tile`."""
    wanted = max(1, min(PROGRAMS // max(programs * triton.cdiv(lines, tall), 1), MOST_SHARES))
    share = max(triton.cdiv(triton.cdiv(keys, wanted), tile), 1) * tile
    return max(triton.cdiv(keys, share), 1), share


def _heads_strides(x: Tensor) -> tuple[int, int]:
    """Of batch and head in `[batch, 1 or head, …]`; one head stands for all."""
    return x.stride(0), x.stride(1) if x.shape[1] > 1 else 0


def _by_sample(x: Tensor | None, instead: Tensor) -> tuple[Tensor, int]:
    """`[batch or 1, …]` as kernels read it, bool as bytes, and the stride of the batch in just that; one sample stands for all.

    Where there is none: `instead`, which is not looked at.
    """
    if x is None:
        return instead, 0
    x = packed(x)
    return x.view(torch.uint8) if x.dtype == torch.bool else x, x.stride(0) if x.shape[0] > 1 else 0


@on_its_device
@in_fp32
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
    """`reference.grouped_attention` on a GPU."""
    batch, heads, rows, _ = query.shape
    lines = rows * heads // key.shape[1] * groups.shape[3]
    groups = groups.contiguous()
    masses = query.new_empty((batch, heads, rows, groups.shape[3]), dtype=torch.float32)
    if lines <= FEW_LINES:
        sums, stats = _shared_out(query, key, value, scaling, position, valid, groups, False)
        _settled(stats, masses, rows, heads // key.shape[1], groups.shape[3], False)
        factors = coefficients(masses)
        return _combined(sums, stats, factors, batch, rows, heads), factors, masses
    query, key, value = map(packed, (query, key, value))
    logs = query.new_empty((batch, heads, rows), dtype=torch.float32)
    _masses_of_rows(query, key, scaling, position, valid, groups, masses, logs)
    factors = coefficients(masses)
    out = query.new_empty((batch, rows, heads, value.shape[3]), dtype=torch.float32)
    options, warps, stages = _many_options(max(query.shape[3], value.shape[3]), query.dtype)
    options |= _dims(query.shape[3]) | _value_dims(value.shape[3])
    unit, strides = _strides(query, key, value)
    (places, places_batch), (seen, seen_batch) = _by_sample(position, query), _by_sample(valid, query)
    _weighted[(triton.cdiv(rows, options["ROWS"]), batch * heads)](
        query, key, value, groups, places, seen, logs,
        factors.float().contiguous(), out,
        scaling * LOG2E, rows, key.shape[2], groups.shape[2], heads,
        *strides,
        *_heads_strides(groups), *groups.stride()[2:], places_batch, seen_batch,
        HEADS=heads // key.shape[1], GROUPS=groups.shape[3], HAS_POSITION=position is not None, HAS_VALID=valid is not None,
        UNIT=unit, **options, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, factors, masses


@on_its_device
@in_fp32
def scored_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, position: Tensor | None, valid: Tensor | None, weight: Tensor
) -> Tensor:
    """`reference.scored_attention` on a GPU."""
    batch, heads, rows, _ = query.shape
    sums, stats = _shared_out(query, key, value, scaling, position, valid, weight[:, None, :, None], True)
    _settled(stats, None, rows, heads // key.shape[1], 1, True)
    return _combined(sums, stats, None, batch, rows, heads)


@on_its_device
@in_fp32
def column_means(query: Tensor, key: Tensor, scaling: float, position: Tensor, valid: Tensor | None, counted: Tensor) -> Tensor:
    """`reference.column_means` on a GPU."""
    batch, heads, rows, dim = query.shape
    query, key = map(packed, (query, key))
    logs = query.new_empty((batch, heads, rows), dtype=torch.float32)
    _masses_of_rows(query, key, scaling, position, valid, None, None, logs)
    out = query.new_empty((batch, heads, key.shape[2]), dtype=torch.float32)
    options, warps, stages = _many_options(dim, query.dtype)
    unit, strides = _strides(query, key)
    (places, places_batch), (seen, seen_batch) = _by_sample(position, query), _by_sample(valid, query)
    counts, counts_batch = _by_sample(counted, query)
    _column_means[(triton.cdiv(key.shape[2], options["KEYS"]), batch * heads)](
        query, key, places, seen, counts, logs, out,
        scaling * LOG2E, rows, key.shape[2], heads,
        *strides, places_batch, seen_batch, counts_batch,
        HEADS=heads // key.shape[1], HAS_VALID=valid is not None, UNIT=unit, **options,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _masses_of_rows(
    query: Tensor,
    key: Tensor,
    scaling: float,
    position: Tensor | None,
    valid: Tensor | None,
    groups: Tensor | None,
    masses: Tensor | None,
    logs: Tensor,
) -> None:
    """Fill `logs`, and `masses` where there are groups."""
    batch, heads, rows, dim = query.shape
    count = 0 if groups is None else groups.shape[3]
    groups_strides = (0, 0, 0, 0) if groups is None else (*_heads_strides(groups), *groups.stride()[2:])
    options, warps, stages = _many_options(dim, query.dtype)
    unit, strides = _strides(query, key)
    (places, places_batch), (seen, seen_batch) = _by_sample(position, query), _by_sample(valid, query)
    _row_masses[(triton.cdiv(rows, options["ROWS"]), batch * heads)](
        query, key, query if groups is None else groups, places, seen, logs if masses is None else masses, logs,
        scaling * LOG2E, rows, key.shape[2], 0 if groups is None else groups.shape[2], heads,
        *strides, *groups_strides, places_batch, seen_batch,
        HEADS=heads // key.shape[1], GROUPS=count, GROUPS_PADDED=triton.next_power_of_2(max(count, 1)),
        HAS_POSITION=position is not None, HAS_VALID=valid is not None, UNIT=unit, **options,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _shared_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    position: Tensor | None,
    valid: Tensor | None,
    marks: Tensor,
    raised: bool,
) -> tuple[Tensor, Tensor]:
    """`sums` `[batch · kv_head, line, share, value_dim]` and `stats` `[…, 3]` of `_partial`.

    Args:
        marks: `[batch, 1 or head, marked, group]`.
        raised: marks are weights on the size of the scores, in one group.
    """
    query, key, value, marks = *map(packed, (query, key, value)), marks.contiguous()
    batch, heads, rows, dim = query.shape
    kv_heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    lines = rows * heads // kv_heads * marks.shape[3]
    options, warps, stages = _few_options(lines, dim, value_dim, query.dtype)
    shares, share = _shares(lines, keys, batch * kv_heads, options["KEYS"], options["LINES"])
    sums = query.new_empty((batch * kv_heads, lines, shares, value_dim), dtype=torch.float32)
    stats = query.new_empty((batch * kv_heads, lines, shares, 3), dtype=torch.float32)
    unit, strides = _strides(query, key, value)
    (places, places_batch), (seen, seen_batch) = _by_sample(position, query), _by_sample(valid, query)
    _partial[(triton.cdiv(lines, options["LINES"]), shares, batch * kv_heads)](
        query, key, value, marks, places, seen, sums, stats,
        scaling * LOG2E, rows, keys, marks.shape[2], share, kv_heads,
        *strides,
        *_heads_strides(marks), *marks.stride()[2:], places_batch, seen_batch,
        HEADS=heads // kv_heads, GROUPS=marks.shape[3], RAISED=raised,
        HAS_POSITION=position is not None, HAS_VALID=valid is not None, UNIT=unit, **options,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return sums, stats


def _settled(stats: Tensor, masses: Tensor | None, rows: int, heads: int, groups: int, raised: bool) -> None:
    """`_settle` every line; `heads` are the query heads of a KV head."""
    most = triton.next_power_of_2(MOST_SHARES)  # not of these shares, whose number changes while keys are added
    _settle[(stats.shape[0] * stats.shape[1],)](
        stats, stats if masses is None else masses, rows, stats.shape[2],
        HEADS=heads, GROUPS=groups, RAISED=raised, SHARES=most, num_warps=1, num_stages=1,
    )  # fmt: skip


def _combined(sums: Tensor, stats: Tensor, factors: Tensor | None, batch: int, rows: int, heads: int) -> Tensor:
    """`[batch, row, head, value_dim]` fp32."""
    kv_heads, shares, value_dim = sums.shape[0] // batch, sums.shape[2], sums.shape[3]
    out = sums.new_empty((batch, rows, heads, value_dim))
    _combine[(batch * rows * heads,)](
        sums, stats, stats if factors is None else factors.float().contiguous(), out, rows, kv_heads, shares,
        HEADS=heads // kv_heads, GROUPS=1 if factors is None else factors.shape[3], RAISED=factors is None,
        **_value_dims(value_dim), TOGETHER=8, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def variants() -> list[Variant]:
    """Compiled ahead of time: head sizes and dtypes, decoding and prefill, as VAR (4 groups) and PAI (raised scores) do."""
    found = []
    for dtype, name, dims in ((torch.bfloat16, "bf16", (64, 72, 80, 128, 256)), (torch.float32, "fp32", (64, 80, 128))):
        for dim in dims:
            size = f"{name}, head size {dim}"
            cases = [(4, 4, "1 line of 4 groups"), (28, 4, "7 lines of 4 groups"), (1, 1, "1 line raised")]
            for lines, groups, what in cases if dim >= 128 else cases[::2]:
                options, *launch = _few_options(lines, dim, dim, dtype)
                few = {"HEADS": lines // groups, "GROUPS": groups, "RAISED": groups == 1, "HAS_POSITION": True}
                few |= {"HAS_VALID": True, "UNIT": 16 // dtype.itemsize, **options}
                found.append(_variant(f"_partial, {size}, {what}", _partial, name, few, *launch))
            options, *launch = _many_options(dim, dtype)
            columns = {"HEADS": 1, "HAS_VALID": True, "UNIT": 16 // dtype.itemsize, **options}
            found.append(_variant(f"_column_means, {size}", _column_means, name, columns, *launch))
            many = columns | {"HAS_POSITION": True, "GROUPS": 4}
            found.append(_variant(f"_row_masses, {size}, 4 groups", _row_masses, name, many | {"GROUPS_PADDED": 4}, *launch))
            found.append(_variant(f"_weighted, {size}, 4 groups", _weighted, name, many | _value_dims(dim), *launch))
    settle = {"HEADS": 1, "GROUPS": 4, "RAISED": False}
    found.append(_variant("_settle, 128 shares", _settle, "fp32", settle | {"SHARES": MOST_SHARES}, 1, 1))
    combine = settle | {"TOGETHER": 8, **_value_dims(128)}
    found.append(_variant("_combine, head size 128", _combine, "fp32", combine, 4, 1))
    return found


POINTERS = {"position": "i64", "valid": "u8", "counted": "u8"}
POINTERS |= dict.fromkeys(("marks", "groups", "sums", "stats", "masses", "logs", "factors", "out"), "fp32")


def _variant(case: str, kernel: Any, dtype: str, constants: dict[str, Any], warps: int, stages: int) -> Variant:
    """With the types of arguments that a launch would find."""
    pointers = POINTERS | dict.fromkeys(("query", "key", "value"), dtype)
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: f"*{pointers[name]}" if name in pointers else "fp32" if name == "scale" else "i32" for name in names}
    aligned = tuple(name for name in names if name in pointers)
    return Variant("grouped_attention", case, kernel, types, constants, aligned, warps, stages)
