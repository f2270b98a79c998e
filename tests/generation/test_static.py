"""Static caches: a pruned prompt, its steps and later turns compute what the masked model computes."""

from __future__ import annotations

import threading

import pytest
import torch
from families import running
from families.running import run
from generation.static_runs import ALL, CASES, few, in_static_cache
from gradients import EDITING
from oracles import assert_equals_masked
from tiny_models import FLEX, build, make_inputs, shared
from transformers import StaticCache

import vlmprune as vp

ONE = [["text3", "image", "text4"]]
RAGGED = [["text3", "image", "text4"], ["text2", "image", "text9", "image", "text3"], ["text6"]]
STATIC = {"cache_implementation": "static", "disable_compile": True}
WORD = torch.full((1, 1), 20)


def cache_of(model):
    return lambda: StaticCache(model.config, 80)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("cell", CASES if ALL else few(), ids=lambda cell: cell.id)
def test_cell(cell, monkeypatch):
    """Red: a static layer stores or sees other tokens than those that were kept."""
    monkeypatch.setattr(running, "generate", in_static_cache(running.generate))
    run(cell)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_same_as_in_a_cache_that_grows(family):
    """Also with renumbered positions, a cache stage, and other attention."""
    recipes = ["fastv:layer=2,tokens=5,cache_layer=1", "random:layer=0,tokens=4,positions=compact"]
    for attention in ("sdpa", "eager"):
        model = shared(family, attention)
        inputs = make_inputs(family, model, RAGGED)
        for recipe in recipes[: 2 if family == "llava" else 1]:
            with vp.wrap(model, recipe):
                asked = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
                grown, static = (model.generate(**inputs, **asked, **how) for how in ({}, STATIC))
            assert torch.equal(static.sequences, grown.sequences)
            for ours, theirs in zip(static.logits, grown.logits, strict=True):
                torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


def test_steps_by_hand_and_a_turn_with_a_picture():
    """Masks that are given, and none; a second picture is pruned in the same cache."""
    model = shared("llava")
    inputs, more = make_inputs("llava", model, ONE), make_inputs("llava", model, ONE, seed=1)
    with vp.wrap(model, "random:layer=1|3,fraction=0.6|0.3"):
        answers = []
        for cache in (None, StaticCache(model.config, 64)):
            out = model(**inputs, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, [out.logits[:, -1]]
            length = inputs["input_ids"].shape[1]
            for mask in (None, torch.ones(1, length + 2, dtype=torch.long)):
                logits.append(model(input_ids=WORD, attention_mask=mask, past_key_values=cache).logits[:, -1])
            turn = {"input_ids": more["input_ids"], "pixel_values": more["pixel_values"]}
            logits.append(model(**turn, past_key_values=cache).logits[:, -1])
            logits.append(model(input_ids=WORD, past_key_values=cache).logits[:, -1])
            answers.append(torch.stack(logits))
            assert int(cache.get_seq_length()) == 2 * length + 3
    torch.testing.assert_close(*answers, atol=5e-5, rtol=0)
    with vp.wrap(model, "random:layer=0,tokens=4"):
        cache = model(**inputs, past_key_values=StaticCache(model.config, 64)).past_key_values
        with pytest.raises(vp.UsageError, match="attention_mask has 26 columns, this static cache has places for 64"):
            model(input_ids=WORD, attention_mask=torch.ones(1, 1, 1, 26).bool(), past_key_values=cache)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_keep_all_and_leaving(family):
    """Bit for bit: a recipe that keeps everything, and the model after the block."""
    if family == "gemma3":
        from families.table import BATCHES
        from families.table import make_inputs as inputs_of
        from families.table import shared as model_of

        model, inputs = model_of(family), inputs_of(family, BATCHES["ragged"])
    else:
        model = shared(family)
        inputs = make_inputs(family, model, RAGGED)
    asked = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, **STATIC}
    stock = model.generate(**inputs, **asked)

    def equal(found):
        return torch.equal(found.sequences, stock.sequences) and all(map(torch.equal, found.logits, stock.logits))

    with vp.wrap(model, "fastv:layer=2,fraction=1"):
        assert equal(model.generate(**inputs, **asked))
    with vp.wrap(model, "random:layer=0,fraction=0.5"):
        assert not equal(model.generate(**inputs, **asked))
    assert equal(model.generate(**inputs, **asked))


def test_a_cache_that_is_used_again():
    """After `reset`, for prompts of other lengths, pruned or not: nothing of the first is left."""
    model = shared("llava")
    prompts = [make_inputs("llava", model, samples) for samples in (ONE, [["text9", "image", "text2"]], [["text7"]])]
    cache = StaticCache(model.config, 40)
    with vp.wrap(model, "random:layer=1,tokens=4") as run_:
        for inputs in prompts:
            expected = model.generate(**inputs, max_new_tokens=4, use_cache=True)
            cache.reset()
            found = model.generate(**inputs, max_new_tokens=4, past_key_values=cache, disable_compile=True)
            assert torch.equal(found, expected)
        with run_.override(enabled=False):
            cache.reset()
            found = model.generate(**prompts[0], max_new_tokens=4, past_key_values=cache, disable_compile=True)
        short = StaticCache(model.config, 40)
        model.generate(**prompts[0], max_new_tokens=4, past_key_values=short, disable_compile=True)
        assert short.layers[-1].keys.shape[2] < 40
    plain = model.generate(**prompts[0], max_new_tokens=4)
    assert torch.equal(found, plain)
    for used in (cache, short):
        used.reset()
        assert torch.equal(model.generate(**prompts[0], max_new_tokens=4, past_key_values=used, disable_compile=True), plain)


def test_layers_of_a_pruned_section_are_shorter():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text3", "image", "image", "image", "text4"]])  # 48 visual tokens, 55 in all
    with vp.wrap(model, "random:layer=2,tokens=4") as run_:
        cache = model(**inputs, past_key_values=StaticCache(model.config, 64)).past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == [64, 64, 28, 28, 28, 28]  # 55 - 36 + 9, in parts of 4
        assert int(cache.get_seq_length()) == 55
        report = run_.report()
        assert report.static_bytes_unpruned == 6 * 64 * 2 * 64 * 4
        assert report.static_bytes == (2 * 64 + 4 * 28) * 2 * 64 * 4
        assert "static cache" in str(report)
        model(**inputs)
        assert run_.report().static_bytes == 0
        assert "static cache" not in str(run_.report())


def test_too_short():
    """Before anything runs: at the prompt, at a later turn, and at a step."""
    model = shared("llava")
    inputs = make_inputs("llava", model, ONE)  # 23 tokens
    with vp.wrap(model, "random:layer=2,tokens=4"):
        with pytest.raises(vp.UsageError, match="places for 22 tokens, found 0 in it and 23 to come"):
            model(**inputs, past_key_values=StaticCache(model.config, 22))
        cache = model(**inputs, past_key_values=StaticCache(model.config, 25)).past_key_values
        with pytest.raises(vp.UsageError, match="found 23 in it and 3 to come: make one with a max_cache_len of 26 or more"):
            model(input_ids=WORD.expand(1, 3), past_key_values=cache)
        model(input_ids=WORD, past_key_values=cache)
        model(input_ids=WORD, past_key_values=cache)
        with pytest.raises(vp.UsageError, match="found 25 in it and 1 to come"):
            model(input_ids=WORD, past_key_values=cache)


def test_another_number_of_rows_is_refused():
    """Red: torch says that sizes do not match."""
    model = shared("llava")
    with vp.wrap(model, "random:layer=0|2,fraction=0.6|0.3"):
        cache = model(**make_inputs("llava", model, ONE), past_key_values=StaticCache(model.config, 64)).past_key_values
        with pytest.raises(vp.UsageError, match=r"holds the conversations of 1 row\(s\), and this call has 2"):
            model(input_ids=WORD.expand(2, 1), past_key_values=cache)
        model(input_ids=WORD, past_key_values=cache)


def test_a_conversation_stays_with_its_recipe_and_model():
    model, other = build("llava"), build("llava")
    inputs = make_inputs("llava", model, ONE)
    with vp.wrap(model, "random:layer=1,tokens=4"):
        cache = model(**inputs, past_key_values=StaticCache(model.config, 64)).past_key_values
        for ids in (WORD, WORD.expand(1, 2)):
            with pytest.raises(vp.UsageError, match="an un-wrapped model cannot continue it"):
                other(input_ids=ids, past_key_values=cache)
        cache = model(**inputs, past_key_values=StaticCache(model.config, 64)).past_key_values
    with pytest.raises(vp.UsageError, match="the recipe it began with has been removed"):
        model(input_ids=WORD, past_key_values=cache)
    cache = model(**inputs, past_key_values=StaticCache(model.config, 64)).past_key_values
    with vp.wrap(model, "random:layer=2,tokens=4"):  # began un-pruned: nothing is missing
        model(input_ids=WORD, past_key_values=cache)


def test_flex_attention_is_refused():
    model = build("llava", FLEX)
    inputs = make_inputs("llava", model, ONE)
    with vp.wrap(model, "random:layer=1,tokens=4"), pytest.raises(vp.UsageError, match="which 'flex_attention' does not take"):
        model(**inputs, past_key_values=StaticCache(model.config, 64))


@pytest.mark.parametrize("name", sorted(EDITING))
def test_redistribution(name):
    """A prompt, steps and a second turn are edited as in a cache that grows, and not where the caller switched it off.

    Red: a static layer's marks or tables are of other tokens, or an edit is left out: every call must differ from an un-edited.
    """
    model = shared("llava")
    inputs = make_inputs("llava", model, RAGGED)
    ids = torch.full((3, 1), 21)
    answers = []
    for edits, make in ((EDITING[name], cache_of(model)), (EDITING[name], lambda: None), ("", lambda: None)):
        with vp.wrap(model, "+".join(filter(None, ("random:layer=1,fraction=0.5", edits)))) as run_:
            out = model(**inputs, past_key_values=make(), use_cache=True)
            cache, logits, mask = out.past_key_values, [out.logits[:, -1]], inputs["attention_mask"]
            for words, enabled in ((ids, True), (ids.expand(3, 2), True), (ids, True), (ids, False)):
                mask = torch.cat([mask, torch.ones_like(words)], 1)
                position = mask.cumsum(1)[:, -words.shape[1] :] - 1
                with run_.override(enabled=enabled):
                    step = model(input_ids=words, attention_mask=mask, position_ids=position, past_key_values=cache)
                logits.append(step.logits[:, -1])
        answers.append(torch.stack(logits))
    static, grown, unedited = answers
    torch.testing.assert_close(static, grown, atol=5e-5, rtol=0)
    assert ((static - unedited)[:4].abs().amax(dim=(1, 2)) > 1e-3).all()


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_var_and_act_while_generating(family):
    """In eager attention, in beams: the groups of a prompt's keys follow the cache."""
    model = shared(family, "eager")
    inputs = make_inputs(family, model, RAGGED)
    asked = {"max_new_tokens": 4, "num_beams": 2, "return_dict_in_generate": True, "output_logits": True}
    with vp.wrap(model, f"fastv:layer=2,fraction=0.4 + {EDITING['var']},layers=1:3 + {EDITING['act']},layers=3:") as run_:
        grown, static = (model.generate(**inputs, **asked, **how) for how in ({}, STATIC))
        with run_.override(enabled=False):
            plain = model.generate(**inputs, **asked)
    assert torch.equal(static.sequences, grown.sequences)
    for ours, theirs, unedited in zip(static.logits, grown.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
        assert not torch.allclose(ours, unedited, atol=1e-3, rtol=0)


def test_threads():
    """Each in a cache of its own, at the same time."""
    model = shared("llava")
    prompts = [make_inputs("llava", model, ONE, seed=seed) for seed in range(3)]
    with vp.wrap(model, "fastv:layer=2,tokens=4"):
        expected = [model.generate(**inputs, max_new_tokens=6) for inputs in prompts]
        found = [None] * 3

        def work(number):
            with torch.no_grad():
                found[number] = model.generate(**prompts[number], max_new_tokens=6, **STATIC)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(map(torch.equal, found, expected))


def test_against_the_masked_model_alone():
    """Without the matrix' machinery: every step of a batch."""
    model = shared("qwen2_5_vl")
    inputs = make_inputs("qwen2_5_vl", model, RAGGED)
    with vp.wrap(model, "fastv:layer=2,fraction=0.3") as run_:
        out = model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, output_logits=True, **STATIC)
        keep = run_.last.keep
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert_equals_masked(model, inputs, keep, new, torch.stack(out.logits, 1))
