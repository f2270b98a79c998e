"""One launch copies rows of several tensors, as words of the widest kind that all addresses and strides allow.

A program copies a tile of ROWS kept tokens by COLUMNS words of one head of one sample. It computes nothing with the words, so
that all dtypes are alike. An index outside the tensor reads nothing: all bits of its row become 1, a NaN in every float format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmprune.kernels.launching import on_its_device
from vlmprune.kernels.variants import Variant

TILE = 2048
"""Words of a tile: 16 for each of the 128 threads, which are four of the widest loads in flight."""

FIELDS = tl.constexpr(9)
"""Numbers that describe a tensor in the table of `_gather_many`."""


@triton.jit
def _move(
    source,
    target,
    batch_stride,
    head_stride,
    token_stride,
    heads,
    units,
    tokens,
    tile,
    rows,
    rows_batch,
    rows_step,
    valid,
    valid_batch,
    valid_step,
    kept,
    MASKED: tl.constexpr,
    WORD: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of one tensor; strides and a row's `units` are counted in VECTOR words, addresses in bytes."""
    # The compiler uses these hints, and loads UNIT bytes, only on results of operations and on products with a constant.
    source = tl.multiple_of(source.to(tl.pointer_type(WORD)), UNIT)
    target = tl.multiple_of(target.to(tl.pointer_type(WORD)), UNIT)
    batch_stride = batch_stride.to(tl.int64) * VECTOR
    head_stride = head_stride.to(tl.int64) * VECTOR
    token_stride = token_stride.to(tl.int64) * VECTOR
    words = units.to(tl.int64) * VECTOR
    column_tiles = tl.cdiv(words, COLUMNS)
    row_tiles = tl.cdiv(kept, ROWS)
    column = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    rest = tile // column_tiles
    place = (rest % row_tiles) * ROWS + tl.arange(0, ROWS)
    rest = rest // row_tiles
    head = rest % heads
    sample = (rest // heads).to(tl.int64)

    real = place < kept
    row = tl.load(rows + sample * rows_batch + place.to(tl.int64) * rows_step, mask=real, other=0)
    read = real & (row >= 0) & (row < tokens)
    if MASKED:
        wanted = tl.load(valid + sample * valid_batch + place.to(tl.int64) * valid_step, mask=real, other=0) != 0
        read = read & wanted
    here = sample * batch_stride + head * head_stride
    inside = column < words
    found = tl.load(
        source + here + row[:, None] * token_stride + column[None, :], mask=read[:, None] & inside[None, :], other=-1
    )
    if MASKED:
        found = tl.where(wanted[:, None], found, tl.zeros_like(found))
    there = ((sample * heads + head) * kept + place.to(tl.int64)[:, None]) * words + column[None, :]
    tl.store(target + there, found, mask=real[:, None] & inside[None, :])


@triton.jit(
    do_not_specialize=[
        *("source", "target", "batch_stride", "head_stride", "token_stride", "heads", "units", "tokens"),
        *("rows_batch", "rows_step", "valid_batch", "valid_step", "kept"),
    ]
)
def _gather_one(
    source,
    target,
    batch_stride,
    head_stride,
    token_stride,
    heads,
    units,
    tokens,
    rows,
    rows_batch,
    rows_step,
    valid,
    valid_batch,
    valid_step,
    kept,
    MASKED: tl.constexpr,
    WORD: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of the only tensor."""
    _move(
        source,
        target,
        batch_stride,
        head_stride,
        token_stride,
        heads,
        units,
        tokens,
        tl.program_id(0),
        rows,
        rows_batch,
        rows_step,
        valid,
        valid_batch,
        valid_step,
        kept,
        MASKED,
        WORD,
        UNIT,
        VECTOR,
        ROWS,
        COLUMNS,
    )


@triton.jit(do_not_specialize=["count", "rows_batch", "rows_step", "valid_batch", "valid_step", "kept"])
def _gather_many(
    table,
    count,
    rows,
    rows_batch,
    rows_step,
    valid,
    valid_batch,
    valid_step,
    kept,
    MOST: tl.constexpr,
    MASKED: tl.constexpr,
    WORD: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of the tensor whose tiles begin last before it: `table` `[count, FIELDS]` holds the first tile of each."""
    tile = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, MOST)
    first = tl.load(table + each * FIELDS + FIELDS - 1, mask=each < count, other=9223372036854775807)
    own = table + (tl.sum((first <= tile).to(tl.int32)) - 1) * FIELDS
    _move(
        tl.load(own),
        tl.load(own + 1),
        tl.load(own + 2),
        tl.load(own + 3),
        tl.load(own + 4),
        tl.load(own + 5),
        tl.load(own + 6),
        tl.load(own + 7),
        tile - tl.load(own + 8),
        rows,
        rows_batch,
        rows_step,
        valid,
        valid_batch,
        valid_step,
        kept,
        MASKED,
        WORD,
        UNIT,
        VECTOR,
        ROWS,
        COLUMNS,
    )


def options(unit: int, widest: int) -> dict[str, Any]:
    """Constants of both kernels.

    Args:
        unit: bytes that every address, stride and row is a multiple of: 1, 2, 4, 8 or 16.
        widest: bytes of the widest row. A tile is as wide, up to a quarter of `TILE`, and as high as `TILE` allows.
    """
    word = min(unit, 4)
    columns = min(triton.next_power_of_2(max(widest // word, 1)), TILE // 4)
    return {
        "WORD": {1: tl.int8, 2: tl.int16, 4: tl.int32}[word],
        "UNIT": unit,
        "VECTOR": unit // word,
        "ROWS": min(TILE // columns, 64),
        "COLUMNS": columns,
        "num_warps": 4,
        "num_stages": 1,
    }


@on_its_device
def gather_all(tensors: Sequence[Tensor], rows: Tensor, valid: Tensor | None = None) -> list[Tensor]:
    """See `reference.gather_all`. Differentiable. A tensor whose last axis is not contiguous is copied first."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return list(_Gather.apply(rows, valid, *tensors))
    return _gathered(tensors, rows, valid)


@on_its_device
def gather_tokens(x: Tensor, rows: Tensor, valid: Tensor | None = None) -> Tensor:
    """See `reference.gather_tokens`. Differentiable. An `x` whose last axis is not contiguous is copied first."""
    return gather_all([x], rows, valid)[0]


class _Gather(torch.autograd.Function):
    """Each token's gradient returns to the row that the token was taken from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, valid: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows, valid)
        ctx.shapes = [x.shape for x in tensors]
        return tuple(_gathered(tensors, rows, valid))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, valid = ctx.saved_tensors
        batch, kept = rows.shape
        found: list[Tensor | None] = []
        for shape, grad, needed in zip(ctx.shapes, grads, ctx.needs_input_grad[2:], strict=True):
            if not needed:
                found.append(None)
                continue
            between = [1] * (len(shape) - 3)
            if valid is not None:
                grad = grad.masked_fill(~valid.view(batch, *between, kept, 1), 0)
            whole = grad.new_zeros(batch, *shape[1:])
            whole.scatter_add_(-2, rows.view(batch, *between, kept, 1).expand(grad.shape), grad)
            found.append(whole.sum_to_size(shape))
        return None, None, *found


def _gathered(tensors: Sequence[Tensor], rows: Tensor, valid: Tensor | None) -> list[Tensor]:
    batch, kept = rows.shape
    sources, found = [], []
    for x in tensors:
        found.append(torch.empty(batch, *x.shape[1:-1][:-1], kept, x.shape[-1], dtype=x.dtype, device=x.device))
        if found[-1].numel():
            flat = x.detach().unsqueeze(1).flatten(1, -3) if x.ndim != 4 else x.detach()  # [batch or 1, head, token, dim]
            sources.append(flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous())
    targets = [y for y in found if y.numel()]
    if not targets:
        return found
    # Bytes: address, target, strides of batch, head and token; then heads, bytes of a row, tokens.
    places = [
        (
            x.data_ptr(),
            y.data_ptr(),
            *(stride * x.element_size() if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)),
            x.shape[3] * x.element_size(),
        )
        for x, y in zip(sources, targets, strict=True)
    ]
    unit = math.gcd(16, *(number for place in places for number in place))
    chosen = options(unit, max(place[-1] for place in places))
    word = unit // chosen["VECTOR"]
    table, tiles = [], 0
    for x, (source, target, *strides, width) in zip(sources, places, strict=True):
        units = width // unit
        table.append([source, target, *(stride // unit for stride in strides), x.shape[1], units, x.shape[2], tiles])
        tiles += batch * x.shape[1] * triton.cdiv(kept, chosen["ROWS"]) * triton.cdiv(width // word, chosen["COLUMNS"])
    flags = rows if valid is None else valid.view(torch.uint8)
    which = (rows, *rows.stride(), flags, *flags.stride(), kept)
    chosen["MASKED"] = valid is not None
    if len(table) == 1:
        _gather_one[(tiles,)](*table[0][:-1], *which, **chosen)
    else:
        # A copy from pinned memory joins the launch queue: the host does not wait for the GPU.
        numbers = torch.tensor(table, dtype=torch.int64, pin_memory=rows.is_cuda).to(rows.device, non_blocking=True)
        _gather_many[(tiles,)](numbers, len(table), *which, MOST=triton.next_power_of_2(len(table)), **chosen)
    return found


def variants() -> list[Variant]:
    found = []
    common = {
        "rows": "*i64",
        "rows_batch": "i32",
        "rows_step": "i32",
        "valid": "*u8",
        "valid_batch": "i32",
        "valid_step": "i32",
    }
    common |= {"kept": "i32"}
    numbers = dict.fromkeys(("batch_stride", "head_stride", "token_stride", "heads", "units", "tokens"), "i32")
    cases = [("rows of 8 KiB", 16, 8192, True), ("head 128 bf16", 16, 256, False), ("head 72 bf16", 16, 144, True)]
    cases += [("head 70 fp32", 8, 280, True), ("head 65 fp32", 4, 260, True), ("head 65 bf16", 2, 130, True)]
    for size, unit, widest, masked in [*cases, ("odd bytes", 1, 77, True)]:
        chosen = options(unit, widest) | {"MASKED": masked}
        warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
        case = f"{size}, {unit}-byte loads" + (", padded" if masked else "")
        one = {"source": "i64", "target": "i64"} | numbers | common
        aligned = ("rows", "valid") if masked else ("rows",)
        found.append(Variant("gather_tokens", f"one, {case}", _gather_one, one, chosen, aligned, warps, stages))
        many = {"table": "*i64", "count": "i32"} | common
        chosen, aligned = chosen | {"MOST": 64}, (*aligned, "table")
        found.append(Variant("gather_tokens", f"many, {case}", _gather_many, many, chosen, aligned, warps, stages))
    return found
