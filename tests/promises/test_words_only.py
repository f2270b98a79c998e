"""A prompt without a picture has nothing to redistribute: it runs as the plain model runs it, whatever it comes in."""

import pytest
import torch
from gradients import EDITING
from tiny_models import build, make_inputs
from transformers.cache_utils import DynamicCache, StaticCache

import vlmprune as vp

FAMILIES = ("llava", "qwen2_5_vl")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def editing(family):
    return [recipe for name, recipe in EDITING.items() if family == "llava" or not name.startswith("paint")]


@pytest.mark.parametrize("family", FAMILIES)
def test_words_in_a_static_cache_run_as_in_the_plain_model(family):
    model = build(family)
    text = make_inputs(family, model, [["text6"], ["text4"]])
    asked = {"max_new_tokens": 4, "cache_implementation": "static", "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**text, **asked)
    for recipe in editing(family):
        with vp.wrap(model, recipe):
            found = model.generate(**text, **asked)
        assert torch.equal(found.sequences, plain.sequences), recipe
        assert all(map(torch.equal, found.logits, plain.logits)), recipe


def test_words_in_a_static_cache_run_when_called_step_by_step():
    model = build("llava")
    text = make_inputs("llava", model, [["text6"]])["input_ids"]
    for recipe in editing("llava"):
        answers = []
        for wrapped in (False, True):
            cache = StaticCache(config=model.config.text_config, max_cache_len=16)
            run = vp.wrap(model, recipe) if wrapped else None
            answers.append([model(input_ids=x, past_key_values=cache).logits for x in (text, text[:, :2], text[:, :1])])
            if run is not None:
                assert run.report().to_dict() is not None
                run.remove()
        assert all(map(torch.equal, *answers)), recipe


def test_a_picture_behind_words_in_a_static_cache_is_edited_as_in_one_that_grows():
    model = build("llava")
    text = make_inputs("llava", model, [["text6"]])["input_ids"]
    pictured = make_inputs("llava", model, [["text2", "image", "text3"]])
    whole = {"input_ids": pictured["input_ids"], "pixel_values": pictured["pixel_values"]}
    answers = []
    for make in (lambda: StaticCache(config=model.config.text_config, max_cache_len=64), DynamicCache):
        with vp.wrap(model, "pai:alpha=0.5"):
            cache = make()
            model(input_ids=text, past_key_values=cache)
            logits = [model(**whole, past_key_values=cache).logits, model(input_ids=text[:, :1], past_key_values=cache).logits]
            answers.append(torch.cat(logits, dim=1))
        cache = make()
        model(**whole, past_key_values=cache)  # begun un-edited, with a picture
        with vp.wrap(model, "pai:alpha=0.5"), pytest.raises(vp.UsageError, match="began without redistribution"):
            model(input_ids=text[:, :1], past_key_values=cache)
    torch.testing.assert_close(*answers, atol=5e-5, rtol=0)


@pytest.mark.parametrize("recipe", ["divprune:layer=0,tokens=4", "pai:alpha=0.5", "cls:tokens=4"])
def test_a_soft_prompt_is_told_what_it_can_do(recipe):
    model = build("llava")
    text = make_inputs("llava", model, [["text6"]])
    embeddings = model.get_input_embeddings()(text["input_ids"]).clone()
    embeddings[:, :2] = torch.randn(1, 2, embeddings.shape[-1], generator=torch.Generator().manual_seed(0))
    call = {"inputs_embeds": embeddings, "attention_mask": text["attention_mask"]}
    plain = model(**call).logits
    answer = model.generate(**call, max_new_tokens=3)
    with vp.wrap(model, recipe) as run:
        for begin in (lambda: model(**call), lambda: model.generate(**call, max_new_tokens=3)):
            with pytest.raises(vp.UsageError, match=r"run this call inside `with run.override\(enabled=False\):`"):
                begin()
        with run.override(enabled=False):
            assert torch.equal(model(**call).logits, plain)
            assert torch.equal(model.generate(**call, max_new_tokens=3), answer)
