"""The shipped model for clips is small, is what PROVENANCE.json says, and loses answers where a method drops a moment."""

from __future__ import annotations

import json

import pytest
import torch

import vlmprune
from vlmprune.evals.asking import Asking
from vlmprune.evals.questions import open_questions
from vlmprune.evals.scorers import score
from vlmprune.loading.models import open_model
from vlmprune.tiny import CHECKPOINT, CLIPS_CHECKPOINT, load, load_for_clips
from vlmprune.tiny.clip_model import build_clip_tokenizer
from vlmprune.tiny.clip_questions import CLIP_SKILLS
from vlmprune.tiny.clips import make_clip


@pytest.fixture(scope="module")
def loaded():
    processor, read_weights = open_model("tiny-clips", "cpu")
    return read_weights(), processor


@pytest.fixture(scope="module")
def asking(loaded):
    return Asking(loaded[1], open_questions("clips", 12, split="dev"), 32, encode_once=True)


def right(model, asking, recipe: str | None = None) -> dict[str, float]:
    """Share of right answers by skill."""
    given: dict[int, str] = {}
    run = vlmprune.wrap(model, recipe) if recipe else None
    for number, batch in enumerate(asking.batches):
        given |= dict(zip(batch, asking.measure_batch(model, number, run).given, strict=True))
    if run is not None:
        run.remove()
    scores = {skill: [score(given[n], q) for n, q in enumerate(asking.questions) if q.group == skill] for skill in CLIP_SKILLS}
    return {skill: sum(own) / len(own) for skill, own in scores.items()}


def test_it_is_small_and_stock(loaded) -> None:
    assert sum(file.stat().st_size for file in CLIPS_CHECKPOINT.iterdir()) < 8_000_000
    model, processor = loaded
    assert type(model).__module__ == "transformers.models.llava_next_video.modeling_llava_next_video"
    assert processor.tokenizer.get_vocab() == build_clip_tokenizer().get_vocab()
    settings = json.loads((CLIPS_CHECKPOINT / "processor_config.json").read_text())
    assert settings["processor_class"] == "LlavaNextVideoProcessor"
    assert settings["video_processor"]["image_mean"] == list(processor.image_processor.image_mean)


def test_it_takes_no_pictures(loaded) -> None:
    with pytest.raises(vlmprune.UsageError, match="was never shown pictures, and its processor takes none: show it a video"):
        loaded[1](text="<image>\nwhat ?", images=make_clip(0).frames()[0], return_tensors="pt")


def test_clips_of_different_lengths_are_not_one_batch(loaded) -> None:
    frames = list(make_clip(0).frames())
    with pytest.raises(ValueError, match="need the same number of frames, found 8, 4; ask one at a time"):
        loaded[1](text=["<video> what ?"] * 2, videos=[frames, frames[:4]], padding=True, return_tensors="pt")


def test_its_tower_is_the_picture_models(loaded) -> None:
    theirs = {name: weight for name, weight in load()[0].state_dict().items() if "vision_tower" in name}
    ours = loaded[0].state_dict()
    assert theirs
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_it_answers_as_well_as_it_says(loaded, asking) -> None:
    said = json.loads((CLIPS_CHECKPOINT / "PROVENANCE.json").read_text())["test"]
    assert set(said) == set(CLIP_SKILLS)
    found = right(loaded[0], asking)
    for skill, share in found.items():
        assert share > said[skill]["value"] - 0.25, (skill, share, said[skill]["value"])
    assert sum(found.values()) / len(found) > 0.75


def test_a_few_tokens_miss_moments(loaded, asking) -> None:
    """Uniform tokens keep a share of each frame; a few of them miss what is seen once."""
    whole, few = right(loaded[0], asking), right(loaded[0], asking, "uniform:tokens=24")
    assert few["moment"] < whole["moment"]


def test_the_embedded_models_are_two(loaded) -> None:
    assert CHECKPOINT != CLIPS_CHECKPOINT
    assert load_for_clips()[0].config.model_type == "llava_next_video"
