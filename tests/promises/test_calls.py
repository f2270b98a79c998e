"""Calls that say what they want in another way: embeddings for ids, arguments by position, other caches, pieces of a prompt.

Red before: each was refused, also where nothing was dropped; by position, pixels were not seen at all.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import ALL_FAMILIES, CHUNKS_PICTURES, IMAGE, build, make_inputs, make_single, shared
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantoQuantizedLayer

import vlmprune as vp
from vlmprune.live.cache import PrunedLayer

KEEP_ALL = "random:layer=0,fraction=1.0"
PRUNING = ["divprune:tokens=4", "fastv:layer=2,tokens=4", "tome:layer=0,tokens=4", "divprune:tokens=4 + zerotuning:gain=2"]
SAMPLES = [["text3", "image", "text4"], ["text5", "image", "text6"]]


def instead_of_ids(model, inputs):
    given = {name: value for name, value in inputs.items() if name != "input_ids"}
    return {**given, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}


# --- inputs_embeds ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("recipe", [*PRUNING, KEEP_ALL, "cls:tokens=4", "dart:layer=1,tokens=6"])
def test_embeddings_and_pixels(family, recipe):
    """Placeholders are where the placeholder's embedding stands, as in transformers: the same logits as from ids."""
    model = shared(family)
    inputs = make_inputs(family, model, SAMPLES)
    with vp.wrap(model, recipe) as run, torch.no_grad():
        logits, kept = model(**inputs).logits, [k.index.tolist() for k in run.last.kept]
        assert torch.equal(model(**instead_of_ids(model, inputs)).logits, logits)
        assert kept == [k.index.tolist() for k in run.last.kept]
        # Given both, generate() looks at the embeddings for the first token
        assert torch.equal(
            model.generate(**instead_of_ids(model, inputs), max_new_tokens=4),
            model.generate(**inputs, max_new_tokens=4)[:, -4:],
        )


def test_qwen_finds_no_positions_without_ids_but_takes_them():
    model = shared("qwen2_5_vl")
    inputs = make_inputs("qwen2_5_vl", model, SAMPLES)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    position = model.model.get_rope_index(**{name: inputs[name] for name in names})[0]
    with vp.wrap(model, "divprune:tokens=4"), torch.no_grad():
        given = {**instead_of_ids(model, inputs), "position_ids": position}
        assert torch.equal(model(**given).logits, model(**inputs, position_ids=position).logits)


def test_random_choices_from_embeddings_are_the_same_whatever_the_batch():
    model = shared("llava")
    kept = []
    with vp.wrap(model, "random:tokens=4") as run, torch.no_grad():
        model(**instead_of_ids(model, make_inputs("llava", model, SAMPLES)))
        kept.append([k.index.tolist() for k in run.last.kept])
        kept.append([])
        for row in range(2):
            model(**instead_of_ids(model, make_single("llava", model, SAMPLES, row)))
            kept[1] += [k.index.tolist() for k in run.last.kept]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("recipe", [KEEP_ALL, "cls:fraction=1.0", "zerotuning:gain=1"])
def test_merged_embeddings_run_where_nothing_is_dropped(recipe):
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values")
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(pixels, return_dict=True).pooler_output))
        merged = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[..., None], features)
        expected = model(inputs_embeds=merged, **inputs).logits
        with vp.wrap(model, recipe):
            assert torch.equal(model(inputs_embeds=merged, **inputs).logits, expected)
        for refusing in ("divprune:tokens=4", "zerotuning:gain=2"):
            with vp.wrap(model, refusing), pytest.raises(vp.UsageError, match="32 embeddings that are not word embeddings; if"):
                model(inputs_embeds=merged, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_of_words_are_known_as_such(dtype):
    from vlmprune.live.prompt import refuse_merged

    model = build("llava").to(dtype)
    words = model.get_input_embeddings()(make_inputs("llava", model, [["text9"]])["input_ids"])
    for among in (words, words.float()):
        refuse_merged({"inputs_embeds": among}, model.model.language_model)
    with pytest.raises(vp.UsageError, match="holds 1 embeddings"):
        refuse_merged({"inputs_embeds": torch.cat((words, words[:, :1] * 1.01), dim=1)}, model.model.language_model)


# --- by position ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("recipe", PRUNING)
def test_arguments_by_position(family, recipe):
    """The base model takes pixels second: they were not seen, and nothing was pruned."""
    model = shared(family)
    inputs = make_inputs(family, model, SAMPLES)
    order = (
        ["input_ids", "pixel_values", "attention_mask"] if family == "llava" else ["input_ids", "pixel_values", "image_sizes"]
    )
    rest = {name: value for name, value in inputs.items() if name not in order}
    with vp.wrap(model, recipe), torch.no_grad():
        expected = model.model(**inputs).last_hidden_state
        assert torch.equal(model.model(*(inputs[name] for name in order), **rest).last_hidden_state, expected)


# --- caches -----------------------------------------------------------------------------------------------------------
def quantized(config):
    """As `QuantizedCache` is before its first token, whose backend need not be installed to be refused."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = QuantoQuantizedLayer
    return cache


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda config: StaticCache(config, 16), "has places for 16 tokens"),
        (quantized, "found a cache of QuantoQuantizedLayer layers"),
    ],
)
@pytest.mark.parametrize("recipe", ["divprune:layer=3,tokens=4", "zerotuning:gain=2"])
def test_other_caches_are_refused_before_anything_runs(make, found, recipe):
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    ran = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))
    with vp.wrap(model, recipe), pytest.raises(vp.UsageError, match=found):
        model(**inputs, past_key_values=make(model.config.text_config))
    handle.remove()
    assert not ran


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_static_caches_where_nothing_is_dropped(family):
    model = shared(family)
    inputs = make_inputs(family, model, SAMPLES)
    ways = [{"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}, {"prefill_chunk_size": 7}]
    for how in ways[: 2 + CHUNKS_PICTURES]:
        with torch.no_grad():
            expected = model.generate(**inputs, max_new_tokens=4, **how)
            with vp.wrap(model, KEEP_ALL):
                assert torch.equal(model.generate(**inputs, max_new_tokens=4, **how), expected)


@pytest.mark.skipif(not CHUNKS_PICTURES, reason="this transformers forgets pictures in a chunked prefill")
def test_chunked_prefill_names_its_cause():
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    for size in (8, 500):
        with vp.wrap(model, "divprune:tokens=4"), pytest.raises(vp.UsageError, match="leave prefill_chunk_size out"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=size)


def test_crop_to_a_length():
    """What transformers itself says of a positive number, before anything is lost; where it takes one, so do we."""
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES[:1])
    with vp.wrap(model, "divprune:tokens=4"), torch.no_grad():
        plain, pruned = DynamicCache(), model(**inputs, use_cache=True).past_key_values
        step = model(input_ids=torch.tensor([[9, 10, 11]]), past_key_values=pruned)
        length, layer = pruned.get_seq_length(), pruned.layers[0]
        assert isinstance(layer, PrunedLayer)
        stored = layer.keys.shape[2]
        assert step.logits.shape[1] == 3
        plain.update(layer.keys, layer.values, 0)
        try:
            plain.crop(stored - 1)
        except ValueError as refusal:
            with pytest.raises(ValueError, match=str(refusal).split("(")[0]):
                pruned.crop(length - 1)
            assert (pruned.get_seq_length(), layer.keys.shape[2]) == (length, stored)
        else:
            pruned.crop(length - 1)
            assert (pruned.get_seq_length(), layer.keys.shape[2]) == (length - 1, stored - 1)


# --- prompts that were cut --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("left", "sentence"),
    [(10, "row 0 ends with an image token, as a prompt does that was cut inside a picture"), (3, "cut it off")],
)
def test_truncated_prompts(left, sentence):
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES[:1])
    ids = inputs["input_ids"][:, :left]
    with vp.wrap(model, "divprune:tokens=4"), pytest.raises(vp.UsageError, match=sentence):
        model(input_ids=ids, pixel_values=inputs["pixel_values"])
    with vp.wrap(model, KEEP_ALL), pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(input_ids=ids, pixel_values=inputs["pixel_values"])  # transformers' own words


# --- attentions by config ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("recipe", ["zerotuning:gain=2", "act", "pai", "vhr", "divprune:tokens=4 + zerotuning:gain=2"])
def test_attentions_asked_for_in_the_config(family, recipe):
    """The same as asked for in the call: methods that edit all rows lost them."""
    model = build(family, "eager")
    inputs = make_inputs(family, model, SAMPLES)
    with vp.wrap(model, recipe), torch.no_grad():
        asked = model(**inputs, output_attentions=True).attentions
        model.config.text_config.output_attentions = True
        found = model(**inputs).attentions
        step = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    assert len(asked) == len(found) == model.config.text_config.num_hidden_layers
    assert all(torch.equal(a, b) for a, b in zip(asked, found, strict=True))
    assert step.sequences.shape[1] == inputs["input_ids"].shape[1] + 3


# --- a row's result depends on nothing beside it ----------------------------------------------------------------------
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_plain_forward_of_a_padded_batch_chooses_as_each_row_alone(family, pad):
    """All methods. In a plain forward of LLaVA, padding moves rotary positions: DART's norms of keys knew it."""
    from promises.few import RECIPES

    model = shared(family)
    samples = [["text3", "image", "text9"], ["text40", "image", "text4"], ["text2", "image", "text30"]]
    batch = make_inputs(family, model, samples, pad=pad)
    ran = 0
    for name, budget in RECIPES.items():
        try:
            run = vp.wrap(model, f"{name}:{budget}")
        except vp.UsageError:
            continue  # without a CLS token
        with run, torch.no_grad():
            model(**batch)
            together = {(k.site, k.layer, k.sample): k.index.tolist() for k in run.last.kept}
            for row in range(3):
                model(**make_single(family, model, samples, row))
                for k in run.last.kept:
                    assert together[k.site, k.layer, row] == k.index.tolist(), (name, row)
        ran += 1
    assert ran >= 10
