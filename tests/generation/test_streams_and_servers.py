"""Streaming words to a caller, and transformers' continuous batching, of a pruned model."""

from __future__ import annotations

import threading

import pytest
import torch
from families.table import BATCHES, build, make_inputs
from transformers import ContinuousBatchingConfig, GenerationConfig, TextIteratorStreamer, TextStreamer

import vlmprune as vp
from vlmprune import tiny
from vlmprune.tiny.scenes import make_scene

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def embedded():
    model, processor = tiny.load()
    inputs = processor(text=tiny.prompt("what is on the left?"), images=make_scene(3).image, return_tensors="pt")
    return model, processor, inputs


def test_a_thread_streams_what_this_one_set(embedded):
    """Red: the thread that generates does not have its caller's budget, or another text comes out."""
    model, processor, inputs = embedded
    words = processor.tokenizer
    with vp.wrap(model, "divprune:fraction=0.5") as run, run.override(tokens=7):
        expected = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
        streamer = TextIteratorStreamer(words, skip_prompt=True, timeout=120)
        kwargs = {**inputs, "max_new_tokens": 5, "min_new_tokens": 5, "streamer": streamer}
        thread = threading.Thread(target=torch.no_grad()(model.generate), kwargs=kwargs)
        thread.start()
        assert "".join(streamer).split() == words.decode(expected).split()
        thread.join()
        assert {len(found.index) for found in run.last.kept} == {7}


def test_a_stream_of_answers_on_a_prefix(embedded, capsys):
    """`TextStreamer` prints; the prefix is in what is skipped."""
    model, processor, inputs = embedded
    words, ids = processor.tokenizer, inputs["input_ids"]
    beginning = {name: value[:, :-3] if value.shape == ids.shape else value for name, value in inputs.items()}
    with vp.wrap(model, "divprune:fraction=0.5") as run:
        expected = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)[0, ids.shape[1] :]
        asked = run.encode(**beginning).ask(ids[:, -3:])
        model.generate(**asked, max_new_tokens=4, min_new_tokens=4, streamer=TextStreamer(words, skip_prompt=True))
    assert capsys.readouterr().out.split() == words.decode(expected).split()


def served(model, prompts):
    """Generated tokens and error of every prompt, in transformers' continuous batching; a small pool of pages."""
    results = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=4, eos_token_id=-1, pad_token_id=0, do_sample=False),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
        warmup=False,
    )
    return [(list(found.generated_tokens), found.error) for _, found in sorted(results.items())]


def test_continuous_batching_has_no_pictures():
    """Prompts of words run as in the plain model. One with a picture's places is refused: transformers hands on no pixels, so
    that neither the model nor the recipe would see the picture, and nobody would say so."""
    model = build("llava", "sdpa")  # transformers changes its attention
    texts = [make_inputs("llava", [[part]])["input_ids"][0].tolist() for part in ("text9", "text5")]
    pictured = make_inputs("llava", BATCHES["one"])["input_ids"][0].tolist()
    plain = served(model, texts)
    with vp.wrap(model, "random:layer=0|2,fraction=0.5|0.3 + zerotuning:gain=2"):
        assert served(model, texts) == plain
        [(tokens, error)] = served(model, [pictured])
    assert all(len(tokens) == 4 for tokens, _ in plain)
    assert not tokens
    assert "hands LlavaForConditionalGeneration token ids only, and no pictures" in error
    assert "\n" not in error
