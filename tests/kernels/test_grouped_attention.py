"""grouped_attention, scored_attention, column_means: interpreted kernels within the rule of rule.py of their references.

In fp16 and bf16 the kernels round each probability to the values' dtype before they multiply, as transformers' own eager
attention does. An output is then further off by at most half a unit in the last place of every term, eps / 2 · Σ a′_k |v_k|,
and by half the smallest number of that dtype for every key. The interpreter cuts off where a GPU rounds to the nearest bf16: a
whole unit. Masses and factors are sums before that rounding: the rule alone holds for them.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels.rule import among_nan, assert_within_rule, doubled, of_dots
from torch import Tensor

from vlmprune.errors import UsageError
from vlmprune.kernels import grouped_attention as op
from vlmprune.kernels.grouped_attention import column_means, cost, grouped_attention, reference, scored_attention
from vlmprune.methods.redistribution import VAR

SHAPES = {  # batch, heads, kv_heads, rows, keys, dim, groups, heads of the groups
    "one key": (1, 2, 2, 1, 1, 64, 2, 1),
    "17 keys, 7 heads to a key head": (2, 7, 1, 1, 17, 72, 2, 7),
    "129 keys, 3 rows": (1, 4, 2, 3, 129, 16, 4, 1),
    "head size 80, groups of every head": (2, 4, 2, 2, 33, 80, 2, 4),
    "many rows": (1, 4, 2, 35, 35, 64, 4, 1),
    "many rows, few keys, groups of every head": (1, 2, 1, 70, 9, 72, 2, 2),
    "wide heads": (1, 2, 1, 3, 17, 256, 2, 1),
}
LARGEST = 16.0
"""No score below is larger."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def factors_of(mass: Tensor) -> Tensor:
    """Factors that differ for every group, and depend on all masses."""
    numbers = torch.arange(1, mass.shape[-1] + 1, dtype=mass.dtype)
    return 0.5 + mass * numbers + mass.sum(dim=-1, keepdim=True) / numbers


def inputs(shape: tuple[int, ...], dtype: torch.dtype, masked: bool, marked: int | None = None) -> list[Any]:
    """Arguments of `grouped_attention`, each tensor in the middle of NaN."""
    batch, heads, kv_heads, rows, keys, dim, groups, group_heads = shape
    marked = max(keys - 3, 1) if marked is None else marked
    query = among_nan(drawn(batch, heads, rows, dim, dtype=dtype, seed=1))
    key = among_nan(2 * drawn(batch, kv_heads, keys, dim, dtype=dtype, seed=2))
    value = among_nan(drawn(batch, kv_heads, keys, dim, dtype=dtype, seed=3))
    position = valid = None
    if masked:
        position = torch.arange(rows)[None] + max(keys - rows, 0)
        valid = drawn(batch, keys, seed=4) > -0.5
        valid[:, 0] = True
        valid[0] = torch.arange(keys) == 0  # all but one is padding
        valid = among_nan(valid)
    codes = (drawn(batch, group_heads, marked, seed=5).abs() * groups).long() % groups
    members = (codes[..., None] == torch.arange(groups)).float()
    return [query, key, value, dim**-0.5, position, valid, among_nan(members), factors_of]


def checked(name: str, arguments: list[Any]) -> None:
    """Within the rule, and for outputs in 16 bits within the rounding above beyond it."""
    query, value = arguments[0], arguments[2]
    roundings = of_dots(query.shape[-1], LARGEST)
    kernel = lambda *given: getattr(op, name)(*given, impl="triton")  # noqa: E731
    if query.dtype == torch.float32 or name == "column_means":
        assert_within_rule(kernel, getattr(reference, name), *arguments, roundings=roundings)
        return
    if name == "grouped_attention":
        assert_within_rule(
            lambda *given: kernel(*given)[1:],
            lambda *given: reference.grouped_attention(*given)[1:],
            *arguments,
            roundings=roundings,
        )

    def output(size: Callable[[Tensor], Tensor]) -> Tensor:
        exact = [doubled(x) for x in arguments]
        found = getattr(reference, name)(*exact[:2], size(exact[2]), *exact[3:])
        return found[0] if isinstance(found, tuple) else found

    found, exact = kernel(*arguments), output(lambda v: v)
    found, factor = (found[0], float(found[1].max())) if isinstance(found, tuple) else (found, 1.0)
    kind = torch.finfo(value.dtype)
    vanishing = value.shape[2] * factor * float(value.abs().max()) * kind.smallest_normal * kind.eps / 2
    unit = kind.eps if value.dtype == torch.bfloat16 else kind.eps / 2
    allowed = unit * output(torch.abs) + vanishing + roundings * 2**-24 * float(exact.abs().max())
    assert found.dtype == torch.float32
    off = (found.double() - exact).abs() - allowed
    assert not found.isnan().any()
    assert (off <= 0).all(), f"off by {float(off.max()):.3g} more than allowed"


def for_scores(arguments: list[Any]) -> list[Any]:
    """The same arguments for `scored_attention`: weights on the first keys."""
    return [*arguments[:6], among_nan(drawn(arguments[0].shape[0], arguments[6].shape[2], seed=6).abs())]


def for_columns(arguments: list[Any]) -> list[Any]:
    """The same for `column_means`."""
    query, key, _, scaling, position, valid = arguments[:6]
    rows, keys = query.shape[2], key.shape[2]
    position = torch.arange(rows)[None] + max(keys - rows, 0) if position is None else position
    counted = drawn(query.shape[0], rows, seed=7) > -0.3
    return [query, key, scaling, position, valid, among_nan(counted)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_odd_shapes(masked, shape):
    for dtype in DTYPES if shape[3] == 1 else DTYPES[:2]:
        arguments = inputs(shape, dtype, masked)
        checked("grouped_attention", arguments)
        checked("scored_attention", for_scores(arguments))
        checked("column_means", for_columns(arguments))


@pytest.mark.parametrize("marked", [1, 16, 40])
def test_marks_end_anywhere(marked):
    """Keys behind the marked ones, of which there may be none, are in group 0."""
    for rows in (1, 40):
        arguments = inputs((1, 2, 1, rows, 40, 16, 3, 1), torch.float32, False, marked)
        checked("grouped_attention", arguments)
        checked("scored_attention", for_scores(arguments))


def test_both_forms_agree(monkeypatch):
    """The form for few rows and the form for many are one op: here for the same rows."""
    from vlmprune.kernels.grouped_attention import kernel

    arguments = inputs((2, 4, 2, 5, 50, 24, 3, 1), torch.float32, True)
    few = grouped_attention(*arguments, impl="triton")
    monkeypatch.setattr(kernel, "FEW_LINES", 0)
    many = grouped_attention(*arguments, impl="triton")
    for one, other in zip(few, many, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert not one.equal(other), "one form was run twice"


@pytest.mark.parametrize("most", [1, 3, 128])
def test_any_number_of_shares(most, monkeypatch):
    """Keys shared out among more or fewer programs: the same attention, also if a share sees nothing."""
    from vlmprune.kernels.grouped_attention import kernel

    monkeypatch.setattr(kernel, "MOST_SHARES", most)
    arguments = inputs((1, 2, 1, 2, 200, 16, 2, 1), torch.float32, True)
    arguments[5][:, 1:90] = False
    arguments[5][:, 100:] = True
    checked("grouped_attention", arguments)
    checked("scored_attention", for_scores(arguments))


def test_strides():
    """Heads transposed as models do it, one sample's positions for all, an expanded batch, a strided last axis."""
    query, key, value = drawn(2, 3, 4, 16), drawn(2, 21, 2, 16, seed=2), drawn(2, 16, 2, 21, seed=3).permute(0, 3, 2, 1)
    members = torch.eye(2)[torch.arange(20) % 2].expand(2, 1, -1, -1)
    seen = (drawn(1, 21, seed=4) > -1).expand(2, -1)
    position = torch.tensor([[2, 9, 20]])
    for batched in (position, position.expand(2, -1), torch.tensor([[2, 9, 20], [0, 3, 5]]), position.t().contiguous().t()):
        arguments = [*(x.transpose(1, 2) for x in (query, key, value)), 0.3, batched, seen, members, factors_of]
        checked("grouped_attention", arguments)
        checked("column_means", for_columns(arguments))
    shared = [query.transpose(1, 2), *(x[:1].expand(2, -1, -1, -1).transpose(1, 2) for x in (key, value)), *arguments[3:]]
    checked("grouped_attention", shared)
    checked("scored_attention", for_scores(shared))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("kind", ["transposed valid", "expanded position", "strided position"])
def test_strides_of_masks(kind, rows):
    """Masks and positions of several samples whose last axis is not contiguous: every sample has its own."""
    arguments = inputs((2, 2, 2, rows, 50, 16, 2, 1), torch.float32, False)
    if kind == "transposed valid":
        arguments[5] = (drawn(50, 2, seed=4) > -0.3).t()
        arguments[5][:, 0] = True
    elif kind == "expanded position":
        arguments[4] = torch.tensor([[47], [9]]).expand(2, rows)
    else:
        arguments[4] = torch.stack((torch.arange(rows) + 9, 49 - torch.arange(rows)), dim=1).t()
    given, scored, columns = arguments, for_scores(arguments), for_columns(arguments)
    columns[5] = (drawn(rows, 2, seed=7) > -0.3).t()
    checked("grouped_attention", given)
    checked("scored_attention", scored)
    checked("column_means", columns)


def test_decoding_compiles_once(specialised):
    """However many keys there are: nothing is compiled again in the middle of a text."""
    for keys in (*range(20, 40), 2111, 2112, 2113, 2145):
        arguments = inputs((2, 4, 2, 1, keys, 64, 2, 1), torch.bfloat16, False, marked=16)
        arguments[1:3] = (x.contiguous() for x in arguments[1:3])
        arguments[4:7] = torch.tensor([[keys - 1]]), torch.ones(2, keys, dtype=torch.bool), torch.ones(2, 1, 16, 2)
        grouped_attention(*arguments, impl="triton")
        assert {name: len(kinds) for name, kinds in specialised.items()} == {"_partial": 1, "_settle": 1, "_combine": 1}, keys
    specialised.clear()
    for keys in (*range(20, 40), 2111, 2112, 2113, 2145):
        arguments = inputs((2, 4, 2, 1, keys, 64, 2, 1), torch.bfloat16, False)
        scored_attention(*arguments[:6], torch.ones(2, 16), impl="triton")
        assert {name: len(kinds) for name, kinds in specialised.items()} == {"_partial": 1, "_settle": 1, "_combine": 1}, keys


def test_prompts_of_all_lengths_compile_once(specialised):
    for rows in range(70, 90):
        shape = torch.randn(2, 2, rows, 64, dtype=torch.float32)
        position, valid = torch.arange(rows).expand(2, -1).contiguous(), torch.ones(2, rows, dtype=torch.bool)
        members = torch.ones(2, 1, rows, 2)
        grouped_attention(shape, shape, shape, 0.1, position, valid, members, factors_of, impl="triton")
    assert {name: len(kinds) for name, kinds in specialised.items()} == {"_row_masses": 1, "_weighted": 1}
    specialised.clear()
    for rows in range(70, 90):
        shape = torch.randn(2, 2, rows, 64, dtype=torch.float32)
        position, valid = torch.arange(rows).expand(2, -1).contiguous(), torch.ones(2, rows, dtype=torch.bool)
        column_means(shape, shape, 0.1, position, valid, valid, impl="triton")
    assert {name: len(kinds) for name, kinds in specialised.items()} == {"_row_masses": 1, "_column_means": 1}


def test_values_of_another_width():
    for rows in (1, 40):
        arguments = inputs((1, 2, 1, rows, 20, 16, 2, 1), torch.float32, False)
        arguments[2] = among_nan(drawn(1, 1, 20, 40, seed=3))
        checked("grouped_attention", arguments)


def test_overlapping_groups():
    """A key in two groups counts in both, a key in none not at all, as in the reference."""
    for rows in (1, 40):
        arguments = inputs((1, 2, 1, rows, 20, 16, 3, 1), torch.float32, False)
        arguments[6] = (drawn(1, 1, 17, 3, seed=8) > 0).float()
        checked("grouped_attention", arguments)


def test_a_method():
    """VAR's own coefficients, with heads that are edited and heads that are not."""
    method = VAR(keep=0.4, max_sink_share=0.6, min_image_mass=0.2)
    arguments = inputs((2, 4, 2, 3, 60, 16, 4, 1), torch.float32, True)
    arguments[5][0] = True
    arguments[7] = method.coefficients
    checked("grouped_attention", arguments)
    factors = grouped_attention(*arguments, impl="triton")[1]
    changed = (factors != 1).any(dim=-1)
    assert changed.any()
    assert not changed.all()


def test_rows_that_see_nothing():
    """Zeros, which spoil nothing: such rows are padding."""
    for rows in (2, 40):
        arguments = inputs((1, 2, 1, rows, 40, 16, 2, 1), torch.float32, True)
        arguments[4], arguments[5][:, :] = torch.arange(rows)[None], True
        arguments[5][:, 0] = False
        out, _, masses = grouped_attention(*arguments, impl="triton")
        assert not out[:, 0].any()
        assert not masses[:, :, 0].any()
        assert torch.isfinite(out).all()
        assert out[:, 1].any()
        columns = column_means(*for_columns(arguments), impl="triton")
        assert torch.isfinite(columns).all()
        assert torch.isfinite(scored_attention(*for_scores(arguments), impl="triton")).all()


def test_huge_and_tiny_scores():
    """No overflow: scores of ±3000, and of 0."""
    for rows in (1, 40):
        for scaling in (300.0, 0.0):
            arguments = inputs((1, 2, 2, rows, 20, 16, 2, 1), torch.float32, False)
            arguments[3] = scaling
            for name, given in (("grouped_attention", arguments), ("scored_attention", for_scores(arguments))):
                found, expected = (getattr(op, name)(*given, impl=impl) for impl in ("triton", "reference"))
                found, expected = ((x[0] if isinstance(x, tuple) else x) for x in (found, expected))
                torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_nothing_to_do():
    arguments = inputs((1, 2, 1, 3, 20, 16, 2, 1), torch.float32, False)
    arguments[0] = arguments[0][:, :, :0]
    out, factors, masses = grouped_attention(*arguments, impl="triton")
    assert (out.shape, factors.shape, masses.shape) == ((1, 0, 2, 16), (1, 2, 0, 2), (1, 2, 0, 2))
    assert scored_attention(*for_scores(arguments), impl="triton").shape == (1, 0, 2, 16)
    assert not column_means(*for_columns(arguments), impl="triton").any()


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["samples", "heads", "keys"])
@pytest.mark.parametrize("rows", [1, 70])
def test_offsets_pass_two_to_the_31(axis, rows):
    """17 samples, heads or keys stand 2²⁷ elements apart, a stride of 32 bits, in memory of which few pages are touched."""
    apart, count = 2**27 + 8, 17
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (apart * count)), dtype=torch.bfloat16)
    shape, strides = [1, 1, 1, 16], [16, 16, 16, 1]
    shape[axis], strides[axis] = count, apart
    far = memory.as_strided(shape, strides).copy_(drawn(*shape, dtype=torch.bfloat16))
    near = far.contiguous()
    batch, kv_heads, keys, _ = shape
    query = drawn(batch, kv_heads, rows, 16, dtype=torch.bfloat16, seed=2)
    members = torch.eye(2)[torch.arange(keys) % 2].expand(batch, 1, -1, -1)
    ends = (None, None, members, factors_of)
    found = grouped_attention(query, far, far, 0.25, *ends, impl="triton")
    for ours, expected in zip(found, grouped_attention(query, near, near, 0.25, *ends, impl="triton"), strict=True):
        assert ours.equal(expected)
    position, counted = torch.full((1, rows), keys - 1), torch.ones(batch, rows, dtype=torch.bool)
    means = [column_means(query, key, 0.25, position, None, counted, impl="triton") for key in (far, near)]
    assert means[0].equal(means[1])
    if axis != 2 and rows == 1:  # the same of queries
        far_query = memory.as_strided(shape, strides)
        for ours, expected in zip(
            grouped_attention(far_query, near, near, 0.25, *ends, impl="triton"),
            grouped_attention(near, near, near, 0.25, *ends, impl="triton"),
            strict=True,
        ):
            assert ours.equal(expected)


def test_nothing_of_rows_by_keys(monkeypatch):
    """The largest buffer is that of the outputs."""
    sizes = []
    fresh = Tensor.new_empty

    def keep(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    monkeypatch.setattr(Tensor, "new_empty", lambda x, *size, **kwargs: keep(fresh(x, *size, **kwargs)))
    arguments = inputs((1, 1, 1, 90, 100, 16, 2, 1), torch.float32, False)
    grouped_attention(*arguments, impl="triton")
    scored_attention(*for_scores(arguments), impl="triton")
    column_means(*for_columns(arguments), impl="triton")
    assert len(sizes) >= 6
    assert max(sizes) < 90 * 100


def test_autocast():
    """Computed in fp32 under autocast."""
    for rows in (1, 40):
        arguments = inputs((1, 2, 1, rows, 20, 16, 2, 1), torch.float32, False)
        plain = grouped_attention(*arguments, impl="triton")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for one, other in zip(plain, grouped_attention(*arguments, impl="triton"), strict=True):
                assert one.equal(other)


def test_gradients():
    """Kernels have none: "auto" takes the reference where one is needed, "triton" is refused; marks need none."""
    arguments = inputs((1, 2, 1, 1, 20, 16, 2, 1), torch.float32, False)
    arguments[0].requires_grad_()
    assert grouped_attention(*arguments)[0].requires_grad
    assert scored_attention(*for_scores(arguments)).requires_grad
    for name, given in (("grouped_attention", arguments), ("scored_attention", for_scores(arguments))):
        with pytest.raises(UsageError, match=f"{name}: kernels have no gradients, but query, key or value needs one"):
            getattr(op, name)(*given, impl="triton")
        with torch.no_grad():
            getattr(op, name)(*given, impl="triton")
    assert not column_means(*for_columns(arguments), impl="triton").requires_grad


def test_needing_a_gradient_takes_the_reference_on_a_gpu_too(monkeypatch):
    """What "auto" asks for, before it is known on which device."""
    asked = []
    monkeypatch.setattr(op, "use_triton", lambda name, impl, *_, **__: asked.append((name, impl)) or False)
    for checked in (op._grouped_attention, op._scored_attention):
        monkeypatch.setattr(checked, "_passed", {})
    arguments = inputs((1, 2, 1, 1, 20, 16, 2, 1), torch.float32, False)
    grouped_attention(*arguments)
    arguments[0].requires_grad_()
    grouped_attention(*arguments)
    scored_attention(*for_scores(arguments))
    assert asked == [("grouped_attention", "auto"), ("grouped_attention", "reference"), ("scored_attention", "reference")]


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
@pytest.mark.parametrize("name", ["grouped_attention", "scored_attention", "column_means"])
def test_bad_input(name, impl):
    whole = inputs((2, 4, 2, 3, 9, 16, 2, 1), torch.float32, True)
    kinds = {"grouped_attention": list, "scored_attention": for_scores, "column_means": for_columns}
    places = {"query": 0, "key": 1, "value": 2, "position": 4, "valid": 5, "groups": 6, "weight": 6}
    if name == "column_means":
        places = {"query": 0, "key": 1, "position": 3, "valid": 4, "counted": 5}

    def refused(argument: str, change: Callable[[Tensor], Tensor], sentence: str) -> None:
        arguments = kinds[name](whole)
        arguments[places[argument]] = change(arguments[places[argument]])
        with pytest.raises(UsageError, match=f"^{name}: {sentence}"):
            getattr(op, name)(*arguments, impl=impl)

    refused("query", lambda x: x[0], r"query must have shape \[any, any, any, any\] here, found \[4, 3, 16\]")
    refused("query", lambda x: x[:, :3], "query has 3 heads, which the 2 heads of key must divide")
    refused("key", lambda x: x[..., :15], r"key must have shape \[2, any, any, 16\] here")
    refused("key", lambda x: x.bfloat16(), "key is torch.bfloat16 but query torch.float32")
    refused("position", lambda x: x[:, :2], r"position must have shape \[1, 3\] here, found \[1, 2\]")
    refused("position", lambda x: x.int(), "position must be torch.int64")
    refused("valid", lambda x: x[:, :5], r"valid must have shape \[2, 9\] here, found \[2, 5\]")
    refused("valid", lambda x: x.float(), "valid must be torch.bool")
    if name == "column_means":
        refused("counted", lambda x: x[:, :2], r"counted must have shape \[2, 3\] here, found \[2, 2\]")
        refused("counted", lambda x: x.float(), "counted must be torch.bool")
        return
    refused("value", lambda x: x[:, :, :5], r"value must have shape \[2, 2, 9, any\] here, found \[2, 2, 5, 16\]")
    refused("value", lambda x: x.half(), "value is torch.float16 but query torch.float32")
    if name == "grouped_attention":
        refused("groups", lambda x: x[:1], r"groups must have shape \[2, any, any, any\] here")
        refused("groups", lambda x: x.expand(-1, 3, -1, -1), "groups must be of 1 or 4 heads as query has, found 3")
        refused("groups", lambda x: x.repeat(1, 1, 2, 1), "groups is about 12 keys, but there are 9")
    else:
        refused("weight", lambda x: x[:1], r"weight must have shape \[2, any\] here")
        refused("weight", lambda x: x.repeat(1, 2), "weight is about 12 keys, but there are 9")


def test_head_sizes_of_kernels():
    arguments = inputs((1, 1, 1, 1, 3, 257, 2, 1), torch.float32, False)
    with pytest.raises(UsageError, match="grouped_attention: query has head size 257 but kernels take 1 to 256"):
        grouped_attention(*arguments, impl="triton")
    with pytest.raises(UsageError, match="scored_attention: query has head size 257"):
        scored_attention(*for_scores(arguments), impl="triton")
    with pytest.raises(UsageError, match="column_means: query has head size 257"):
        column_means(*for_columns(arguments), impl="triton")
    arguments[0], arguments[1] = arguments[0][..., :16], arguments[1][..., :16]
    with pytest.raises(UsageError, match="grouped_attention: value has head size 257"):
        grouped_attention(*arguments, impl="triton")


def test_costs():
    query, key, value, _, _, valid, groups, _ = inputs((2, 4, 2, 3, 9, 16, 2, 1), torch.bfloat16, True)
    read = 2 * (2 * 4 * 3 * 16 + 2 * 2 * 2 * 9 * 16) + 2 * 9 + 4 * 2 * 6 * 2
    assert cost(query, key, value, valid, groups).bytes_moved == read + 4 * 2 * 4 * 3 * 16
    assert cost(query, key, value, valid, groups).flops == 4 * 2 * 4 * 3 * 9 * 16


@pytest.mark.parametrize("chunk", [reference.CHUNK, 1], ids=["at once", "a row at a time"])
@pytest.mark.parametrize("marked", [7, 4], ids=["all keys marked", "some keys marked"])
def test_gradients_of_the_reference_are_those_of_its_equation(marked, chunk, monkeypatch):
    """Numbers that are computed in place without a gradient are not where one is needed; and pieces are joined again."""
    monkeypatch.setattr(reference, "CHUNK", chunk)
    random = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(2, heads, rows, 3, generator=random).double() for heads, rows in ((4, 5), (2, 7), (2, 7)))
    groups = torch.randint(0, 2, (2, 1, marked), generator=random)
    position, valid = torch.arange(2, 7)[None], torch.arange(7)[None] >= torch.tensor([[0], [1]])
    one_hot = torch.nn.functional.one_hot(groups, 2).double()

    def grouped(*tensors):
        return grouped_attention(*tensors, 0.7, position, valid, one_hot, lambda mass: 1 + mass.flip(-1))[0]

    def scored(*tensors):
        return scored_attention(*tensors, 0.7, position, valid, 0.5 * groups[:, 0].double())

    for edited in (grouped, scored):
        plain = edited(query, key, value)
        needing = [x.clone().requires_grad_() for x in (query, key, value)]
        torch.testing.assert_close(edited(*needing).detach(), plain, atol=1e-14, rtol=0)
        torch.testing.assert_close(edited(query, key, needing[2]).detach(), plain, atol=1e-14, rtol=0)
        assert torch.autograd.gradcheck(edited, needing)


def test_arguments_are_left_as_they_were():
    """What is computed in place belongs to the op."""
    arguments = inputs((1, 2, 1, 1, 20, 16, 20, 1), torch.float32, False)
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    grouped_attention(*arguments)
    scored_attention(*for_scores(arguments))
    column_means(*for_columns(arguments))
    for x, y in zip(arguments, before, strict=True):
        assert not isinstance(x, torch.Tensor) or x.equal(y)
