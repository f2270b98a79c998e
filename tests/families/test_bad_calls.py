"""What calls of these families cannot state is one sentence, before anything runs; where nothing is dropped, the call runs."""

from __future__ import annotations

import pytest
import torch
from families.table import BATCHES, make_inputs, shared

import vlmprune as vp
from vlmprune.adapters.idefics3 import IDEFICS3

pytestmark = pytest.mark.usefixtures("no_grad")
RECIPE = "random:layer=1,fraction=0.5"


def sentence(model, **inputs) -> str:
    with vp.wrap(model, RECIPE), pytest.raises(vp.UsageError) as refusal:
        model(**inputs)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("name", ["internvl", "perception_lm"])
def test_videos_are_refused(name):
    """Red: frames that nobody counted are pruned, or a video fails with a trace. Families that take videos: tests/video."""
    inputs = make_inputs(name, BATCHES["one"])
    found = sentence(shared(name), **inputs, pixel_values_videos=torch.zeros(1, 2, 3, 8, 8))
    assert f"videos of {name} are not supported: pass the frames as pictures" in found


@pytest.mark.parametrize("name", ["qwen3_vl", "glm4v", "gemma4", "video_llama_3"])
def test_videos_without_what_says_their_frames_are_refused(name):
    """Red: a video without its grid is taken for a prompt without one."""
    inputs = make_inputs(name, BATCHES["one"])
    found = sentence(shared(name), **inputs, pixel_values_videos=torch.zeros(1, 2, 3, 8, 8))
    assert "not what says how many frames they make" in found


@pytest.mark.parametrize("name", ["fast_vlm", "perception_lm"])
def test_tokens_that_are_counted_need_ids(name):
    """Red: a picture whose tokens nobody can count runs un-pruned, and nobody is told."""
    model, inputs = shared(name), make_inputs(name, BATCHES["one"])
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    said = sentence(model, **inputs)
    assert f"how many tokens a picture of {name} has is counted in input_ids" in said
    assert "pass input_ids" in said


@pytest.mark.parametrize("name", ["internvl", "smolvlm", "mistral3", "qwen3_vl"])
def test_embeddings_with_pixels_are_the_same_as_ids(name):
    """Red: pictures are put together from words that stand for ids."""
    model, inputs = shared(name), make_inputs(name, BATCHES["pictures"])
    by_embeddings = {key: value for key, value in inputs.items() if key != "input_ids"}
    by_embeddings["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    if name == "qwen3_vl":  # whose positions are found by ids
        positions = model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"], attention_mask=inputs["attention_mask"]
        )[0]
        inputs["position_ids"] = by_embeddings["position_ids"] = positions
    recipe = "uniform:layer=1,tokens=4"
    with vp.wrap(model, recipe) as run:
        expected, kept = model(**inputs).logits, run.last.kept
        assert torch.equal(model(**by_embeddings).logits, expected)
    assert [picture.index.tolist() for picture in run.last.kept] == [picture.index.tolist() for picture in kept]


def test_a_prompt_of_empty_crops_alone_has_no_picture():
    """Idefics3's processor pads samples without a picture. Red: a prompt without one fails."""
    model, inputs = shared("idefics3"), make_inputs("idefics3", [["text7"]])
    plain = model(**inputs).logits
    counted = {**inputs, "pixel_values": torch.zeros(1, 1, 3, 24, 24)}
    assert IDEFICS3.tokens_per_image(counted, model.config) is None
    with vp.wrap(model, RECIPE):
        assert torch.equal(model(**inputs).logits, plain)
