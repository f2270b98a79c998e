"""The edit of a decoding step is made once per prompt and computed in few operations, with the numbers of the long way."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from redistribution.recipes import RECIPES, SAMPLES
from tiny_models import make_inputs, shared

import vlmprune as vp
from vlmprune.kernels.grouped_attention import checked_grouped, checked_scored, cpu, reference
from vlmprune.live import marks as marks_of_layers
from vlmprune.live import redistribution


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def drawn(batch, heads, kv_heads, keys, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, heads, 1, 8), (batch, kv_heads, keys, 8), (batch, kv_heads, keys, 6)
    return [torch.randn(shape, generator=generator, dtype=dtype) * 3 for shape in shapes]


shapes = pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 4, 4), (1, 6, 2), (3, 4, 4), (2, 6, 2)])
dtypes = pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])


@dtypes
@shapes
@pytest.mark.parametrize("method", [vp.ZeroTuning(gain=3.0), vp.ACT(beta=0.4)], ids=["shared groups", "groups per head"])
def test_row_of_groups(batch, heads, kv_heads, dtype, close, method):
    """Red: heads get each other's factors, or the scaling is lost."""
    query, key, value = drawn(batch, heads, kv_heads, 11, dtype)
    group_heads = 1 if isinstance(method, vp.ZeroTuning) else heads
    groups = torch.randint(0, 2, (batch, group_heads, 11), generator=torch.Generator().manual_seed(1))
    members = torch.stack((groups == 0, groups == 1), dim=-1).to(dtype)
    op = checked_grouped(query, key, value, None, None, members)
    assert op is cpu.grouped_attention
    expected = reference.grouped_attention(query, key, value, 0.3, None, None, members, method.coefficients)
    for found, wanted in zip(op(query, key, value, 0.3, None, None, members, method.coefficients), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=close, rtol=close * 10)


@dtypes
@shapes
def test_raised_row(batch, heads, kv_heads, dtype, close):
    """Red: a sample's weights raise another sample's scores."""
    query, key, value = drawn(batch, heads, kv_heads, 11, dtype)
    weight = torch.rand(batch, 11, generator=torch.Generator().manual_seed(1), dtype=dtype)
    op = checked_scored(query, key, value, None, None, weight)
    assert op is cpu.scored_attention
    found, wanted = (run(query, key, value, 0.3, None, None, weight) for run in (op, reference.scored_attention))
    torch.testing.assert_close(found, wanted, atol=close, rtol=close * 10)


def test_who_takes_the_short_way():
    """Red: rows that do not see every key, padding, gradients or half precision are computed as if they were such a row."""
    query, key, value = drawn(1, 4, 4, 11, torch.float32)
    weight, valid, position = torch.ones(1, 11), torch.ones(1, 11, dtype=torch.bool), torch.tensor([[10]])
    ways = [
        checked_scored(query, key, value, None, valid, weight),
        checked_scored(query, key, value, position, None, weight),
        checked_scored(query, key, value, None, None, weight[:, :9]),
        checked_scored(query.expand(-1, -1, 2, -1), key, value, None, None, weight),
        checked_scored(query, key, value, None, None, weight, "reference"),
        checked_scored(*(x.bfloat16() for x in (query, key, value)), None, None, weight),
    ]
    with torch.enable_grad():
        ways.append(checked_scored(query.requires_grad_(), key, value, None, None, weight))
    assert set(ways) == {reference.scored_attention}


def steps(model, inputs, recipe, words):
    """Logits of decoding steps, and the cache."""
    with vp.wrap(model, recipe):
        cache = model(**inputs, use_cache=True).past_key_values
        mask, logits = inputs["attention_mask"], []
        for word in words:
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            ids = torch.full((len(mask), 1), word)
            logits.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("recipe", [RECIPES[name] for name in ("var", "pai", "paint", "zerotuning", "act")])
@pytest.mark.parametrize("pruned", ["", "random:layer=1,tokens=5 + "])
@pytest.mark.parametrize("samples", [SAMPLES[:1], SAMPLES], ids=["alone", "padded"])
def test_equals_the_long_way(recipe, pruned, samples, monkeypatch):
    """Red: a table ends before the conversation does, or padding is seen."""
    model = shared("llava")
    inputs = make_inputs("llava", model, samples)
    monkeypatch.setattr(marks_of_layers, "SPARE", 2)  # a new table for every third word
    found, cache = steps(model, inputs, pruned + recipe, range(20, 27))
    assert any(layer.marks.step is not None for layer in cache.layers[3:5]) is (len(samples) == 1)
    monkeypatch.setattr(redistribution, "_sees_all", lambda *_: False)
    expected, cache = steps(model, inputs, pruned + recipe, range(20, 27))
    assert all(layer.marks is None or layer.marks.step is None for layer in cache.layers[3:5])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_the_step_is_not_copied():
    """Red: a copied or stored conversation shares tables with the one it was copied from, or cannot be stored."""
    model = shared("llava")
    _, cache = steps(model, make_inputs("llava", model, SAMPLES[:1]), RECIPES["pai"], [20])
    marks = cache.layers[3].marks
    assert marks.step is not None
    for other in (copy.deepcopy(marks), pickle.loads(pickle.dumps(marks))):
        assert other.step is None
        assert torch.equal(other.groups, marks.groups)
    for change in (lambda: marks.crop(3), lambda: marks.batch(torch.tensor([0])), lambda: marks.repeat(2)):
        marks.step = object()
        change()
        assert marks.step is None
