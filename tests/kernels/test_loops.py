"""Every kernel's reference against loops over lists of numbers."""

from __future__ import annotations

import pytest
import torch
from methods.comparing import close, sizes
from methods.loops import plain
from methods.loops.cdpruner import cdpruner
from methods.loops.divprune import divprune
from methods.loops.flowcut import flowcut_entropy_ratio, flowcut_terms
from methods.views import random_view

import vlmprune as vp
from vlmprune.kernels import attention_mass as mass_kernel
from vlmprune.kernels import flow_score as flow_kernel
from vlmprune.kernels import gather_tokens as gather_kernel
from vlmprune.kernels import select_diverse as diverse_kernel


def naive_rows(query, key, scaling, visible):
    """`[head][row][key]` of one sample, by loops."""
    heads, group = query.shape[0], query.shape[0] // key.shape[0]
    found = []
    for head in range(heads):
        rows = []
        for row in range(query.shape[1]):
            seen = [j for j in range(key.shape[1]) if visible is None or visible[row, j]]
            shares = plain.softmax(
                [scaling * plain.dot(query[head, row].tolist(), key[head // group, j].tolist()) for j in seen]
            )
            rows.append([shares[seen.index(j)] if j in seen else 0.0 for j in range(key.shape[1])])
        found.append(rows)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_kernels(masked, heads, kv_heads):
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, heads, 3, 5, generator=draw), torch.randn(2, kv_heads, 7, 5, generator=draw)
    visible = None
    if masked:
        visible = torch.rand(2, 3, 7, generator=draw) > 0.4
        visible[..., 0] = True
    found = mass_kernel.attention_rows(query, key, 0.4, visible)
    assert found.dtype == torch.float32
    for sample in range(2):
        close(found[sample], naive_rows(query[sample], key[sample], 0.4, None if visible is None else visible[sample]))
    if masked:
        assert not found[~visible[:, None].expand_as(found)].any()
    close(mass_kernel.attention_mass(query, key, 0.4, visible), found.sum(2))
    half = mass_kernel.attention_rows(query.bfloat16(), key.bfloat16(), 0.4, visible)
    assert torch.equal(half, mass_kernel.attention_rows(query.bfloat16().float(), key.bfloat16().float(), 0.4, visible))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_flow_kernel(padded, heads, kv_heads):
    draw = torch.Generator().manual_seed(1)
    query, anchor = torch.randn(2, heads, 5, generator=draw), torch.randn(2, kv_heads, 5, generator=draw)
    key, value = torch.randn(2, kv_heads, 8, 5, generator=draw), torch.randn(2, kv_heads, 8, 5, generator=draw)
    valid = torch.rand(2, 8, generator=draw) > 0.3 if padded else None
    found = flow_kernel.flow_score(query, key, value, anchor, 0.7, 0.3, valid)
    for view in range(2):
        real = torch.ones(8, dtype=torch.bool) if valid is None else valid[view]
        k, v, va = (x[view].repeat_interleave(heads // kv_heads, 0) for x in (key, value, anchor))
        expected = flowcut_terms(query[view], k[:, real], va, v[:, real], 0.7, 0.3)
        for term, numbers in zip(found, expected, strict=True):
            assert term.dtype == torch.float32
            close(term[view][real], torch.tensor(numbers))
        if padded:
            assert not found[0][view][~real].any()
            assert not found[1][view][~real].any()


def test_entropy_ratio():
    draw = torch.Generator().manual_seed(2)
    relation = (3 * torch.randn(5, 12, generator=draw)).softmax(-1)
    relation[4] = torch.eye(12)[3]
    relation[3, 4:] = 0  # padding, or underflow
    present = torch.tensor([12, 12, 12, 4, 12])
    expected = [flowcut_entropy_ratio(row[:n]) for row, n in zip(relation, present.tolist(), strict=True)]
    close(flow_kernel.entropy_ratio(relation, present), torch.tensor(expected))
    close(flow_kernel.share(relation), torch.tensor([plain.normalised(row) for row in relation.tolist()]))


@sizes
def test_greedy_order(seed, visual, keep, text):
    x = random_view(seed, visual=visual, text=text).features
    expected = [divprune(row, keep) for row in x]
    assert diverse_kernel.greedy_order(x, keep).tolist() == expected
    assert diverse_kernel.select_diverse(x, keep).tolist() == [sorted(row) for row in expected]
    assert diverse_kernel.greedy_order(x, 0).shape == (3, 0)


def test_greedy_order_in_pieces(monkeypatch):
    """The first pick is found a piece of the similarity matrix at a time: any size of piece, the same order."""
    x = random_view(visual=30).features
    whole = diverse_kernel.greedy_order(x, 9)
    for module, impl in ((diverse_kernel.reference, "reference"), (diverse_kernel.cpu, "auto")):
        for chunk in (1, 7, 30, 64):
            monkeypatch.setattr(module, "CHUNK", chunk)
            assert torch.equal(diverse_kernel.greedy_order(x, 9, impl=impl), whole)


@sizes
def test_determinant_order(seed, visual, keep, text):
    """Every beginning of the order is the naive greedy set of its size."""
    see = random_view(seed, visual=visual, text=text)
    x, weight = see.features, see.flow + 0.05
    order = diverse_kernel.determinant_order(x, weight, min(keep, 16))
    for image in range(see.images):
        for count in {1, 2, 3, (min(keep, 16) + 1) // 2, min(keep, 16)} & set(range(min(keep, 16) + 1)):
            assert sorted(order[image, :count].tolist()) == cdpruner(x[image], weight[image], count)


@pytest.mark.parametrize("shape", [(11, 4), (2, 11, 4), (3, 2, 11, 4)])
@pytest.mark.parametrize("shared", [False, True], ids=["", "one for the batch"])
def test_gather_kernel(shape, shared):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(1 if shared else 2, *shape, generator=draw)
    x[..., 5, :] = torch.nan  # a dropped token, which nothing real points at
    rows = torch.tensor([[0, 3, 10], [5, 5, 7]])
    valid = torch.tensor([[True, True, True], [False, False, True]])
    found = gather_kernel.gather_tokens(x, rows, valid)
    assert found.shape == (2, *shape[:-2], 3, 4)
    for sample in range(2):
        for place, row in enumerate(rows[sample].tolist()):
            expected = x[0 if shared else sample][..., row, :]
            expected = expected if valid[sample, place] else torch.zeros_like(expected)
            assert torch.equal(found[sample][..., place, :], expected)
    assert gather_kernel.gather_tokens(x, rows).isnan().any()


X = torch.ones(1, 2, 4, 3)

OPS = {
    "attention_rows": lambda impl: mass_kernel.attention_rows(X, X, 1.0, impl=impl),
    "attention_mass": lambda impl: mass_kernel.attention_mass(X, X, 1.0, impl=impl),
    "flow_score": lambda impl: flow_kernel.flow_score(X[:, :, 0], X, X, X[:, :, 0], 1.0, 1.0, impl=impl),
    "gather_tokens": lambda impl: gather_kernel.gather_tokens(X, torch.zeros(1, 2, dtype=torch.long), impl=impl),
    "greedy_order": lambda impl: diverse_kernel.greedy_order(X[0], 2, impl=impl),
    "select_diverse": lambda impl: diverse_kernel.select_diverse(X[0], 2, impl=impl),
    "determinant_order": lambda impl: diverse_kernel.determinant_order(X[0], X[0, :, :, 0], 2, impl=impl),
}


@pytest.mark.parametrize("op", OPS)
def test_implementations_are_chosen_aloud(op, monkeypatch):
    """A kernel on a CPU is refused, never replaced in silence; "reference" and "auto" are the same there."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(vp.UsageError, match=r"impl='triton' needs CUDA tensors, but .* on cpu: pass impl='reference'"):
        OPS[op]("triton")
    with pytest.raises(vp.UsageError, match="unknown impl 'tritn': did you mean 'triton'"):
        OPS[op]("tritn")
    one, two = OPS[op]("auto"), OPS[op]("reference")
    for x, y in zip(
        (one,) if isinstance(one, torch.Tensor) else one, (two,) if isinstance(two, torch.Tensor) else two, strict=True
    ):
        assert torch.equal(x, y)
