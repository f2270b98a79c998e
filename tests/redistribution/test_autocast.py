"""Inside `torch.autocast` an edit computes in full precision all the same, from what the model gives it."""

from __future__ import annotations

import pytest
import torch
from oracles import generate_logits
from redistribution.recipes import RECIPES, SAMPLES
from tiny_models import attentions_of, make_inputs, shared

import vlmprune as vp
from vlmprune.live import redistribution as engine


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("family", "attn", "recipe"),
    [
        pytest.param(family, attn, recipe, id=f"{family}-{attn}-{name}")
        for family in ("llava", "qwen2_5_vl")
        for attn in attentions_of(family)
        for name, recipe in RECIPES.items()
        if family == "llava" or name != "paint"
    ],
)
def test_prompt_and_decoding_run(family, attn, recipe):
    """Red: the rows that an edit made have another dtype than the model's own."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, SAMPLES)
    with autocast():
        expected = model(**inputs).logits.dtype
        with vp.wrap(model, recipe):
            _, _, logits = generate_logits(model, inputs, 3)
            assert model(**inputs).logits.dtype == expected
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["grouped_attention", "scored_attention"])
@pytest.mark.parametrize("recipe", [RECIPES[name] for name in ("var", "pai", "zerotuning", "act")])
def test_edits_are_those_without_autocast(name, recipe, monkeypatch):
    """Red: scores, masses or selections are computed in bf16 although the op asks for fp32."""
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    op, calls = getattr(engine, name), []

    def recorded(*args):
        calls.append((args, op(*args)))
        return calls[-1][1]

    monkeypatch.setattr(engine, name, recorded)
    with vp.wrap(model, recipe), autocast():
        generate_logits(model, inputs, 3)
    assert bool(calls) == (recipe.startswith("pai") == (name == "scored_attention"))
    for args, found in calls:
        for x, y in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, op(*args))), strict=True):
            assert torch.equal(x, y)
        if isinstance(found, tuple):
            rows = (found[1] * found[2]).sum(dim=-1)
            torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("recipe", [RECIPES["act"], RECIPES["var"], "var:sink_dims=cosine"])
def test_marks_are_those_without_autocast(recipe, monkeypatch):
    """Red: sinks, or the attention by which ACT finds them, are computed in bf16."""
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    method, made = type(vp.Recipe.parse(recipe).methods[0]), []
    groups = method.groups

    def recorded(self, see):
        found = groups(self, see), see.column_means()
        with torch.autocast("cpu", enabled=False):
            made.extend(zip(found, (groups(self, see), see.column_means()), strict=True))
        return found[0]

    monkeypatch.setattr(method, "groups", recorded)
    with vp.wrap(model, recipe), autocast():
        model(**inputs)
    assert made
    assert all(torch.equal(*pair) for pair in made)


def test_vhr_scales_the_same_heads(monkeypatch):
    """Red: outputs of heads are compared in bf16 although they were asked for in fp32."""
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    scale, made = vp.VHR.scale, []

    def recorded(self, with_image, text_only):
        made.append((with_image, text_only, scale(self, with_image, text_only)))
        return made[-1][2]

    monkeypatch.setattr(vp.VHR, "scale", recorded)
    with vp.wrap(model, "vhr"), autocast():
        model(**inputs)
    assert all(torch.equal(found, scale(vp.VHR(), with_image, text_only)) for with_image, text_only, found in made)
