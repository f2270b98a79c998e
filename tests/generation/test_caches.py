"""Quantised and offloaded caches of pruned conversations, beyond what the matrix has."""

from __future__ import annotations

import pytest
import torch
from families.running import close, generate
from families.table import BATCHES, make_inputs, shared
from generation.elsewhere import offloading
from transformers import DynamicCache
from transformers.cache_utils import Fp8QuantizedLayer

import vlmprune as vp
from vlmprune.live.cache import PrunedLayer

pytestmark = pytest.mark.usefixtures("no_grad")

RECIPE = "divprune:layer=0|2,fraction=0.6|0.3"
FP8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}


@pytest.fixture(scope="module")
def model():
    return shared("llava", "sdpa")


@pytest.fixture
def lossless(monkeypatch):
    """A quantised cache that loses nothing: everything but the loss is as it is, and what comes out is exact."""
    stored = []

    def quantise(self, tensor, scale=None):
        stored.append(tensor.shape[-2])
        return tensor, torch.ones(())

    monkeypatch.setattr(Fp8QuantizedLayer, "_quantize", quantise)
    monkeypatch.setattr(Fp8QuantizedLayer, "_dequantize", lambda self, quantised: quantised[0])
    return stored


@pytest.mark.parametrize("recipe", [RECIPE, "random:layer=1|3,fraction=0.6|0.3"])
@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_ragged_batch_on_a_quantised_cache(model, lossless, recipe, strategy):
    """Red: padding or a neighbour is taken for a row's own entries; beams reorder entries and not their record."""
    inputs = make_inputs("llava", BATCHES["ragged"])
    with vp.wrap(model, recipe):
        expected, _, logits = generate(model, inputs, 5, **strategy)
        output, _, quantised = generate(model, inputs, 5, **strategy, **FP8)
    assert torch.equal(output.sequences, expected.sequences)
    close(quantised, logits)
    lengths = [layer.cumulative_length for layer in output.past_key_values.layers]
    assert lengths == [layer.keys.shape[2] for layer in expected.past_key_values.layers]
    assert {layer.get_seq_length() for layer in output.past_key_values.layers} == {inputs["input_ids"].shape[1] + 4}
    assert min(lossless) == 1, "nothing went through the quantiser"


@pytest.mark.parametrize("opening", ["picture", "words"])
def test_later_turns_on_a_quantised_cache(model, lossless, opening):
    """Red: a filled layer is taken over as if it were empty; a later picture stands for other tokens than it says."""
    first = make_inputs("llava", BATCHES["one"] if opening == "picture" else [["text9"]])
    later = make_inputs("llava", [["text2", "image", "text4"]], seed=5)
    answers = []
    for strategy in (FP8, {}):
        with vp.wrap(model, RECIPE):
            begun, _, _ = generate(model, first, 2, **strategy)
            ids = torch.cat([begun.sequences, later["input_ids"]], 1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": begun.past_key_values}
            second, _, logits = generate(model, {**turn, "pixel_values": later["pixel_values"]}, 4)
            assert all(isinstance(layer, PrunedLayer) for layer in second.past_key_values.layers)
            assert {layer.get_seq_length() for layer in second.past_key_values.layers} == {ids.shape[1] + 3}
            answers.append(logits)
    close(*answers)


REFUSED = [
    (
        "divprune:fraction=0.5 + random:layer=4,fraction=0.2,cache_layer=2",
        "takes no tokens out of a quantised cache: leave",
    ),
    ("zerotuning:gain=2", "attention redistribution needs a DynamicCache or StaticCache, found a Fp8QuantizedLayer"),
]


@pytest.mark.parametrize(("recipe", "sentence"), REFUSED, ids=[sentence[:30] for _, sentence in REFUSED])
def test_what_a_quantised_cache_cannot_do(model, recipe, sentence):
    with vp.wrap(model, recipe), pytest.raises(vp.UsageError) as refusal:
        model.generate(**make_inputs("llava", BATCHES["one"]), max_new_tokens=4, **FP8)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_tokens_are_not_taken_out_of_a_quantised_cache(model):
    """Transformers would crop what is not quantised yet, and leave the rest."""
    with vp.wrap(model, RECIPE):
        output, _, _ = generate(model, make_inputs("llava", BATCHES["one"]), 4, **FP8)
        output.past_key_values.crop(0)
        with pytest.raises(vp.UsageError, match="cannot crop 2 tokens: transformers takes no tokens out of a quantised cache"):
            output.past_key_values.crop(-2)


@pytest.mark.parametrize(
    "recipe",
    [
        "zerotuning:gain=2",
        "divprune:fraction=0.5 + zerotuning:gain=2",
        "divprune:fraction=0.5 + random:layer=4,fraction=0.2,cache_layer=2",
    ],
)
def test_offloaded_is_as_if_it_were_not(model, recipe):
    """Red: marks, or a cache stage, read entries that are elsewhere."""
    inputs = make_inputs("llava", BATCHES["one"])
    with vp.wrap(model, recipe):
        expected = model.generate(**inputs, max_new_tokens=5)
        with offloading() as counts:
            assert torch.equal(model.generate(**inputs, max_new_tokens=5, cache_implementation="offloaded"), expected)
    assert counts["fetched"]


def test_a_filled_cache_may_be_offloaded(model):
    """A second turn with a picture, after one of words: layers whose entries are elsewhere are taken over as they are.

    Red: what is recorded of them is put where they are, and not where the model computes."""
    text, later = make_inputs("llava", [["text9"]]), make_inputs("llava", [["text2", "image", "text4"]], seed=5)
    answers = []
    for strategy in ({}, {"cache_implementation": "offloaded"}):
        with vp.wrap(model, "random:layer=1|3,fraction=0.6|0.3"), offloading():
            first, _, _ = generate(model, text, 2, **strategy)
            ids = torch.cat([first.sequences, later["input_ids"]], 1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": later["pixel_values"]}
            answers.append(model.generate(**turn, past_key_values=first.past_key_values, max_new_tokens=4))
    assert torch.equal(*answers)


def test_emulated_offloading_is_seen_to_be_one(model):
    """The emulation itself: an offloaded layer has nothing to read."""
    with offloading():
        cache = DynamicCache(config=model.config, offloading=True)
        model(**make_inputs("llava", [["text9"]]), past_key_values=cache)
        assert cache.layers[2].keys.device.type == "meta"
