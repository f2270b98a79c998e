"""What a user can get wrong is answered with one clear sentence, before the first token."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import FLEX, IMAGE, build, make_inputs, shared
from torch import nn
from transformers import AutoConfig, DynamicCache, StaticCache

import vlmprune as vp
from vlmprune.adapters.refused import REFUSED
from vlmprune.adapters.registry import FAMILIES
from vlmprune.live.layout import Layout, Tokens
from vlmprune.view import View

RECIPE = "random:layer=1,fraction=0.5"


def refused(model, recipe, sentence):
    with pytest.raises(vp.UsageError) as error:
        vp.wrap(model, recipe)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_family():
    model = nn.Linear(2, 2)
    model.config = AutoConfig.for_model("got_ocr2")
    refused(model, RECIPE, "unknown model family: looked for config.model_type among ")
    refused(model, RECIPE, "found 'got_ocr2'")


def test_a_family_that_is_another_thing():
    """Red: a family that is known not to work gets the sentence of an unknown one, or is tried."""
    model = nn.Linear(2, 2)
    model.config = AutoConfig.for_model("mllama")
    refused(model, RECIPE, "the model family 'mllama' is not supported: pictures are keys of cross-attention in it")
    for name, reason in REFUSED.items():
        assert name not in FAMILIES
        model.config = SimpleNamespace(model_type=name, vision_config={})
        refused(model, RECIPE, reason)


def test_layer_out_of_range():
    refused(shared("llava"), "random:layer=6,fraction=0.5", "random prunes at layer 6, but the model has layers 0 to 5")


def test_cls_without_cls_token():
    refused(shared("qwen2_5_vl"), "cls:fraction=0.5", "its vision tower has no CLS token")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
        ({"vision_feature_layer": [-2, -1]}, "its features come from several tower layers"),
        ({"vision_feature_layer": 0}, "its features are the tower's embeddings"),
    ],
    ids=str,
)
def test_cls_with_other_features(change, sentence):
    model = build("llava")
    for key, value in change.items():
        setattr(model.config, key, value)
    refused(model, "cls:fraction=0.5", sentence)


def test_cls_with_another_tower():
    model = build("llava")
    del model.model.vision_tower.embeddings.class_embedding
    refused(model, "cls:fraction=0.5", "(clip_vision_model) has no CLS token")


def test_attention_implementations():
    model = build("llava")
    text = model.model.language_model.config
    text._attn_implementation_internal = "paged|sdpa"
    refused(model, RECIPE, "attention implementation 'paged|sdpa' is not supported")
    text._attn_implementation_internal = "flash_attention_2"
    refused(model, "random:layer=0,fraction=0.5 + fastv:layer=2,fraction=0.2", "fastv looks at attention in the language model")
    vp.wrap(model, RECIPE).remove()  # choosing without attention needs no scores


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_flex_attention_where_transformers_refuses_it(family):
    """Transformers says so first; where somebody gets round that, we do."""
    model = build(family)
    with pytest.raises(ValueError, match="does not support an attention implementation through torch's flex_attention"):
        build(family, FLEX)
    with pytest.raises(ValueError, match="does not support an attention implementation through torch's flex_attention"):
        model.set_attn_implementation(FLEX)
    vp.wrap(model, RECIPE).remove()
    model.model.language_model.config._attn_implementation_internal = FLEX
    refused(
        model,
        RECIPE,
        "attention implementation 'flex_attention' is not supported (supported: sdpa, eager, flash_attention_2, "
        "flash_attention_3)",
    )


def called(model, sentence, recipe=RECIPE, **inputs):
    with vp.wrap(model, recipe), torch.no_grad(), pytest.raises(vp.UsageError) as error:
        model(**inputs)
    assert sentence in str(error.value)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_image_tokens_do_not_match(family):
    model = shared(family)
    inputs = make_inputs(family, model, [["text2", "image", "text2"]])
    place = (inputs["input_ids"] == IMAGE).nonzero()[0]
    inputs["input_ids"][tuple(place)] = 9
    called(model, "the prompt has 15 image tokens, but the 1 picture(s) make 16 (16)", **inputs)


def test_image_tokens_in_the_wrong_rows():
    visual = np.array([[True, True, True, False], [True, False, False, False]])
    with pytest.raises(vp.UsageError, match="would be spread over samples 0 and 1"):
        Layout.find(Tokens.of(visual.astype(int), np.ones_like(visual), visual), [2, 2], torch.device("cpu"))


def test_embeddings_without_ids():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text2"]])
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    sentence = "the method reads the words of the question, but inputs_embeds has no token ids: pass input_ids"
    recipe = vp.CDPruner(tokens=4, relevance=lambda features, ids, valid: features.sum(-1))
    called(model, sentence, recipe, inputs_embeds=embeddings, **inputs)


def test_embeddings_with_pictures_merged():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text2"]])
    ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values")
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(pixels, return_dict=True).pooler_output))
        merged = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[..., None], features)
    called(model, "inputs_embeds holds 16 embeddings that are not word embeddings; if", inputs_embeds=merged, **inputs)


def test_videos():
    """Videos of families that have them: tests/video."""
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text2"]])
    called(model, "videos of llava are not supported: pass the frames", pixel_values_videos=inputs["pixel_values"], **inputs)


def test_videos_without_a_grid():
    model = shared("qwen2_5_vl")
    inputs = make_inputs("qwen2_5_vl", model, [["text2", "image", "text2"]])
    called(model, "not what says how many frames they make", pixel_values_videos=inputs["pixel_values"], **inputs)


def test_four_dimensional_mask():
    """One that fits is obeyed (promises/test_masks.py)."""
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text2"]])
    inputs["attention_mask"] = torch.ones(1, 1, 19, 20).tril().bool()
    called(model, "attention_mask is a tensor of shape [1, 1, 19, 20], where 20 tokens follow 0", **inputs)


def test_static_cache_that_is_too_short():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text2"]])
    sentence = "has places for 16 tokens, found 0 in it and 20 to come: make one with a max_cache_len of 20 or more"
    called(model, sentence, past_key_values=StaticCache(model.config, 16), **inputs)


def test_cache_pruned_by_another_recipe():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text2"]])
    with vp.wrap(model, "random:layer=1,fraction=0.5"), torch.no_grad():
        cache = model(**inputs).past_key_values
    sentence = "was pruned at layer(s) 1, this recipe prunes at 0, 3"
    recipe = "random:layer=0|3,fraction=0.5|0.2"
    called(model, sentence, recipe, input_ids=torch.full((1, 1), 9), past_key_values=cache)


def test_features_encoded_before_wrapping():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text2"]])
    with torch.no_grad():
        encoded = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    called(
        model,
        "the vision tower's features of a picture are unknown",
        "cls:fraction=0.5",
        mm_encoder_outputs={"image": copy.copy(encoded)},
        **inputs,
    )


def test_crop_into_the_pruned_prompt():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text3"]])
    cache = DynamicCache(config=model.config.text_config)
    with vp.wrap(model, "random:layer=0,tokens=3"), torch.no_grad():
        model(**inputs, past_key_values=cache)
        cache.crop(-3)
        assert cache.get_seq_length() == 18
        with pytest.raises(vp.UsageError, match="cannot crop 12 tokens"):
            cache.crop(-12)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_copying_a_wrapped_model():
    """A copy would share hooks with the original; it is refused, and works again after removal."""
    model = shared("llava")
    with vp.wrap(model, RECIPE), pytest.raises(vp.UsageError, match="cannot be copied or pickled"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_method_that_looks_where_it_did_not_declare():
    view = View(0, 4, torch.zeros(1, 4, dtype=torch.long), {})
    with pytest.raises(AttributeError, match=r"add it to its .needs"):
        view.features  # noqa: B018


def test_method_with_a_wrong_count(monkeypatch):
    """A broken method is a programming error, and loud."""
    monkeypatch.setattr(vp.Random, "select", lambda self, see, keep: torch.zeros(1, keep + 1, dtype=torch.long))
    model = shared("llava")
    with (
        vp.wrap(model, RECIPE),
        torch.no_grad(),
        pytest.raises(vp.UsageError, match=r"random.select chose \[9\] tokens of 1 pictures, expected 8"),
    ):
        model(**make_inputs("llava", model, [["text2", "image", "text2"]]))


# --- past the model --------------------------------------------------------------------------------------------------
def test_language_model_called_by_itself():
    """Red: embeddings with a picture among them run un-pruned without a word."""
    model = shared("llava")
    words = torch.randint(8, 90, (1, 5))
    language = model.model.language_model
    plain = language(input_ids=words).last_hidden_state
    with vp.wrap(model, RECIPE) as run, torch.no_grad():
        with pytest.raises(vp.UsageError, match="the language model was called directly with 9 embeddings"):
            language(inputs_embeds=torch.randn(1, 9, 64))
        assert torch.equal(language(input_ids=words).last_hidden_state, plain), "ids alone hold no picture"
        with run.override(enabled=False):
            language(inputs_embeds=torch.randn(1, 9, 64))


def test_steps_of_the_language_model_by_itself():
    """A script that prefills through the model and decodes below it goes on with the pruned conversation."""
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text4", "image", "text3"]])
    word = torch.tensor([[30]])
    with vp.wrap(model, RECIPE), torch.no_grad():
        whole = model(input_ids=word, past_key_values=model(**inputs, use_cache=True).past_key_values).logits
        cache = model(**inputs, use_cache=True).past_key_values
        below = model.model.language_model(inputs_embeds=model.get_input_embeddings()(word), past_key_values=cache)
        assert torch.equal(model.lm_head(below.last_hidden_state), whole)


@pytest.mark.parametrize("copied", [False, True], ids=["the cache", "a copy"])
def test_conversation_goes_on_after_the_block(copied):
    """Red: a raw error about tensor sizes, or an answer from a cache with holes."""
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text4", "image", "text3"]])
    with vp.wrap(model, RECIPE), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        cache = copy.deepcopy(cache) if copied else cache
    for words in (1, 4):
        with torch.no_grad(), pytest.raises(vp.UsageError, match="the recipe it began with has been removed"):
            model(input_ids=torch.full((1, words), 30), past_key_values=cache)


def test_conversation_goes_on_under_the_same_recipe_again():
    model = shared("llava")
    inputs, word = make_inputs("llava", model, [["text4", "image", "text3"]]), torch.tensor([[30]])
    with torch.no_grad():
        with vp.wrap(model, RECIPE):
            expected = model(input_ids=word, past_key_values=model(**inputs, use_cache=True).past_key_values).logits
            cache = model(**inputs, use_cache=True).past_key_values
        with vp.wrap(model, RECIPE):
            assert torch.equal(model(input_ids=word, past_key_values=cache).logits, expected)
