"""Greedy selection on a GPU: each program owns some tokens, and publishes the farthest of them as one number in memory, a word.

    word = distance as an ordered integer · 2³² + (2³¹ − 1 − token)      the greatest word: farthest, then lowest index

Max-min        `_nearest` finds each token's greatest similarity in tiles of rows × columns, and `_farthest` does the rest in
               one launch. For every pick a program takes the greatest of all words of its picture, compares its own tokens with
               that token, and writes its next word. Each pick has words of its own, and a word that is not yet written is
               EMPTY. So a word is its own signal: programs need no barrier, no order of other memory, and no atomics but one
               exchange. They wait for each other, and must all run at the same time: a cooperative launch with at most one
               program for each multiprocessor. In the interpreter programs run one after the other: a launch for each pick.
Determinants   `_determinant`, one launch for each pick: a program needs results of earlier picks that other programs wrote, and
               a new launch reads everything that the last one wrote.

Features are read as they are and divided by their lengths (`_lengths`) afterwards. Nothing is n×n.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmprune.kernels.dispatch import in_fp32
from vlmprune.kernels.launching import interpreted, on_its_device, packed
from vlmprune.kernels.select_diverse.reference import RANK
from vlmprune.kernels.variants import Variant

EMPTY = tl.constexpr(-(2**63))
"""Marks a word that is not yet written; no distance is as low."""

SHORTEST = tl.constexpr(1e-12)
"""Lengths are at least this, as in torch's `normalize`."""

COLUMN_SHARES = 8
"""Programs that share the columns of a tile of rows in `_nearest`."""


@triton.jit
def _word(distance, token):
    """A distance as an ordered integer, followed by the index; ties go to the lower index."""
    bits = (distance + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def _token(word):
    return (0x7FFFFFFF - (word & 0x7FFFFFFF)).to(tl.int32)


@triton.jit(do_not_specialize=["visual"])
def _lengths(
    features, inverse, visual, feature_image, feature_token, DIM: tl.constexpr, TOKENS: tl.constexpr, DIMS: tl.constexpr
):
    """One over the length of every token `[image, visual]`. Grid: tiles of tokens, images."""
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = token < visual
    squares = tl.zeros([TOKENS, DIMS], tl.float32)
    for start in range(0, DIM, DIMS):
        at = start + tl.arange(0, DIMS)
        x = tl.load(
            features + image * feature_image + token[:, None].to(tl.int64) * feature_token + at[None, :],
            mask=real[:, None] & (at[None, :] < DIM), other=0,
        ).to(tl.float32)  # fmt: skip
        squares += x * x
    length = tl.sqrt_rn(tl.sum(squares, 1))
    tl.store(inverse + image * visual + token, 1.0 / tl.maximum(length, SHORTEST), mask=real)


@triton.jit(do_not_specialize=["visual"])
def _nearest(
    features, inverse, likeness, visual, share, feature_image, feature_token,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Greatest similarity of each token to another one of a share of the columns, `[image, share, visual]`.

    Grid: tiles of rows, shares, images. `share`: columns in one.
    """
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features += image * feature_image
    inverse += image * visual
    row_inverse = tl.load(inverse + row, mask=row < visual, other=0.0)
    greatest = tl.full([ROWS], float("-inf"), tl.float32)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, visual)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, DIM, DIMS):
            at = start + tl.arange(0, DIMS)
            a = tl.load(
                features + row[:, None].to(tl.int64) * feature_token + at[None, :],
                mask=(row < visual)[:, None] & (at[None, :] < DIM), other=0,
            )  # fmt: skip
            b = tl.load(
                features + column[None, :].to(tl.int64) * feature_token + at[:, None],
                mask=(column < end)[None, :] & (at[:, None] < DIM), other=0,
            )  # fmt: skip
            if WIDE:
                products += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
            else:
                products = tl.dot(a, b, products, input_precision="tf32x3")
        column_inverse = tl.load(inverse + column, mask=column < end, other=0.0)
        cosine = products * row_inverse[:, None] * column_inverse[None, :]
        other = (column < end)[None, :] & (column[None, :] != row[:, None])
        greatest = tl.maximum(greatest, tl.max(tl.where(other, cosine, float("-inf")), 1))
    place = (image * tl.num_programs(1) + tl.program_id(1)) * visual + row
    tl.store(likeness + place, greatest, mask=row < visual)


@triton.jit
def _cosines(
    features, inverse, token, pick, visual, feature_token, DIM: tl.constexpr, TOKENS: tl.constexpr, DIMS: tl.constexpr
):
    """Similarity of some tokens of a picture to one of them, `[token]`."""
    products = tl.zeros([TOKENS, DIMS], tl.float32)
    for start in tl.static_range(0, DIM, DIMS):
        at = start + tl.arange(0, DIMS)
        own = tl.load(
            features + token[:, None].to(tl.int64) * feature_token + at[None, :],
            mask=(token < visual)[:, None] & (at[None, :] < DIM), other=0,
        ).to(tl.float32)  # fmt: skip
        picked = tl.load(features + pick.to(tl.int64) * feature_token + at, mask=at < DIM, other=0).to(tl.float32)
        products += own * picked[None, :]
    lengths = tl.load(inverse + token, mask=token < visual, other=0.0) * tl.load(inverse + pick)
    return tl.sum(products, 1) * lengths


@triton.jit
def _greatest(words, programs, PROGRAMS: tl.constexpr):
    """The greatest of the words of a picture's programs; waits until all are written."""
    each = tl.arange(0, PROGRAMS)
    found = tl.load(words + each, mask=each < programs, other=EMPTY + 1, volatile=True)
    while tl.min(found, 0) == EMPTY:
        found = tl.load(words + each, mask=each < programs, other=EMPTY + 1, volatile=True)
    # Once more: of several threads that hold copies of a word, read at different times, one may have come too early.
    found = tl.load(words + each, mask=each < programs, other=EMPTY + 1, volatile=True)
    return tl.max(found, 0)


@triton.jit(do_not_specialize=["visual", "keep", "first_step", "steps", "tiles", "shares"])
def _farthest(
    features, inverse, likeness, apart, words, order,
    visual, keep, first_step, steps, tiles, shares, feature_image, feature_token,
    DIM: tl.constexpr, TOKENS: tl.constexpr, DIMS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Steps of the selection. Grid: programs of a picture, images; a program owns `tiles` tiles of tokens.

    Step 0 finds the token whose nearest other one is farthest. Step s > 0 stores pick s − 1, and finds the token that is
    farthest from all picks so far.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(1).to(tl.int64)
    features += image * feature_image
    inverse += image * visual
    apart += image * visual
    words += image * keep * programs
    for step in range(first_step, first_step + steps):
        pick = tl.full([], -1, tl.int32)
        if step > 0:
            pick = _token(_greatest(words + (step - 1) * programs, programs, PROGRAMS))
            if program == 0:
                tl.store(order + image * keep + step - 1, pick.to(tl.int64))
        best = tl.full([], EMPTY + 1, tl.int64)
        for tile in range(tiles):
            token = (program * tiles + tile) * TOKENS + tl.arange(0, TOKENS)
            real = token < visual
            if step == 0:
                greatest = tl.full([TOKENS], float("-inf"), tl.float32)
                for share in range(shares):
                    found = tl.load(likeness + (image * shares + share) * visual + token, mask=real, other=0.0)
                    greatest = tl.maximum(greatest, found)
                distance = 1.0 - greatest
            else:
                before = tl.load(apart + token, mask=real, other=0.0)
                cosine = _cosines(features, inverse, token, pick, visual, feature_token, DIM, TOKENS, DIMS)
                distance = tl.where(token == pick, float("-inf"), tl.minimum(before, 1.0 - cosine))
                tl.debug_barrier()  # several threads read a token's distance and one writes it: all have read it here
                tl.store(apart + token, distance, mask=real)
            best = tl.maximum(best, tl.max(tl.where(real, _word(distance, token), EMPTY + 1), 0))
        if step < keep:
            tl.atomic_xchg(words + step * programs + program, best, sem="relaxed")
        tl.debug_barrier()  # other threads read `apart` in the next step


@triton.jit(do_not_specialize=["visual", "keep", "step", "tiles", "weight_image"])
def _determinant(
    features, inverse, weight, gain, rounding, factor, words, order,
    visual, keep, step, tiles, feature_image, feature_token, weight_image,
    DIM: tl.constexpr, TOKENS: tl.constexpr, DIMS: tl.constexpr, PROGRAMS: tl.constexpr, STEPS: tl.constexpr,
    SMALLEST: tl.constexpr,
):  # fmt: skip
    """One step of the selection. Grid: programs of a picture, images; a program owns `tiles` tiles of tokens.

    Step 0 computes `gain`, the squared length of every token, and `rounding`, SMALLEST of it. Step s > 0 stores pick s − 1,
    writes its part of every token to `factor` `[image, keep, visual]`, and subtracts it from `gain`. Each step finds the token
    with the greatest gain.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(1).to(tl.int64)
    features += image * feature_image
    inverse += image * visual
    weight += image * weight_image
    gain += image * visual
    rounding += image * visual
    factor += image * keep * visual
    words += image * keep * programs
    pick = tl.full([], 0, tl.int32)
    length = tl.full([], 0.0, tl.float32)
    pick_weight = tl.full([], 0.0, tl.float32)
    if step > 0:
        # Only its owner reads a gain: that of the pick is in the pick's word.
        word = _greatest(words + (step - 1) * programs, programs, PROGRAMS)
        pick = _token(word)
        length = tl.sqrt_rn(tl.maximum((word >> 32).to(tl.int32).to(tl.float32, bitcast=True), 0.0))
        pick_weight = tl.load(weight + pick)
        if program == 0:
            tl.store(order + image * keep + step - 1, pick.to(tl.int64))
    best = tl.full([], EMPTY + 1, tl.int64)
    for tile in range(tiles):
        token = (program * tiles + tile) * TOKENS + tl.arange(0, TOKENS)
        real = token < visual
        if step == 0:
            left = tl.zeros([TOKENS], tl.float32)
            squares = tl.zeros([TOKENS, DIMS], tl.float32)
            for start in tl.static_range(0, DIM, DIMS):
                at = start + tl.arange(0, DIMS)
                own = tl.load(
                    features + token[:, None].to(tl.int64) * feature_token + at[None, :],
                    mask=real[:, None] & (at[None, :] < DIM), other=0,
                ).to(tl.float32)  # fmt: skip
                squares += own * own
            scale = tl.load(inverse + token, mask=real, other=0.0) * tl.load(weight + token, mask=real, other=0.0)
            left = tl.sum(squares, 1) * scale * scale
            tl.store(rounding + token, SMALLEST * left, mask=real)
        else:
            similarity = _cosines(features, inverse, token, pick, visual, feature_token, DIM, TOKENS, DIMS)
            similarity *= tl.load(weight + token, mask=real, other=0.0) * pick_weight
            shared = tl.zeros([STEPS, TOKENS], tl.float32)
            for first in range(0, step - 1, STEPS):
                earlier = first + tl.arange(0, STEPS)
                row = factor + earlier[:, None].to(tl.int64) * visual
                there = (earlier < step - 1)[:, None]
                shared += tl.load(row + token[None, :], mask=there & real[None, :], other=0.0) * tl.load(
                    row + pick, mask=there, other=0.0
                )
            part = tl.where(length > 0, (similarity - tl.sum(shared, 0)) / tl.where(length > 0, length, 1.0), 0.0)
            tl.store(factor + tl.cast(step - 1, tl.int64) * visual + token, part, mask=real)
            before = tl.load(gain + token, mask=real, other=0.0)
            left = before - part * part
            left = tl.where(left > tl.load(rounding + token, mask=real, other=0.0), left, 0.0)
            left = tl.where(before < 0, before, left)
            left = tl.where(token == pick, -1.0, left)
            tl.debug_barrier()  # several threads read a token's gain and one writes it: all have read it here
        tl.store(gain + token, left, mask=real)
        best = tl.maximum(best, tl.max(tl.where(real, _word(left, token), EMPTY + 1), 0))
    if step < keep:
        tl.store(words + step * programs + program, best)


def _tile(dim: int) -> dict[str, int]:
    """TOKENS × DIMS numbers that a program has in flight: up to 64 bytes of bf16 for each thread of 8 warps."""
    dims = min(triton.next_power_of_2(dim), 1024)
    return {"DIM": dim, "TOKENS": min(8192 // dims, 64), "DIMS": dims}


def _square_tile(dim: int, dtype: torch.dtype) -> tuple[dict[str, Any], int, int]:
    """Constants, warps and stages of `_nearest`. fp32 is multiplied as three products of tf32, as exact as fp32's sums."""
    side, deep = (64, 32) if dtype == torch.float32 else (128, 64)
    return {"DIM": dim, "ROWS": side, "COLUMNS": side, "DIMS": deep, "WIDE": interpreted()}, 8, 3


def _lengths_of(features: Tensor) -> Tensor:
    """`[image, visual]` fp32."""
    images, visual, dim = features.shape
    tile = _tile(dim)
    inverse = features.new_empty((images, visual), dtype=torch.float32)
    _lengths[(triton.cdiv(visual, tile["TOKENS"]), images)](
        features, inverse, visual, *features.stride()[:2], **tile, num_warps=8, num_stages=1
    )
    return inverse


def _programs(images: int, visual: int, tokens: int, most: int) -> tuple[int, int]:
    """Programs of one picture, of which all pictures have at most `most`, and tiles of tokens of each."""
    tiles = triton.cdiv(triton.cdiv(visual, tokens), max(most // max(images, 1), 1))
    return triton.cdiv(visual, tokens * tiles), tiles


def _at_once(features: Tensor) -> int:
    """Programs that a device surely runs at the same time: its multiprocessors. Few where they run in turn."""
    return torch.cuda.get_device_properties(features.device).multi_processor_count if features.is_cuda else 4


@on_its_device
@in_fp32
def greedy_order(features: Tensor, keep: int) -> Tensor:
    """`reference.greedy_order` on a GPU."""
    features = packed(features.detach())
    order = features.new_empty((features.shape[0], keep), dtype=torch.long)
    most = _at_once(features)
    for first in range(0, features.shape[0] if keep else 0, most):  # more pictures than programs: some after the others
        _greedy(features[first : first + most], keep, most, order[first : first + most])
    return order


def _greedy(features: Tensor, keep: int, most: int, order: Tensor) -> None:
    images, visual, dim = features.shape
    inverse = _lengths_of(features)
    square, warps, stages = _square_tile(dim, features.dtype)
    share = triton.cdiv(triton.cdiv(visual, COLUMN_SHARES), square["COLUMNS"]) * square["COLUMNS"]
    shares = triton.cdiv(visual, share)
    likeness = features.new_empty((images, shares, visual), dtype=torch.float32)
    _nearest[(triton.cdiv(visual, square["ROWS"]), shares, images)](
        features, inverse, likeness, visual, share, *features.stride()[:2], **square, num_warps=warps, num_stages=stages
    )
    tile = _tile(dim)
    programs, tiles = _programs(images, visual, tile["TOKENS"], most)
    apart = features.new_full((images, visual), torch.inf, dtype=torch.float32)
    words = features.new_full((images, keep, programs), EMPTY.value, dtype=torch.int64)
    steps = 1 if interpreted() else keep + 1
    for step in range(0, keep + 1, steps):
        _farthest[(programs, images)](
            features, inverse, likeness, apart, words, order,
            visual, keep, step, steps, tiles, shares, *features.stride()[:2],
            **tile, PROGRAMS=triton.next_power_of_2(programs), num_warps=8, num_stages=1,
            launch_cooperative_grid=not interpreted(),
        )  # fmt: skip


@on_its_device
@in_fp32
def determinant_order(features: Tensor, weight: Tensor, keep: int) -> Tensor:
    """`reference.determinant_order` on a GPU."""
    features, weight = packed(features.detach()), packed(weight.detach())
    images, visual, dim = features.shape
    order = features.new_empty((images, keep), dtype=torch.long)
    inverse = _lengths_of(features)
    gain, rounding = inverse.new_empty((images, visual)), inverse.new_empty((images, visual))
    factor = inverse.new_empty((images, keep, visual))
    tile = _tile(dim)
    programs, tiles = _programs(images, visual, tile["TOKENS"], _at_once(features))
    words = features.new_empty((images, keep, programs), dtype=torch.int64)
    for step in range(keep + 1 if keep else 0):
        _determinant[(programs, images)](
            features, inverse, weight, gain, rounding, factor, words, order,
            visual, keep, step, tiles, *features.stride()[:2], weight.stride(0),
            **tile, PROGRAMS=triton.next_power_of_2(programs), STEPS=16, SMALLEST=RANK, num_warps=8, num_stages=1,
        )  # fmt: skip
    return order


def variants() -> list[Variant]:
    """Compiled ahead of time: 2880 tokens of the widths of towers and of language models, on 132 multiprocessors."""
    found = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for dim in (1024, 1152, 4096):
            size = f"{name}, width {dim}"
            tile = _tile(dim)
            found.append(_variant(f"_lengths, {size}", _lengths, name, tile, 8, 1))
            square, *launch = _square_tile(dim, dtype)
            found.append(_variant(f"_nearest, {size}", _nearest, name, square, *launch))
            programs, _ = _programs(1, 2880, tile["TOKENS"], 132)
            chosen = tile | {"PROGRAMS": triton.next_power_of_2(programs)}
            found.append(_variant(f"_farthest, {size}", _farthest, name, chosen, 8, 1))
            chosen = chosen | {"STEPS": 16, "SMALLEST": RANK}
            found.append(_variant(f"_determinant, {size}", _determinant, name, chosen, 8, 1))
    return found


def _variant(case: str, kernel: Any, dtype: str, constants: dict[str, Any], warps: int, stages: int) -> Variant:
    """With the types of arguments that a launch would find."""
    pointers = dict.fromkeys(("inverse", "likeness", "apart", "weight", "gain", "rounding", "factor"), "fp32")
    pointers |= {"features": dtype, "words": "i64", "order": "i64"}
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in names}
    aligned = tuple(name for name in names if name in pointers or name.startswith("feature_"))
    return Variant("select_diverse", case, kernel, types, constants, aligned, warps, stages)
