"""gather_tokens and gather_all: the kernel moves exactly the reference's bytes."""

from __future__ import annotations

import pytest
import torch
from kernels.conftest import poison
from kernels.rule import among_nan

from vlmprune.errors import UsageError
from vlmprune.kernels.gather_tokens import cost, cost_of_all, gather_all, gather_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int64, torch.complex64]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def choice(batch: int, tokens: int, kept: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    valid = torch.rand(batch, kept, generator=draw) > 0.4
    valid[:, -1] = True
    return torch.randint(0, tokens, (batch, kept), generator=draw), valid


def identical(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Also where it is NaN."""
    same = found.dtype == expected.dtype and found.shape == expected.shape and found.is_contiguous()
    return same and torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    ("shape", "kept"),
    [((1, 1, 1), 1), ((2, 17, 65), 9), ((3, 2, 129, 72), 67), ((1, 7, 17, 80), 5), ((2, 2, 3, 5, 7), 4), ((2, 33, 600), 3)],
)
@pytest.mark.parametrize("padded", [False, True])
def test_odd_shapes(shape, kept, padded):
    x = drawn(*shape)
    rows, valid = choice(shape[0], shape[-2], kept)
    given = valid if padded else None
    assert identical(gather_tokens(x, rows, given, impl="triton"), gather_tokens(x, rows, given, impl="reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 8, 64])
def test_every_dtype_and_alignment(dtype, dim):
    """Rows of 1 to 1024 bytes: every width of loads."""
    x = drawn(2, 2, 17, dim, dtype=dtype)
    rows, valid = choice(2, 17, 6)
    assert identical(gather_tokens(x, rows, valid, impl="triton"), gather_tokens(x, rows, valid))


@pytest.mark.parametrize("margin", [1, 8])
def test_strides(margin):
    """Slices of NaN, transposed heads, one sample for the batch, a strided last axis, expanded samples, strided indices."""
    rows, valid = choice(2, 17, 6)
    heads_last = drawn(2, 17, 3, 16).transpose(1, 2)
    cases = [among_nan(drawn(2, 3, 17, 16), margin), heads_last, drawn(1, 17, 16), drawn(2, 16, 17).transpose(1, 2)]
    cases += [drawn(1, 3, 17, 16).expand(2, -1, -1, -1), drawn(2, 1, 17, 16).expand(-1, 3, -1, -1), drawn(2, 17, 1)[:, :, :1]]
    for x in cases:
        for r, v in ((rows, valid), (among_nan(rows), among_nan(valid)), (rows[:1].expand(2, -1), valid[:1].expand(2, -1))):
            assert identical(gather_tokens(x, r, v, impl="triton"), gather_tokens(x, r, v))


def test_padding_hides_nan_and_any_index():
    x = drawn(2, 4, 8)
    x[:, 1] = torch.nan
    rows = torch.tensor([[1, 10**12, -7, 2], [0, 1, 1, 3]])
    valid = torch.tensor([[False, False, False, True], [True, False, False, True]])
    found = gather_tokens(x, rows, valid, impl="triton")
    assert identical(found, gather_tokens(x, rows.where(valid, 0), valid))
    assert not found.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_index_outside_is_nan(dtype):
    """Never memory of something else."""
    found = gather_tokens(drawn(1, 4, 8, dtype=dtype), torch.tensor([[4, 0, -1, 3]]), impl="triton")
    assert found.isnan().all(dim=-1).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("padded", [False, True])
def test_gather_all(padded):
    """Hidden states, cosines, codes and caches of several layers in one launch: other heads, dims, dtypes, an empty one."""
    rows, valid = choice(2, 17, 6)
    tensors = [drawn(2, 17, 72), drawn(1, 17, 16, dtype=torch.bfloat16), drawn(2, 3, 17, 20, dtype=torch.int64)]
    tensors += [drawn(2, 0, 17, 8), drawn(2, 17, 1, dtype=torch.bool), among_nan(drawn(2, 5, 17, 24, dtype=torch.float16))]
    tensors += [drawn(2, 2, 9, 8), drawn(2, 0, 17, 8)]
    rows %= 9
    given = valid if padded else None
    found, expected = (gather_all(tensors, rows, given, impl=impl) for impl in ("triton", "reference"))
    assert len(found) == len(tensors)
    assert all(identical(x, y) for x, y in zip(found, expected, strict=True))
    assert gather_all([], rows, given, impl="triton") == []
    assert gather_all([drawn(2, 9, 4)], rows[:, :0], None, impl="triton")[0].shape == (2, 0, 4)


def test_gather_all_is_one_launch(monkeypatch):
    """56 tensors, one start of a kernel; one tensor needs no table."""
    from vlmprune.kernels.gather_tokens import kernel

    started = []

    class Counted:
        def __init__(self, name):
            self.name, self.inner = name, getattr(kernel, name)

        def __getitem__(self, grid):
            started.append((self.name, grid))
            return self.inner[grid]

    for name in ("_gather_one", "_gather_many"):
        monkeypatch.setattr(kernel, name, Counted(name))
    tensors = [drawn(1, 1, 5, 8, seed=seed) for seed in range(56)]
    rows = torch.tensor([[0, 4]])
    found = gather_all(tensors, rows, impl="triton")
    assert all(identical(x, y[:, :, [0, 4]]) for x, y in zip(found, tensors, strict=True))
    gather_tokens(tensors[0], rows, impl="triton")
    assert started == [("_gather_many", (56,)), ("_gather_one", (1,))]


def test_offsets_pass_two_to_the_31():
    """Something stands 2³¹ elements behind the start, at a stride that itself fits 32 bits; few pages are ever touched."""
    far = 2**30
    buffer = torch.Tensor(torch.UntypedStorage(2 * far + 64)).view(torch.int8)
    rows = torch.tensor([[2, 0, 1]]).expand(3, -1)
    for strides in ((far, 0, 15, 1), (0, far, 15, 1), (0, 15, far, 1)):  # odd: words are single bytes
        x = buffer.as_strided((3, 3, 3, 15), strides)
        for place in range(3):
            x[place, place, place] = drawn(15, seed=place).mul(9).to(torch.int8)
        assert identical(gather_tokens(x, rows, impl="triton"), x[:, :, [2, 0, 1]].contiguous())
        assert identical(gather_all([x, x], rows, impl="triton")[1], x[:, :, [2, 0, 1]].contiguous())


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_the_reference(shared):
    rows, valid = choice(2, 7, 5)
    gradients = []
    for impl in ("triton", "reference"):
        x, y = drawn(1 if shared else 2, 7, 3).requires_grad_(), drawn(2, 2, 7, 4, seed=2).requires_grad_()
        whole, codes = gather_all([x, y, drawn(2, 7, 2)], rows, valid, impl=impl)[:2]
        (whole.square().sum() + codes.pow(3).sum()).backward()
        gradients.append((x.grad, y.grad))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert not gather_tokens(x, rows, valid, impl="triton").requires_grad


def test_bad_input():
    x, rows = drawn(2, 7, 3), torch.zeros(2, 4, dtype=torch.long)
    for impl in ("auto", "reference", "triton"):
        with pytest.raises(UsageError, match=r"gather_tokens: x must have shape \[2 or 1, …, token, dim\].*found \[3, 7, 3\]"):
            gather_tokens(drawn(3, 7, 3), rows, impl=impl)
        with pytest.raises(UsageError, match=r"gather_tokens: rows must be torch.int64, found torch.int32"):
            gather_tokens(x, rows.int(), impl=impl)
        with pytest.raises(UsageError, match=r"gather_tokens: valid must have shape \[2, 4\] here, found \[2, 3\]"):
            gather_tokens(x, rows, torch.ones(2, 3, dtype=torch.bool), impl=impl)
        with pytest.raises(UsageError, match=r"gather_tokens: valid must be torch.bool"):
            gather_tokens(x, rows, torch.ones(2, 4), impl=impl)
        with pytest.raises(UsageError, match=r"gather_all: tensors\[1\] must have shape"):
            gather_all([x, x[0]], rows, impl=impl)


def test_costs():
    x, rows = drawn(1, 7, 3, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.long)
    assert (cost(x, rows).bytes_moved, cost(x, rows).flops) == (64 + (1 + 2) * 4 * 3 * 2, 0)
    heads = drawn(2, 5, 7, 3)
    assert cost_of_all([x, heads], rows).bytes_moved == 64 + 72 + 4 * 5 * 4 * 3 * 4


def test_poison_is_poison():
    """The fixture works: fresh memory is NaN, so that an element nobody wrote shows."""
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()
    assert torch.zeros(2).new_empty(3).isnan().all()
    assert poison(torch.zeros(2, dtype=torch.long)).ne(0).all()
