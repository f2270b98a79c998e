"""Grouped and scored attention against loops: every head sharing, row, padding and degenerate group."""

from __future__ import annotations

import itertools

import pytest
import torch
from redistribution.loops.act import act_row
from redistribution.loops.plain import raised, softmax
from redistribution.loops.var import var_row
from redistribution.loops.zerotuning import zero_row

import vlmprune as vp
from vlmprune.kernels.grouped_attention import column_means, grouped_attention, reference, scored_attention

KINDS = ("text", "visual", "visual sink", "text sink")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
CODES = {
    "mixed": [3, 0, 0, 1, 1, 2, 1, 2, 1, 1, 0, 3, 0, 0],
    "no visual sink": [3, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 3, 0, 0],
    "no sink": [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    "all visual are sinks": [3, 0, 0, 2, 2, 2, 2, 2, 2, 2, 0, 3, 0, 0],
    "everything a sink": [3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3],
    "no picture": [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0],
}
types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
heads = pytest.mark.parametrize("kv_heads", [6, 2, 1], ids=["MHA", "GQA", "MQA"])
phases = pytest.mark.parametrize("phase", ["prefill", "decode"])


def case(dtype, kv_heads, phase, ragged=True, keys=18):
    """Six query heads, rows 12 … 17 or the last; the second of two samples begins with three entries of padding."""
    torch.manual_seed(3)
    rows = 6 if phase == "prefill" else 1
    query = torch.randn(2, 6, rows, 8, dtype=dtype)
    key, value = torch.randn(2, 2, kv_heads, keys, 8, dtype=dtype)
    position = torch.arange(keys - rows, keys)[None] if phase == "prefill" else None
    valid = torch.ones(2, keys, dtype=torch.bool)
    if ragged:
        valid[1, :3] = False
    return query, key, value, 0.6, position, valid


def looped(query, key, value, scaling, position, valid, edit):
    """`edit(sample, head, scores, columns) -> weights`."""
    batch, count, rows, _ = query.shape
    out = torch.zeros(batch, rows, count, value.shape[-1], dtype=torch.float64)
    for sample in range(batch):
        for head in range(count):
            k, v = (x[sample, head // (count // key.shape[1])].double() for x in (key, value))
            for row in range(rows):
                last = key.shape[2] - 1 if position is None else int(position[0, row])
                columns = [c for c in range(last + 1) if valid[sample, c]]
                scores = [float(query[sample, head, row].double() @ k[c]) * scaling for c in columns]
                weights = edit(sample, head, scores, columns)
                assert abs(sum(weights) - 1) < 1e-9, "rows must go on summing to one"
                out[sample, row, head] = sum(w * v[c] for w, c in zip(weights, columns, strict=True))
    return out


def one_hot(codes, groups, dtype):
    return torch.stack([codes == group for group in range(groups + 1)], dim=-1).to(dtype)


THRESHOLDS = {"all heads": (1.0, 0.0), "some heads": (0.4, 0.45), "none": (0.0, 0.0)}
LEVELS = {
    "dtype": list(TOLERANCE),
    "kv_heads": [6, 2, 1],
    "phase": ["prefill", "decode"],
    "codes": list(CODES),
    "selected": list(THRESHOLDS),
}


def pairwise() -> list[tuple]:
    """Combinations in which every two levels of different parameters meet; greedily, so not the fewest."""
    whole = list(itertools.product(*LEVELS.values()))
    missing = {pair for row in whole for pair in itertools.combinations(enumerate(row), 2)}
    chosen = []
    while missing:
        best = max(whole, key=lambda row: len(missing & set(itertools.combinations(enumerate(row), 2))))
        chosen.append(best)
        missing -= set(itertools.combinations(enumerate(best), 2))
    return chosen


@pytest.mark.parametrize(tuple(LEVELS), [*pairwise(), *itertools.product([torch.float32], [2], ["prefill"], CODES, THRESHOLDS)])
def test_var_equals_softmax_then_edit(dtype, kv_heads, phase, codes, selected):
    """Red: a group's mass, a head's selection or the share of a key is wrong in any of these cases."""
    share, least = THRESHOLDS[selected]
    codes = CODES[codes]
    method = vp.VAR(keep=0.3, max_sink_share=share, min_image_mass=least)
    query, key, value, *rest = case(dtype, kv_heads, phase)
    marks = torch.tensor([codes, codes])[:, None]

    def edit(sample, head, scores, columns):
        kinds = [KINDS[codes[c]] if c < len(codes) else "text" for c in columns]
        return var_row(softmax(scores), kinds, 0.3, share, least)

    out, factors, masses = grouped_attention(query, key, value, *rest, one_hot(marks, 3, dtype), method.coefficients)
    torch.testing.assert_close(out.double(), looped(query, key, value, *rest, edit), atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close((factors * masses).sum(-1), torch.ones_like(masses[..., 0]), atol=1e-6, rtol=0)
    if selected == "some heads" and codes == CODES["mixed"] and phase == "prefill":
        assert 0 < (factors[..., 2] != 1).float().mean() < 1, "the test is blind: no mixed selection"
    if codes == CODES["mixed"] and share == 1:
        assert (factors != 1).any()


@types
@heads
@phases
def test_codes_of_heads(dtype, kv_heads, phase):
    """Red: sinks that differ from head to head (ACT) are mixed up; also ZeroTuning's first token."""
    query, key, value, *rest = case(dtype, kv_heads, phase)
    codes = torch.randint(0, 2, (2, 6, 14), generator=torch.Generator().manual_seed(1))
    codes[:, 0] = 0
    codes[:, 5] = 1

    def edit(sample, head, scores, columns):
        return act_row(softmax(scores), [c < 14 and bool(codes[sample, head, c]) for c in columns], 0.4)

    out, *_ = grouped_attention(query, key, value, *rest, one_hot(codes, 1, dtype), vp.ACT(beta=0.4).coefficients)
    torch.testing.assert_close(out.double(), looped(query, key, value, *rest, edit), atol=TOLERANCE[dtype], rtol=0)

    first = torch.zeros(2, 1, 4, dtype=torch.long)
    first[0, 0, 0] = first[1, 0, 3] = 1
    for gain in (0.0, 0.5, 3.0):
        out, *_ = grouped_attention(query, key, value, *rest, one_hot(first, 1, dtype), vp.ZeroTuning(gain=gain).coefficients)
        expected = looped(query, key, value, *rest, lambda s, h, scores, c, g=gain: zero_row(softmax(scores), 0, g))
        torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=0)


@types
@heads
@phases
def test_scores(dtype, kv_heads, phase):
    """Red: PAI's raise is applied to the wrong keys, to un-scaled scores, or behind the softmax."""
    query, key, value, *rest = case(dtype, kv_heads, phase)
    weight = torch.rand(2, 14, dtype=dtype, generator=torch.Generator().manual_seed(1))

    def edit(sample, head, scores, columns):
        return raised(scores, [float(weight[sample, c]) if c < 14 else 0.0 for c in columns])

    out = scored_attention(query, key, value, *rest, weight)
    torch.testing.assert_close(out.double(), looped(query, key, value, *rest, edit), atol=TOLERANCE[dtype], rtol=0)


@types
@heads
def test_column_means(dtype, kv_heads):
    query, key, _, scaling, position, valid = case(dtype, kv_heads, "prefill")
    counted = torch.ones(2, 6, dtype=torch.bool)
    counted[0, :2] = False
    found = column_means(query, key, scaling, position, valid, counted)
    for sample in range(2):
        for head in range(6):
            k = key[sample, head // (6 // kv_heads)].double()
            total, seen = [0.0] * 18, [0] * 18
            for row in range(6):
                columns = [c for c in range(13 + row) if valid[sample, c]]
                scores = [float(query[sample, head, row].double() @ k[c]) * scaling for c in columns]
                if counted[sample, row]:
                    for c in range(13 + row):
                        seen[c] += 1
                    for c, w in zip(columns, softmax(scores), strict=True):
                        total[c] += w
            expected = torch.tensor([t / max(n, 1) for t, n in zip(total, seen, strict=True)], dtype=torch.float64)
            torch.testing.assert_close(found[sample, head].double(), expected, atol=TOLERANCE[dtype], rtol=0)


def test_chunks_change_nothing(monkeypatch):
    """Red: rows at the borders of chunks are lost, doubled, or see other keys."""
    query, key, value, *rest = case(torch.float64, 2, "prefill")
    groups = one_hot(torch.tensor([CODES["mixed"]] * 2)[:, None], 3, torch.float64)
    method = vp.VAR(max_sink_share=1, min_image_mass=0)

    def everything():
        counted = torch.ones(2, 6, dtype=torch.bool)
        return (
            *grouped_attention(query, key, value, *rest, groups, method.coefficients),
            scored_attention(query, key, value, *rest, groups[:, 0, :, 2]),
            column_means(query, key, *rest, counted),
        )

    whole = everything()
    monkeypatch.setattr(reference, "CHUNK", 2 * 6 * 18 * 4)  # four rows, then two
    for x, y in zip(everything(), whole, strict=True):
        torch.testing.assert_close(x, y, atol=1e-14, rtol=0)


def test_low_precision_is_computed_in_fp32():
    query, key, value, *rest = case(torch.float32, 2, "prefill")
    groups = one_hot(torch.tensor([CODES["mixed"]] * 2)[:, None], 3, torch.float32)
    low = [x.bfloat16() for x in (query, key, value)]
    method = vp.VAR(max_sink_share=1, min_image_mass=0)
    out, *_ = grouped_attention(*low, *rest, groups, method.coefficients)
    expected, *_ = grouped_attention(*(x.float() for x in low), *rest, groups, method.coefficients)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_a_kernel_on_a_cpu_is_refused(monkeypatch):
    """Red: the torch reference runs in silence where its kernel was asked for."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query, key, value, *rest = case(torch.float32, 2, "prefill")
    counted = torch.ones(2, 6, dtype=torch.bool)
    for name, run in (
        ("scored_attention", lambda: scored_attention(query, key, value, *rest, torch.zeros(2, 3), impl="triton")),
        ("column_means", lambda: column_means(query, key, *rest, counted, impl="triton")),
    ):
        with pytest.raises(vp.UsageError, match=f"{name}: impl='triton' needs CUDA tensors, but query is on cpu"):
            run()
