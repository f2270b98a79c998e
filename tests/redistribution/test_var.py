"""VAR: a whole model against the loops of its paper, and its formula at the ends of its range."""

from __future__ import annotations

import pytest
import torch
from oracles import TOLERANCE, generate_logits, masked_logits
from redistribution.comparing import assert_equals_the_loops
from redistribution.explicit import Explicit
from redistribution.loops.var import edited, var
from redistribution.recipes import DIMS, RECIPES, SAMPLES, TAU, VAR
from tiny_models import LAYERS, attentions_of, implementations_of, make_inputs, shared
from transformers import LlamaConfig

import vlmprune as vp
from vlmprune.methods import sink_dims
from vlmprune.methods.redistributing import ModelFacts, Scene
from vlmprune.view import TowerFacts


@pytest.mark.parametrize(("family", "attn"), implementations_of(("llava", "qwen2_5_vl")))
def test_var_equals_the_loops(family, attn):
    assert_equals_the_loops(RECIPES["var"], family, attn, edited)


@pytest.mark.parametrize(("family", "attn"), implementations_of(("llava", "qwen2_5_vl")))
def test_var_in_all_layers_equals_the_loops(family, attn):
    assert_equals_the_loops(RECIPES["var, all layers"], family, attn, lambda *_: (range(LAYERS), var(DIMS, TAU, 0.2, 0.6, 0.1)))


@torch.no_grad()
@pytest.mark.parametrize("attn", attentions_of("llava"))
def test_var_with_pruning_equals_the_loops(attn):
    """Red: image spans or sinks are not those that survived the cuts."""
    model, eager = shared("llava", attn), shared("llava", "eager")
    inputs = make_inputs("llava", model, SAMPLES)
    recipe = f"random:layer=0|3,fraction=0.8|0.5,seed=1 + {VAR},layers=1:"
    with vp.wrap(model, recipe) as run:
        _, generated, logits = generate_logits(model, inputs, 4)
        keep = run.last.keep
    edit = var(DIMS, TAU, 0.2, 0.6, 0.1)
    with Explicit(eager, inputs, range(1, LAYERS), edit):
        expected = masked_logits(eager, inputs, keep, generated[:, :-1])[:, inputs["input_ids"].shape[1] - 1 :]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    with vp.wrap(model, "random:layer=0|3,fraction=0.8|0.5,seed=1"):
        _, _, pruned = generate_logits(model, inputs, 4)
    assert (logits[:2] - pruned[:2]).abs().amax(dim=(1, 2)).min() > 0.01, "the test is blind: VAR did nothing"


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
    from redistribution.recipes import VAR
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
