"""What an image tower cannot do is said when it is wrapped, in one sentence: what was found, and what to do."""

from __future__ import annotations

import pytest
from image_towers.towers import build
from transformers import CLIPTextConfig, CLIPTextModel, Siglip2Config, Siglip2Model

import vlmprune as vp


@pytest.mark.parametrize(
    ("name", "recipe", "sentence"),
    [
        ("siglip", "flowcut:tokens=6", "needs a CLS token or merge units in the vision tower, but it has no CLS token"),
        ("siglip", "cls:layer=2,tokens=6", "it has no CLS token; choose a method"),
        ("clip", "cls:tokens=6", "taken from a block before its stage, found layer=0: choose a layer from 1 to 5"),
        ("clip", "fastv:layer=2,tokens=6", "looks at attention_from_last, which an image tower without a language model"),
        (
            "clip",
            "visionzip:tokens=6",
            "taken from a block before its stage, found layer=0: choose a method that looks at patches",
        ),
        ("clip", "mustdrop:layer=2,tokens=6", "looks at attention_from_cls_final, attention_from_text"),
        ("clip", "sparsevlm:layer=2,tokens=6", "looks at attention_from_text"),
        ("clip", "divprune:layer=6,tokens=6", "prunes at block 6, but .* has blocks 0 to 5"),
        ("clip", "divprune:layer=2,tokens=0", "would keep no patch of a picture"),
        ("clip", "divprune:layer=2,tokens=6,cache_layer=3", "cache_layer=3 means nothing in .*, which has no cache"),
        ("clip", "divprune:layer=2,tokens=6,newlines=drop", "newlines=drop means nothing"),
        ("clip", "divprune:layer=2,tokens=6,positions=compact", "positions=compact means nothing"),
        ("clip", "var:keep=0.5", "var redistributes attention in a language model"),
    ],
)
def test_recipes(name, recipe, sentence):
    model = build(name)[1]
    with pytest.raises(vp.UsageError, match=sentence):
        vp.wrap(model, recipe)
    assert "forward" not in vars(model.vision_model)


def test_options_of_language_models():
    model = build("clip")[1]
    with pytest.raises(vp.UsageError, match="explain=True is of vision-language models"):
        vp.wrap(model, "divprune:layer=2,tokens=6", explain=True)
    with pytest.raises(vp.UsageError, match="family='auto' is of vision-language models"):
        vp.wrap(model, "divprune:layer=2,tokens=6", family="auto")
    with pytest.raises(vp.UsageError, match="check compares answers to a prompt, and the image tower of CLIPModel has no"):
        vp.check(model, {}, "divprune:layer=2,tokens=6")
    with vp.wrap(model, "divprune:layer=2,tokens=6") as run:
        with pytest.raises(vp.UsageError, match="would keep no patch"), run.override(tokens=0):
            pass
        with pytest.raises(vp.UsageError, match="enabled must be True or False"):
            run.enabled = 1
    run = vp.wrap(model, "random:layer=2|3,tokens=6|4")
    with run, pytest.raises(vp.UsageError, match="override needs a recipe with one stage, found 2"), run.override(tokens=3):
        pass


def test_models_without_a_tower():
    text = CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(vp.UsageError, match="which has no vision tower"):
        vp.wrap(text, "divprune:layer=2,tokens=6")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    varied = Siglip2Model(Siglip2Config(text_config=small | {"vocab_size": 9}, vision_config=small))
    with pytest.raises(vp.UsageError, match=r"pads pictures of different sizes .* \(NaFlex\)"):
        vp.wrap(varied, "divprune:layer=0,tokens=6")


def test_a_tower_belongs_to_one_handle():
    """Red: hooks of a model's recipe and those of its tower's recipe act in the same blocks."""
    from tiny_models import build as build_language_model

    model = build_language_model("llava")
    tower = model.model.vision_tower
    recipe = "divprune:layer=1,tokens=6"
    with vp.wrap(model, "flowcut:tokens=6"), pytest.raises(vp.UsageError, match="part of a vision-language model that is"):
        vp.wrap(tower, recipe)
    with vp.wrap(tower, recipe), pytest.raises(vp.UsageError, match="vision tower of this model is wrapped by itself"):
        vp.wrap(model, "flowcut:tokens=6")
