"""greedy_order and determinant_order: interpreted kernels pick what the references pick, and what the definition allows."""

from __future__ import annotations

import mmap

import pytest
import torch
from kernels.rule import among_nan
from oracles import Watch

from vlmprune.errors import UsageError
from vlmprune.kernels.select_diverse import cost, cpu, determinant_order, greedy_order, reference, select_diverse

SHAPES = {  # images, visual, dim, keep
    "one token": (1, 1, 4, 1),
    "17 tokens, all of them": (2, 17, 24, 17),
    "129 tokens": (1, 129, 72, 9),
    "3 pictures": (3, 40, 33, 7),
    "more pictures than programs": (5, 33, 16, 4),
    "rows longer than a tile": (1, 19, 1100, 6),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_greedy(features: torch.Tensor, order: torch.Tensor) -> None:
    """Every pick is as far from the picks before it as any token, in fp64, but for rounding.

    A cosine of unit vectors of d numbers is off by at most (d + 4) · 2⁻²⁴: d roundings of sums no greater than 1, and those of
    two lengths and their product. A pick may be worse than the best by the error of both.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    allowed = 2 * (features.shape[-1] + 4) * 2**-24
    for points, picks in zip(unit, order.tolist(), strict=True):
        distance = 1 - points @ points.T
        distance.fill_diagonal_(torch.inf)
        apart = distance.amin(dim=-1)
        assert len(set(picks)) == len(picks), "a token is picked twice"
        for step, pick in enumerate(picks):
            assert apart[pick] >= apart.max() - allowed, f"pick {step} is {apart[pick]} apart, {apart.max()} is possible"
            apart = distance[pick] if step == 0 else torch.minimum(apart, distance[pick])
            apart[picks[: step + 1]] = -torch.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_picks(shape, dtype):
    images, visual, dim, keep = shape
    features = among_nan(drawn(images, visual, dim, dtype=dtype))
    found = greedy_order(features, keep, impl="triton")
    assert_greedy(features, found)
    assert found.equal(greedy_order(features, keep, impl="reference")), "the picks of these draws have no near ties"
    assert select_diverse(features, keep, impl="triton").equal(found.sort(dim=-1).values)


def test_greedy_oracle_sees_a_wrong_pick():
    """The oracle of these tests is no rubber stamp: two picks exchanged are found."""
    features = drawn(1, 40, 8)
    order = greedy_order(features, 6)
    assert_greedy(features, order)
    with pytest.raises(AssertionError, match="pick"):
        assert_greedy(features, order[:, [0, 2, 1, 3, 4, 5]])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_ties_and_duplicates(impl):
    """Ties go to the lower index; exact duplicates are picked last, and never twice; tokens of zeros are tokens."""
    assert greedy_order(torch.eye(6)[None], 6, impl=impl).tolist() == [[0, 1, 2, 3, 4, 5]]
    twice = drawn(9, 16).repeat(2, 1)[None]
    found = greedy_order(twice, 12, impl=impl)[0].tolist()
    assert len(set(found)) == 12
    assert {index % 9 for index in found[:9]} == set(range(9))
    same = torch.ones(2, 5, 8)
    assert sorted(greedy_order(same, 5, impl=impl)[1].tolist()) == [0, 1, 2, 3, 4]
    blank = drawn(1, 7, 8)
    blank[:, 3] = 0
    assert greedy_order(blank, 7, impl=impl).equal(greedy_order(blank, 7, impl="reference"))


def test_strides():
    """A strided last axis, pictures that share their features, slices; the number of keeps that do nothing."""
    features = drawn(2, 24, 21).transpose(1, 2)
    expected = greedy_order(features.contiguous(), 5)
    assert greedy_order(features, 5, impl="triton").equal(expected)
    shared = drawn(1, 21, 24).expand(3, -1, -1)
    assert greedy_order(shared, 5, impl="triton").equal(greedy_order(shared, 5))
    assert greedy_order(features, 0, impl="triton").shape == (2, 0)
    assert determinant_order(features, torch.ones(2, 21), 0, impl="triton").shape == (2, 0)
    for impl in ("auto", "reference", "triton"):
        assert greedy_order(features[:0], 3, impl=impl).shape == (0, 3)
        assert determinant_order(features[:0], torch.ones(0, 21), 3, impl=impl).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_determinant_picks(shape, dtype):
    """Every pick has, but for rounding, the greatest determinant in fp64 that any token gives; and is the reference's."""
    images, visual, dim, keep = shape
    features = among_nan(drawn(images, visual, dim, dtype=dtype))
    weight = among_nan(drawn(images, visual, seed=2).abs() + 0.1)
    found = determinant_order(features, weight, keep, impl="triton")
    assert found.equal(determinant_order(features, weight, keep, impl="reference"))
    unit = torch.nn.functional.normalize(features.double(), dim=-1) * weight.double()[..., None]
    for points, picks in zip(unit, found.tolist(), strict=True):
        gram = points @ points.T
        for step, pick in enumerate(picks[: min(keep, 6)]):
            sets = [[*picks[:step], token] for token in range(visual) if token not in picks[:step]]
            volumes = torch.stack([torch.linalg.det(gram[tokens][:, tokens]) for tokens in sets])
            own = torch.linalg.det(gram[[*picks[:step], pick]][:, [*picks[:step], pick]])
            assert own >= volumes.max() * (1 - 1e-4)


def test_determinants_beyond_the_rank():
    """Where nothing new is left, picks go on by index; a weight of zero is picked last."""
    features = torch.eye(3).repeat(3, 1)[None] + 0.0
    weight = torch.tensor([[1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0]])
    for impl in ("reference", "triton"):
        assert determinant_order(features, weight, 9, impl=impl).tolist() == [[2, 1, 0, 3, 4, 5, 6, 7, 8]]
    flat = drawn(1, 12, 3) @ drawn(1, 3, 16, seed=2)  # rank 3, but for rounding
    for impl in ("reference", "triton"):
        found = determinant_order(flat, torch.ones(1, 12), 12, impl=impl)[0].tolist()
        assert found[3:] == sorted(set(range(12)) - set(found[:3]))


def test_offsets_pass_two_to_the_31():
    """The third token stands 2³¹ elements behind the first, in memory of which only a few pages are ever touched."""
    apart = 2**30 + 8
    memory = mmap.mmap(-1, 2 * (2 * apart + 16))
    features = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((1, 3, 16), (0, apart, 1))
    features.copy_(drawn(1, 3, 16, dtype=torch.bfloat16))
    near = features.contiguous()
    assert greedy_order(features, 3, impl="triton").equal(greedy_order(near, 3))
    weight = torch.tensor([[0.5, 1.0, 0.7]])
    assert determinant_order(features, weight, 3, impl="triton").equal(determinant_order(near, weight, 3))


class Products:
    """FLOPs of all products of matrices with vectors or matrices, and the numbers they read."""

    def __init__(self) -> None:
        self.flops = self.read = 0

    def __call__(self, function, args, kwargs, result) -> None:
        if function.overloadpacket.__name__ in ("mv", "mm", "bmm"):
            self.flops += 2 * result.numel() * args[0].shape[-1]
            self.read += args[1].numel()


def test_nothing_is_square(monkeypatch):
    """No buffer has as many numbers as there are pairs: in the reference, for the kernel, and on a CPU beyond a limit."""
    features, weight = drawn(1, 600, 8), torch.ones(1, 600)
    monkeypatch.setattr(cpu, "MOST_BYTES", 4 * 600**2 - 1)
    for impl, keep in (("reference", 20), ("auto", 200), ("triton", 1)):
        with Watch() as seen:
            greedy_order(features, keep, impl=impl)
        assert 600 <= seen.numbers <= reference.CHUNK * 600 < 600 * 600
        with Watch() as seen:
            determinant_order(features, weight, keep, impl=impl)
        assert 600 <= seen.numbers <= reference.CHUNK * 600


def test_all_pairs_are_kept_where_they_fit_into_64_mb():
    """4096 tokens in fp32, and no more: the limit is of bytes, so that fp64 has half of the pairs."""
    for visual, dtype, fits in ((4096, torch.float32, True), (4097, torch.float32, False), (2897, torch.float64, False)):
        with Watch() as seen:
            greedy_order(drawn(1, visual, 2, dtype=dtype), 1)
        assert (seen.numbers == visual**2) == fits
        assert fits or seen.numbers <= visual * max(cpu.CHUNK, cpu.AHEAD)


@pytest.mark.parametrize("kept", [True, False], ids=["all pairs kept", "in pieces"])
def test_on_a_cpu_every_pair_is_computed_once(kept, monkeypatch):
    """Half of all pairs for the first pick, and for the others nothing, or few rows more; never a product with one vector.

    Time is measured by benchmarks/select_diverse.py; FLOPs of products and numbers read by them do not flake.
    """
    visual, dim, keep = 1024, 32, 100
    if not kept:
        monkeypatch.setattr(cpu, "MOST_BYTES", 4 * 1000**2)
    products = Products()
    with Watch(products):
        greedy_order(drawn(1, visual, dim), keep)
    half = visual * visual // 2 + visual * cpu.CHUNK // 2
    pieces = -(-visual // cpu.CHUNK)
    if kept:
        assert products.flops == 2 * dim * half
        assert products.read <= pieces * visual * dim
    else:
        assert 2 * dim * half < products.flops <= 2 * dim * (half + 4 * keep * visual)
        assert products.read <= (pieces + keep // 4) * visual * dim, "the features are read for less than every fourth pick"
    products = Products()
    with Watch(products):
        determinant_order(drawn(1, visual, dim), drawn(1, visual).abs(), keep)
    assert products.read <= keep // 4 * visual * dim


CPU_SHAPES = {  # images, visual, dim, keep
    **SHAPES,
    "more than a block": (2, 300, 24, 60),
    "a block and one": (1, cpu.CHUNK + 1, 48, cpu.CHUNK + 1),
    "two blocks": (1, 2 * cpu.CHUNK, 16, 90),
    "no tokens": (2, 0, 8, 0),
    "no pictures": (0, 9, 8, 3),
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", CPU_SHAPES.values(), ids=CPU_SHAPES)
@pytest.mark.parametrize("most", [64 << 20, 100_000, 0], ids=["kept", "pieces, some kept", "pieces"])
def test_the_cpus_picks_are_the_references(shape, dtype, most, monkeypatch):
    """Where all pairs are kept, and where rows are computed ahead, kept and dropped again, of any size of block."""
    images, visual, dim, keep = shape
    monkeypatch.setattr(cpu, "MOST_BYTES", most)
    features, weight = drawn(images, visual, dim, dtype=dtype), drawn(images, visual, seed=2).abs() + 0.1
    for chunk, ahead in ((256, 64), (7, 3), (1, 1)):
        monkeypatch.setattr(cpu, "CHUNK", chunk)
        monkeypatch.setattr(cpu, "AHEAD", ahead)
        assert greedy_order(features, keep).equal(greedy_order(features, keep, impl="reference"))
        found = determinant_order(features, weight, keep)
        expected = determinant_order(features, weight, keep, impl="reference")
        new = min(keep, dim - 4)  # up to here: near the rank of the features, what is left of tokens is rounding
        assert found[:, :new].equal(expected[:, :new])
        assert all(len(set(picks)) == keep for picks in found.tolist())


def test_double_is_computed_in_double(monkeypatch):
    """Differences that fp32 cannot show decide, in the reference and on a CPU."""
    near = torch.tensor([0.1, 0.1 - 1e-10], dtype=torch.float64)
    points = torch.eye(3, dtype=torch.float64)
    points[1:, 0], points[1, 1], points[2, 2] = near, *(1 - near.square()).sqrt()
    weight = torch.tensor([[1.0, 1.0 + 1e-12, 1.0, 1.0 + 2e-12]], dtype=torch.float64)
    for impl, most in (("reference", 0), ("auto", 64 << 20), ("auto", 0)):
        monkeypatch.setattr(cpu, "MOST_BYTES", most)
        assert greedy_order(points[None], 1, impl=impl).tolist() == [[2]]
        assert greedy_order(points[None].float(), 1, impl=impl).tolist() == [[0]]
        assert determinant_order(torch.eye(4, dtype=torch.float64)[None], weight, 4, impl=impl).tolist() == [[3, 1, 0, 2]]


@pytest.mark.parametrize("most", [64 << 20, 0], ids=["kept", "pieces"])
def test_a_token_of_nan_on_a_cpu(most, monkeypatch):
    """Means nothing, but the same as in the reference."""
    monkeypatch.setattr(cpu, "MOST_BYTES", most)
    features, weight = drawn(1, 40, 8), torch.ones(1, 40)
    features[0, 7, 3] = torch.nan
    assert greedy_order(features, 9).equal(greedy_order(features, 9, impl="reference"))
    found = determinant_order(features, weight, 9)
    assert found.equal(determinant_order(features, weight, 9, impl="reference"))
    assert found.tolist() == [[7, 0, 1, 2, 3, 4, 5, 6, 8]]


@pytest.mark.parametrize("most", [64 << 20, 0], ids=["kept", "pieces"])
def test_ties_and_duplicates_on_a_cpu(most, monkeypatch):
    """The rules of ties hold for the CPU's path, too, with blocks of any size."""
    monkeypatch.setattr(cpu, "MOST_BYTES", most)
    for chunk, ahead in ((256, 64), (4, 3)):
        monkeypatch.setattr(cpu, "CHUNK", chunk)
        monkeypatch.setattr(cpu, "AHEAD", ahead)
        test_ties_and_duplicates("auto")
        assert greedy_order(torch.eye(40)[None], 40).tolist() == [list(range(40))]
        features = torch.eye(3).repeat(3, 1)[None] + 0.0
        weight = torch.tensor([[1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0]])
        assert determinant_order(features, weight, 9).tolist() == [[2, 1, 0, 3, 4, 5, 6, 7, 8]]
        assert determinant_order(features, torch.zeros(1, 9), 9).tolist() == [list(range(9))]
        flat = drawn(1, 12, 3) @ drawn(1, 3, 16, seed=2)  # rank 3, but for rounding
        found = determinant_order(flat, torch.ones(1, 12), 12)[0].tolist()
        assert found[3:] == sorted(set(range(12)) - set(found[:3]))


def test_autocast_and_gradients():
    """Computed in fp32 under autocast; features that need a gradient are looked at, indices have none."""
    features, weight = drawn(1, 30, 16), drawn(1, 30).abs()
    for impl in ("auto", "reference", "triton"):
        plain = greedy_order(features, 5, impl=impl), determinant_order(features, weight, 5, impl=impl)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert greedy_order(features.requires_grad_(), 5, impl=impl).equal(plain[0])
            assert determinant_order(features, weight.requires_grad_(), 5, impl=impl).equal(plain[1])


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
def test_bad_input(impl):
    x = drawn(2, 5, 4)
    for name, op in (("greedy_order", greedy_order), ("select_diverse", select_diverse)):
        with pytest.raises(UsageError, match=rf"{name}: features must have shape \[any, any, any\] here, found \[5, 4\]"):
            op(x[0], 2, impl=impl)
        with pytest.raises(UsageError, match=rf"{name}: keep must be 0 to the 5 tokens of features, found 6"):
            op(x, 6, impl=impl)
        with pytest.raises(UsageError, match=rf"{name}: keep must be 0 to the 5 tokens of features, found -1"):
            op(x, -1, impl=impl)
        with pytest.raises(UsageError, match=rf"{name}: features must be floating point, found torch.int64"):
            op(x.long(), 2, impl=impl)
        for keep in (2.5, 2.0, True):
            with pytest.raises(UsageError, match=rf"^{name}: keep must be a whole number, found {keep}\.$"):
                op(x, keep, impl=impl)
    with pytest.raises(UsageError, match=r"determinant_order: weight must have shape \[2, 5\] here, found \[2, 4\]"):
        determinant_order(x, x[:, :4, 0], 2, impl=impl)
    with pytest.raises(UsageError, match=r"determinant_order: keep must be 0 to the 5 tokens of features, found 6"):
        determinant_order(x, x[:, :, 0], 6, impl=impl)
    with pytest.raises(UsageError, match=r"^determinant_order: keep must be a whole number, found 2.5\.$"):
        determinant_order(x, x[:, :, 0], 2.5, impl=impl)
    with pytest.raises(UsageError, match="unknown impl"):
        greedy_order(x, 2, impl="cuda")


def test_pictures_of_all_sizes_compile_once(specialised):
    """As long as they need as many programs."""
    for visual in range(33, 49):
        features = drawn(2, visual, 1024)
        greedy_order(features, 2, impl="triton")
        determinant_order(features, torch.ones(2, visual), 2, impl="triton")
    names = ("_lengths", "_nearest", "_farthest", "_determinant")
    assert {name: len(kinds) for name, kinds in specialised.items()} == dict.fromkeys(names, 1)


def test_double_is_refused_by_the_kernel_only():
    x = drawn(1, 5, 4).double()
    with pytest.raises(UsageError, match="greedy_order: features is float64 but kernels compute in fp32"):
        greedy_order(x, 2, impl="triton")
    assert greedy_order(x, 2).shape == (1, 2)


def test_costs():
    found = cost(drawn(2, 10, 4).bfloat16(), 3)
    assert found.bytes_moved == 2 * 10 * 4 * 2 + 2 * 3 * 8
    assert found.flops == 2 * 2 * 10 * 4 * (10 + 3)
