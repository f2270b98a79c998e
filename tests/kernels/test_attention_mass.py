"""attention_rows and attention_mass: interpreted kernels within the rule of rule.py of their references."""

from __future__ import annotations

import pytest
import torch
from kernels.rule import among_nan, assert_within_rule, of_dots

from vlmprune.errors import UsageError
from vlmprune.kernels import attention_mass as op
from vlmprune.kernels.attention_mass import attention_mass, attention_rows, cost, reference, rows_cost

SHAPES = {  # batch, heads, kv_heads, rows, keys, dim
    "one key": (1, 2, 2, 1, 1, 64),
    "17 keys, 7 to a key head": (2, 7, 1, 1, 17, 72),
    "129 keys, 2 to a key head, 3 rows": (1, 4, 2, 3, 129, 80),
    "128": (2, 2, 2, 2, 65, 128),
    "many rows": (1, 2, 1, 67, 33, 64),
    "tiny heads": (1, 2, 2, 5, 7, 5),
    "wide heads": (1, 2, 1, 3, 17, 256),
}
LARGEST = 16.0
"""No score below is larger."""


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, masked: bool) -> list[object]:
    """Queries, keys, scaling and mask, each in the middle of NaN."""
    batch, heads, kv_heads, rows, keys, dim = shape
    query = among_nan(drawn(batch, heads, rows, dim, dtype=dtype, seed=1))
    key = among_nan(2 * drawn(batch, kv_heads, keys, dim, dtype=dtype, seed=2))
    visible = None
    if masked:
        visible = drawn(batch, rows, keys, dtype=torch.float32, seed=3) > 0
        visible[..., -1] = True
        visible[0, 0] = torch.arange(keys) == keys // 2  # all but one is padding
        visible = among_nan(visible)
    return [query, key, dim**-0.5, visible]


def checked(name: str, arguments: list[object], dim: int) -> None:
    kernel = lambda *given: getattr(op, name)(*given, impl="triton")  # noqa: E731
    assert_within_rule(kernel, getattr(reference, name), *arguments, roundings=of_dots(dim, LARGEST))


@pytest.mark.parametrize("name", ["attention_rows", "attention_mass"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_odd_shapes(name, masked, shape):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        checked(name, inputs(shape, dtype, masked), shape[-1])


@pytest.mark.parametrize("name", ["attention_rows", "attention_mass"])
def test_strides(name):
    """Heads transposed as models do it, an expanded batch, an expanded mask, a strided last axis."""
    query, key = drawn(2, 3, 4, 16, dtype=torch.float32, seed=1), drawn(2, 21, 2, 16, dtype=torch.float32, seed=2)
    seen = drawn(2, 1, 21, dtype=torch.float32, seed=3) > -0.5
    checked(name, [query.transpose(1, 2), key.transpose(1, 2), 0.3, seen.expand(-1, 3, -1)], 16)
    shared = query[:1].expand(2, -1, -1, -1).transpose(1, 2)
    checked(name, [shared, key.transpose(1, 2)[:, :1], 0.3, seen[:1].expand(2, 3, -1)], 16)
    checked(name, [query.transpose(1, 2), key.permute(0, 2, 1, 3).transpose(2, 3).contiguous().transpose(2, 3), 0.3, None], 16)


@pytest.mark.parametrize("wanted", [1, 3, 64])
def test_any_number_of_splits(monkeypatch, wanted):
    """Keys are split among programs: the same attention for every number of them, also if a split sees nothing."""
    from vlmprune.kernels.attention_mass import kernel

    monkeypatch.setattr(kernel, "MOST_SPLITS", wanted)
    arguments = inputs((1, 2, 1, 2, 200, 16), torch.float32, masked=True)
    arguments[3][:, :, :70] = False
    checked("attention_rows", arguments, 16)
    checked("attention_mass", arguments, 16)


def test_hidden_keys_may_be_nan():
    """Padding may hold anything: it gets no attention, and spoils none."""
    query, key, scaling, visible = inputs((2, 2, 1, 3, 17, 16), torch.float32, masked=True)
    visible[:, :, 5] = False
    key[:, :, 5] = torch.nan
    for op_ in (attention_rows, attention_mass):
        found = op_(query, key, scaling, visible, impl="triton")
        assert not found.isnan().any()
        assert not found[..., 5].any()


def test_a_row_that_sees_nothing_is_uniform_as_in_the_reference():
    query, key, scaling, visible = inputs((1, 2, 2, 2, 9, 16), torch.float32, masked=True)
    visible[:, 1] = False
    checked("attention_rows", [query, key, scaling, visible], 16)


def test_huge_and_tiny_scores():
    """No overflow: scores of ±3000, and of 0."""
    query, key, _, _ = inputs((1, 2, 2, 2, 40, 16), torch.float32, masked=False)
    for scaling in (300.0, 0.0):
        found = attention_rows(query, key, scaling, impl="triton")
        torch.testing.assert_close(found, attention_rows(query, key, scaling), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.sum(-1), torch.ones(1, 2, 2))


def test_nothing_to_do():
    query, key = torch.randn(1, 2, 0, 16), torch.randn(1, 2, 5, 16)
    assert attention_rows(query, key, 1.0, impl="triton").shape == (1, 2, 0, 5)
    assert torch.equal(attention_mass(query, key, 1.0, impl="triton"), torch.zeros(1, 2, 5))
    assert attention_mass(query, key[:, :, :0], 1.0, impl="triton").shape == (1, 2, 0)
    assert attention_mass(key[:0], key[:0], 1.0, impl="triton").shape == (0, 2, 5)


def test_offsets_pass_two_to_the_31():
    """The third key stands 2³¹ elements behind the first, at a stride that itself fits 32 bits; few pages are ever touched."""
    far = 2**30
    buffer = torch.Tensor(torch.UntypedStorage(2 * (2 * far + 64))).view(torch.bfloat16)
    key = buffer.as_strided((1, 1, 3, 16), (1, 1, far, 1))
    for place in range(3):
        key[:, :, place] = drawn(16, dtype=torch.bfloat16, seed=place)
    query = drawn(1, 2, 3, 16, dtype=torch.bfloat16, seed=3)
    for op_ in (attention_rows, attention_mass):
        assert torch.equal(op_(query, key, 0.25, impl="triton"), op_(query, key.contiguous(), 0.25, impl="triton"))
    near = drawn(3, 3, 4, 16, dtype=torch.bfloat16, seed=4)
    for strides in ((far, 0, 16, 1), (0, far, 16, 1), (0, 16, far, 1)):
        wide = buffer.as_strided((3, 3, 3, 16), strides)
        for place in range(3):
            wide[place, place, place] = drawn(16, dtype=torch.bfloat16, seed=place)
        for first, second in ((wide, near), (near, wide)):
            found = attention_rows(first, second, 0.25, impl="triton")
            assert torch.equal(found, attention_rows(first.contiguous(), second.contiguous(), 0.25, impl="triton"))


def test_mass_never_has_rows_by_keys(monkeypatch):
    """The largest buffer is the totals: rows by splits."""
    sizes = []
    fresh = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: sizes.append(shape) or fresh(*shape, **kwargs))
    attention_mass(torch.randn(1, 1, 70, 16), torch.randn(1, 1, 100, 16), 0.25, impl="triton")
    assert len(sizes) >= 2
    assert max(torch.Size(shape).numel() for shape in sizes) < 70 * 100


def test_autocast_and_gradients():
    """Computed in fp32 under autocast; detached."""
    query, key, scaling, _ = inputs((1, 2, 2, 3, 17, 16), torch.float32, masked=False)
    plain = attention_mass(query, key, scaling, impl="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_mass(query, key, scaling, impl="triton"), plain)
    assert not attention_mass(query.requires_grad_(), key, scaling, impl="triton").requires_grad


@pytest.mark.parametrize("op_", [attention_rows, attention_mass])
def test_bad_input(op_):
    name = op_.__name__
    x = torch.randn(1, 4, 3, 16)
    seen = torch.ones(1, 3, 5, dtype=torch.bool)
    for impl in ("auto", "reference", "triton"):
        with pytest.raises(UsageError, match=rf"{name}: query must have shape \[any, any, any, any\] here, found \[4, 3, 16\]"):
            op_(x[0], x, 1.0, impl=impl)
        with pytest.raises(UsageError, match=rf"{name}: key must have shape \[1, any, any, 16\] here, found \[1, 4, 3, 15\]"):
            op_(x, x[..., :15], 1.0, impl=impl)
        with pytest.raises(UsageError, match=rf"{name}: query has 4 heads, which the 3 heads of key must divide"):
            op_(x, x[:, :3], 1.0, impl=impl)
        with pytest.raises(UsageError, match=rf"{name}: visible must have shape \[1, 3, 3\] here, found \[1, 3, 5\]"):
            op_(x, x, 1.0, seen, impl=impl)
        with pytest.raises(UsageError, match=rf"{name}: visible must be torch.bool, found torch.float32"):
            op_(x, x, 1.0, seen[..., :3].float(), impl=impl)
        with pytest.raises(UsageError, match=rf"{name}: key is torch.bfloat16 but query torch.float32"):
            op_(x, x.bfloat16(), 1.0, impl=impl)
        with pytest.raises(UsageError, match=rf"{name}: query must be floating point, found torch.int64"):
            op_(x.long(), x, 1.0, impl=impl)
    with pytest.raises(UsageError, match=rf"{name}: query has head size 257 but kernels take 1 to 256"):
        op_(torch.randn(1, 1, 2, 257), torch.randn(1, 1, 2, 257), 1.0, impl="triton")
    with pytest.raises(UsageError, match=rf"{name}: query is float64 but kernels compute in fp32: pass impl='reference'"):
        op_(x.double(), x.double(), 1.0, impl="triton")
    assert op_(x.double(), x.double(), 1.0).dtype == torch.float64
    with pytest.raises(
        UsageError, match=rf"{name}: query is torch.float8_e4m3fn but kernels take float16, bfloat16 and float32"
    ):
        op_(x.to(torch.float8_e4m3fn), x.to(torch.float8_e4m3fn), 1.0, impl="triton")


def test_costs():
    query, key = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 5, 16).bfloat16()
    visible = torch.ones(2, 3, 5, dtype=torch.bool)
    read = 2 * 4 * 3 * 16 * 4 + 2 * 2 * 5 * 16 * 2 + 2 * 3 * 5
    assert rows_cost(query, key, 1.0, visible).bytes_moved == read + 2 * 4 * 3 * 5 * 4
    assert cost(query, key, 1.0, visible).bytes_moved == read + 2 * 4 * 5 * 4
    assert cost(query, key, 1.0).flops == 2 * 4 * 3 * 5 * (2 * 16 + 4)
    expanded = torch.ones(2, 1, 5, dtype=torch.bool).expand(-1, 3, -1)
    assert rows_cost(query, key, 1.0, expanded).bytes_moved == read - 20 + 2 * 4 * 3 * 5 * 4
