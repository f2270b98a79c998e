"""`wrap(model, family=…)`: a model of an unknown family is looked at, a family that is forced upon a model must fit."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from families.oracles import TOLERANCE, expected_logits, language_model
from families.running import generate
from families.table import BATCHES, NAMES, TINY, build, make_inputs, shared

import vlmprune as vp
from vlmprune.adapters.registry import FAMILIES

pytestmark = pytest.mark.usefixtures("no_grad")

RECIPE = "random:layer=1|3,fraction=0.6|0.3,seed=0"
DANGERS = {
    "qwen3_vl": "deepstack_visual_embeds",
    "qwen3_vl_moe": "deepstack_visual_embeds",
    "gemma3": "token_type_ids",
    "gemma4": "mm_token_type_ids",
    "gemma4_moe": "mm_token_type_ids",
    "gemma4_e": "keys of their own",
    "paligemma": "not causal",
    "paligemma2": "not causal",
}
"""Families that the finder must stop, each with one of its dangers."""


def renamed(model):
    """The same model, as if its type were unknown."""
    model.config.model_type = model.model.config.model_type = "somebodys_own"
    return model


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DANGERS])
@pytest.mark.parametrize("recipe", [RECIPE, "divprune:layer=0,fraction=0.5", "uniform:layer=2,fraction=0.4"])
def test_what_the_finder_lets_pass_is_exact(name, recipe):
    """Red: the finder takes a model for a plain one that is not."""
    model, samples = shared(name), BATCHES["ragged"]
    inputs = make_inputs(name, samples)
    with vp.wrap(model, recipe, family="auto") as run:
        _, new, logits = generate(model, inputs)
        keep = run.last.keep
        model(**inputs, use_cache=False)
        assert run.last.kept[0].original > 0
    expected = expected_logits(name, model, samples, keep, new[:, :-1])
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    assert (logits - expected_logits(name, model, samples, {}, new[:, :-1])).abs().max() > 0.1
    assert "cells of the picture" in str(run.found) or "a count of tokens" in str(run.found)


@pytest.mark.parametrize("name", DANGERS)
def test_what_might_be_silently_wrong_is_stopped(name):
    """Red: a family that needs more than the plain rules runs by them."""
    model = shared(name)
    inputs = make_inputs(name, BATCHES["one"])
    before = model(**inputs).logits
    with pytest.raises(vp.UsageError, match=DANGERS[name]) as refusal:
        vp.wrap(model, RECIPE, family="auto")
    assert "\n" not in str(refusal.value)
    assert "might be silently wrong" in str(refusal.value)
    assert torch.equal(model(**inputs).logits, before)


def test_a_model_of_an_unknown_type_needs_the_word_auto():
    model = renamed(build("internvl"))
    with pytest.raises(vp.UsageError, match="unknown model family"):
        vp.wrap(model, RECIPE)
    with vp.wrap(model, RECIPE, family="auto") as run:
        model.generate(**make_inputs("internvl", BATCHES["one"]), max_new_tokens=2)
        assert "'somebodys_own'" in str(run.found)
        assert "not known:" in str(run.found)
        assert "6 × full attention" in str(run.found)


def test_windows_that_no_list_of_kinds_names_are_found():
    """Mistral's config has the size of a window and no kinds. Red: its layers are taken for full attention."""
    config = TINY["mistral3"].config()
    config.text_config.sliding_window = 24
    with vp.wrap(tf.Mistral3ForConditionalGeneration(config).eval(), RECIPE, family="auto") as run:
        assert "6 × sliding attention" in str(run.found)


@pytest.mark.parametrize("recipe", ["fastv:layer=2,fraction=0.5", "dart:layer=2,fraction=0.5", "pai", "cls:fraction=0.5"])
def test_methods_that_look_at_more_than_features_are_refused(recipe):
    """Red: a method reads attention, keys or the tower of a model of which nothing is known."""
    with pytest.raises(vp.UsageError, match=r"CLS token|nothing is known") as refusal:
        vp.wrap(shared("llava"), recipe, family="auto")
    assert "\n" not in str(refusal.value)


def test_a_budget_of_a_found_model_is_of_a_sample():
    name, samples = "internvl", BATCHES["pictures"]
    with vp.wrap(shared(name), "random:layer=0,tokens=7", family="auto") as run:
        for call in (shared(name), lambda **inputs: shared(name).generate(**inputs, max_new_tokens=2)):
            call(**make_inputs(name, samples))
            assert [len(kept.index) for kept in run.last.kept] == [7]
            assert run.last.kept[0].original == int((make_inputs(name, samples)["input_ids"] == 1).sum())


def test_embeddings_alone_are_refused_where_placeholders_are_counted():
    model = shared("internvl")
    inputs = make_inputs("internvl", BATCHES["one"])
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    with vp.wrap(model, RECIPE, family="auto"), pytest.raises(vp.UsageError, match="counts placeholders in input_ids"):
        model(**inputs, inputs_embeds=embeddings)


def test_what_the_finder_looks_for_and_does_not_find():
    """Two text models, and none; no placeholder; pictures under another name."""
    model = build("internvl")
    model.model.spare = build("internvl").model.language_model
    with pytest.raises(vp.UsageError, match=r"one text model .* found language_model, spare"):
        vp.wrap(model, RECIPE, family="auto")
    del model.model.spare
    held, model.model.language_model = model.model.language_model, torch.nn.Linear(2, 2)
    with pytest.raises(vp.UsageError, match=r"one text model .* found none among vision_tower"):
        vp.wrap(model, RECIPE, family="auto")
    model.model.language_model = held
    token, model.config.__dict__["image_token_id"] = model.config.image_token_id, None
    with pytest.raises(vp.UsageError, match=r"config\.image_token_id, found None"):
        vp.wrap(model, RECIPE, family="auto")
    model.config.image_token_id = token
    vp.wrap(model, RECIPE, family="auto").remove()


def test_other_parts_without_embeddings_are_no_text_models():
    """Vision towers have layers, and a method for their embeddings that raises. Red: Kimi-K2.5 and others are a traceback."""
    model = build("internvl")

    class Tower(tf.PreTrainedModel):
        config_class = tf.LlamaConfig

        def __init__(self) -> None:
            super().__init__(tf.LlamaConfig(num_hidden_layers=1))
            self.layers = torch.nn.ModuleList([torch.nn.Identity()])

    with pytest.raises(NotImplementedError):
        Tower().get_input_embeddings()
    model.model.spare = Tower()
    vp.wrap(model, RECIPE, family="auto").remove()


def test_models_that_a_config_makes_see_both_ways_are_refused():
    """Red: their pruned run is causal, and nothing says so."""
    model = build("internvl")
    config = model.model.language_model.config
    config.use_bidirectional_attention = True
    with pytest.raises(vp.UsageError, match="might be silently wrong: the config of Qwen3Model says use_bidirectional"):
        vp.wrap(model, RECIPE, family="auto")
    config.use_bidirectional_attention, config.is_causal = None, False
    for family in (None, "auto"):
        with pytest.raises(vp.UsageError, match="the config of Qwen3Model says is_causal=False"):
            vp.wrap(model, RECIPE, family=family)


def test_types_that_are_refused_by_name_are_refused_by_the_finder():
    model = build("internvl")
    model.config.model_type = "mllama"
    with pytest.raises(vp.UsageError, match="cross-attention"):
        vp.wrap(model, RECIPE, family="auto")


# -- a family that is forced upon a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if TINY[name].model_type in FAMILIES])
def test_a_family_forced_upon_a_model_of_another_known_family_is_refused(name):
    """Red: a model runs by the rules of another family."""
    other = "llava" if name != "llava" else "qwen2_vl"
    with pytest.raises(vp.UsageError, match="was given for a model of the family") as refusal:
        vp.wrap(shared(name), RECIPE, family=other)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl", "qwen3_vl", "llava_next"])
def test_a_family_forced_upon_its_own_model_runs_as_always(name):
    model, samples = renamed(build(name)), BATCHES["ragged"]
    inputs = make_inputs(name, samples)
    with vp.wrap(model, RECIPE, family=TINY[name].model_type) as run:
        _, new, logits = generate(model, inputs)
    expected = expected_logits(name, model, samples, run.last.keep, new[:, :-1])
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    assert run.found is None


WRONG = [
    ("internvl", "llava", "embeddings|does not fit"),
    ("idefics3", "llava", "looked for language_model"),
    ("llava", "llava_next", "looked for image_newline"),
    ("internvl", "qwen3_vl", "visual.blocks"),
    ("gemma3", "internvl", "vision_tower.encoder.layer"),
    ("gemma3", "deepseek_vl", "token_type_ids"),
    ("paligemma", "janus", "not causal"),
    ("qwen3_vl", "glm4v", "deepstack_visual_embeds"),
    ("mistral3", "qwen2_vl", "visual.blocks"),
]


@pytest.mark.parametrize(("name", "family", "told"), WRONG)
def test_a_family_forced_upon_a_model_that_it_does_not_fit_is_refused(name, family, told):
    """Red: parts that are missing, or dangers that the family does not describe, are found out in the middle of a prompt."""
    with pytest.raises(vp.UsageError, match=told) as refusal:
        vp.wrap(renamed(build(name)), RECIPE, family=family)
    assert "\n" not in str(refusal.value)
    assert f"family={family!r} does not fit" in str(refusal.value)


def test_a_family_that_does_not_exist_is_refused():
    with pytest.raises(vp.UsageError, match="unknown family 'lava': did you mean 'llava'"):
        vp.wrap(shared("llava"), RECIPE, family="lava")


# -- a model that somebody patched -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["base", "text model", "layer", "attention"])
def test_a_patched_class_is_refused(part, monkeypatch):
    """Red: a model whose forward was replaced for all models of the process is pruned by what transformers' own would do."""
    model = shared("llava")
    text = language_model(model)
    kinds = {"base": type(model.model), "text model": type(text), "layer": type(text.layers[0])}
    kind = {**kinds, "attention": type(text.layers[0].self_attn)}[part]
    own = kind.forward
    vp.wrap(model, RECIPE).remove()
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: own(self, *args, **kwargs))
    for family in (None, "auto"):
        with pytest.raises(vp.UsageError, match=rf"{kind.__name__}\.forward is not transformers' own") as refusal:
            vp.wrap(model, RECIPE, family=family)
        assert "\n" not in str(refusal.value)


def test_a_class_of_ones_own_is_not_patched():
    """Subclasses outside transformers are what they say they are."""

    class Own(tf.LlavaForConditionalGeneration):
        pass

    model = build("llava")
    model.__class__ = Own
    vp.wrap(model, RECIPE).remove()
