"""Formulas of the methods by themselves: at the ends of their ranges, and what presets and given parameters mean."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from transformers import LlamaConfig

import vlmprune as vp
from vlmprune.kernels.grouped_attention import grouped_attention
from vlmprune.methods import sink_dims
from vlmprune.methods.redistributing import ModelFacts, Scene
from vlmprune.view import TowerFacts


@pytest.mark.parametrize("gain", [0.0, 1e-40, 1e-9, 1e-6, 1e-4, 1e-3, 0.5, 2.0, 1e4])
def test_zerotuning_rows_sum_to_one(gain):
    """Red: the divisor cancels in rows that see little but the first token; the first row sees nothing else."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 6, 8).unbind(0)
    key[:, :, 0] = 6 * query[:, :, 4]  # one row whose weight on the first token rounds to 1
    first = torch.zeros(1, 1, 6, 2)
    first[..., 0], first[0, 0, 0] = 1, torch.tensor([0.0, 1.0])
    position = torch.arange(6)[None]
    out, factors, masses = grouped_attention(
        query, key, value, 1.0, position, None, first, vp.ZeroTuning(gain=gain).coefficients
    )
    sums = (factors * masses).sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, 0], value[:, :, 0], atol=1e-6, rtol=0)
    a = (query.double() @ key.double().transpose(-1, -2)).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    a[..., 1:, 0] *= gain
    expected = (a / a.sum(dim=-1, keepdim=True)) @ value.double()
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), atol=1e-4, rtol=0)


def test_a_sink_whose_attention_rounds_to_nothing_is_a_sink():
    """Red: a visual sink exists only where it gets attention."""
    method = vp.VAR(keep=0.25, sink_dims="1")
    mass = torch.tensor([[[[0.2, 0.4, 0.0, 0.4]]]])
    present = torch.tensor([[[[True, True, True, True]]]])
    expected = torch.tensor([[[[1.0, 1 + 0.75 * 0.4 / 0.4, 0.25, 0.25]]]])
    torch.testing.assert_close(method.coefficients(mass, present), expected)
    present[..., 2] = False
    assert torch.equal(method.coefficients(mass, present), torch.ones(1, 1, 1, 4))


def test_that_sink_in_a_model():
    """Red: the engine does not say which groups have a token."""
    from redistribution.test_exact import VAR
    from tiny_models import make_inputs, shared

    from vlmprune.live.marks import Marks

    model = shared("llava")
    inputs = make_inputs("llava", model, [["text5", "image", "text4"]])
    asked = []

    def coefficients(self, mass, present=None):
        asked.append(present)
        return torch.ones_like(mass)

    with pytest.MonkeyPatch.context() as patch, vp.wrap(model, VAR), torch.no_grad():
        patch.setattr(vp.VAR, "coefficients", coefficients)
        cache = model(**inputs, use_cache=True).past_key_values
    assert Marks is type(cache.layers[2].marks)
    for layer, present in zip(cache.layers[2:5], asked, strict=True):
        groups = layer.marks.groups[0, 0]
        assert present[0, 0, 0].tolist() == [bool((groups == group).any()) for group in range(4)]


# --- VHR -------------------------------------------------------------------------------------------------------------
def factors(distance, *far):
    """VHR's, of heads whose outputs differ by `far`; the last is loud without the picture too."""
    blind = torch.tensor([1.0, 1.0, 1.0, 10.0])[None, :, None]
    return vp.VHR(distance=distance).scale(blind + torch.tensor(far)[None, :, None], blind)[0].tolist()


def test_vhr_outliers():
    """Red: the sample's standard deviation, which is larger, or another bound. By hand: mean 2.3625 + 0.9456 = 3.308."""
    assert factors("l2", 1.0, 2.0, 3.0, 3.45) == [1, 2, 2, 1], "3.45 is an outlier: the median of 0, 1, 2, 3 is 1.5"
    assert factors("l2", 1.0, 2.0, 3.0, 3.2) == [1, 2, 2, 1], "3.2 > 3.177"
    assert factors("l2", 1.0, 2.0, 3.0, 3.1) == [1, 1, 2, 2], "3.1 < 3.128"


def test_vhr_squared_distance():
    """Red: `distance` is not heeded. 9.61 > 5.9025 + 3.570 = 9.473."""
    assert factors("l2sq", 1.0, 2.0, 3.0, 3.1) == [1, 2, 2, 1]


# --- sinks of VAR ----------------------------------------------------------------------------------------------------
def scene(hidden, anchor=None):
    batch, tokens, _ = hidden.shape
    prompt, visual = torch.ones(2, batch, tokens, dtype=torch.bool).unbind(0)
    return Scene(hidden, prompt, visual, None, anchor, (), torch.Tensor)


def test_which_threshold(monkeypatch):
    """Red: a default, or one that is known, wins over what is given; or the default is not τ = 20 at 4,096."""
    share = torch.tensor([0.05, 0.0960, 0.0985, 0.3, 0.6])
    hidden = torch.stack((share.sqrt(), (1 - share).sqrt(), *[torch.zeros(5)] * 6), dim=-1)[None] * 40
    config = LlamaConfig(hidden_size=8, num_attention_heads=2)

    def found(known=None, **given):
        entries = () if known is None else (sink_dims.Known("ours", sink_dims.shape_of(config), (0,), known, "here"),)
        monkeypatch.setattr(sink_dims, "KNOWN", entries)
        method = vp.VAR(sink_dims="0", **given).bind(ModelFacts(config, 8, 6, TowerFacts()))
        return method.sinks(scene(hidden))[0].tolist()

    assert found() == [False, False, True, True, True]
    assert found(known=0.5) == [False, False, False, False, True]
    assert found(known=0.5, sink_energy=0.2) == [False, False, False, True, True]
    assert found(known=0.5, sink_energy=0.2, tau=0.5) == [True] * 5


def test_cosine():
    """Red: another bound than 0.9, or opposite residuals are left out."""
    anchor = torch.tensor([[2.0, 0.0]])
    cosines = torch.tensor([0.89, 0.91, -0.91, -0.89])
    hidden = torch.stack((cosines, (1 - cosines.square()).sqrt()), dim=-1)[None]
    assert vp.VAR(sink_dims="cosine").sinks(scene(hidden, anchor))[0].tolist() == [False, True, True, False]


# --- parameters ------------------------------------------------------------------------------------------------------
def test_what_is_given_wins_over_a_preset():
    """Red: a parameter that is given as its default counts as not given."""
    assert vp.VAR(preset="released-code").keep == 0.6
    assert vp.VAR(preset="released-code", keep=0.4).keep == 0.4
    assert vp.VAR(preset="hallucination", max_sink_share=0.2).max_sink_share == 0.2
    assert vp.PAINT(preset="released-code", beta=0.4).beta == 0.4
    (parsed,) = vp.Recipe.parse("var:preset=hallucination,max_sink_share=0.2").methods
    assert parsed.max_sink_share == 0.2


@pytest.mark.parametrize("given", [{"keep": 0.4}, {"keep": 0.9}, {"preset": "general"}])
def test_two_ways_of_saying_one_thing(given):
    """Red: p beside keep passes because keep is given as its default."""
    with pytest.raises(vp.UsageError, match="give p, keep or a preset; only one"):
        vp.VAR(p=0.6, **given)


def test_methods_can_be_copied():
    method = vp.VAR(keep=0.4, preset="released-code", sink_dims="3")
    assert copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == method
    assert dataclasses.replace(method, keep=0.1) == vp.VAR(preset="released-code", keep=0.1, sink_dims="3")


@pytest.mark.parametrize("text", ["²", "①", "1.5", "-3", "4|"])
def test_dimensions_are_numbers(text):
    with pytest.raises(vp.UsageError, match="sink_dims must be"):
        vp.VAR(sink_dims=text)
