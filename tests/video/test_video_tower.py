"""What methods see of a video's frames inside the vision tower, where squares of patches become one token."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from families.configs import PATCH, POOLED_SIDE
from families.table import ALL_FRAMES, BATCHES, build, make_inputs, shared

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")

SEEN: list = []


@dataclass(frozen=True, kw_only=True)
class LooksInside(vp.Pruner):
    """Keeps the first tokens, and tells what it saw."""

    name = "looks_inside"
    paper = "a test"
    needs = frozenset({"attention_from_cls", "tower_keys", "tower_features", "cell", "features", "project"})
    default = vp.at(layer=0, fraction=0.5)

    def select(self, see, keep):
        SEEN.append(see)
        return torch.arange(keep).expand(see.images, keep)


def over_squares(x: torch.Tensor) -> torch.Tensor:
    """`[frame, token, …]` means over 2 × 2 patches, one loop at a time."""
    half = POOLED_SIDE // 2
    tokens = []
    for row in range(half):
        for column in range(half):
            patches = [(2 * row + i) * POOLED_SIDE + 2 * column + j for i in (0, 1) for j in (0, 1)]
            tokens.append(x[:, patches].mean(dim=1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("batch", ["video", "two videos"])
def test_attention_of_the_cls_token_is_the_mean_of_the_patches_of_a_token(batch):
    """Red: a token gets the attention to patches of another one, or of another frame."""
    SEEN.clear()
    model, inputs = build("llava_next_video", "eager"), make_inputs("llava_next_video", BATCHES[batch])
    with vp.wrap(model, LooksInside()):
        model(**inputs)
    pixels = inputs["pixel_values_videos"].flatten(0, 1)
    assert pixels.shape[1:] == (3, POOLED_SIDE * PATCH, POOLED_SIDE * PATCH)
    stock = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    attention = over_squares(stock.attentions[-2][:, :, 0, 1:].transpose(1, 2))  # of the block that feeds the projector
    wanted = attention.view(-1, ALL_FRAMES * 4, attention.shape[-1]).transpose(1, 2)
    (see,) = SEEN
    assert see.frames == ALL_FRAMES
    torch.testing.assert_close(see.attention_from_cls, wanted, atol=2e-6, rtol=0)
    features = over_squares(stock.hidden_states[-2][:, 1:]).view(-1, ALL_FRAMES * 4, stock.hidden_states[-2].shape[-1])
    torch.testing.assert_close(see.tower_features, features, atol=2e-6, rtol=0)
    torch.testing.assert_close(see.project(see.tower_features), see.features, atol=2e-6, rtol=0)
    assert torch.equal(see.cell, torch.arange(4).repeat(ALL_FRAMES).expand(see.images, -1))
    assert see.side == POOLED_SIDE // 2


def test_a_method_that_judges_crops_judges_frames():
    """Before the language model, `cls` compares attention within a frame, and each frame keeps its share."""
    model, inputs = shared("llava_next_video"), make_inputs("llava_next_video", BATCHES["two videos"])
    with vp.wrap(model, "cls:layer=0,tokens=6", explain=True) as run:
        model(**inputs)
        assert [kept.by_frame for kept in run.last.kept] == [(2,) * ALL_FRAMES] * 2
        assert "in frame 1 (of 3)" in str(run.explain(image=1, token=5))


def test_a_picture_beside_a_video_keeps_its_own_patches():
    """Red: patches of a picture are averaged as those of a video are."""
    SEEN.clear()
    model, inputs = shared("llava_next_video"), make_inputs("llava_next_video", BATCHES["picture, video"][:1])
    with vp.wrap(model, LooksInside()):
        model(**inputs)
    assert sorted(see.side for see in SEEN) == [POOLED_SIDE // 2, POOLED_SIDE]


def test_dropping_patches_of_a_video_is_refused_where_its_tokens_need_all():
    model, inputs = shared("llava_next_video"), make_inputs("llava_next_video", BATCHES["video"])
    stock = model(**inputs).logits
    with vp.wrap(model, "flowcut:tokens=2"), pytest.raises(vp.UsageError) as refusal:
        model(**inputs)
    assert "flowcut drops patches in the vision tower, but squares of a video's patches become" in str(refusal.value)
    with vp.wrap(model, "flowcut:fraction=1.0"):
        assert torch.equal(model(**inputs).logits, stock)
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5"])
def test_a_budget_inside_the_tower_is_that_of_a_frame(name):
    """There, every frame is a picture of its own: FlowCut leaves twice the budget, four of each."""
    model, inputs = shared(name), make_inputs(name, BATCHES["videos, ragged"])
    with vp.wrap(model, "flowcut:tokens=2") as run:
        model(**inputs)
        inside = [kept for kept in run.last.kept if kept.site == "vision"]
    assert len(inside) == 4
    assert all(kept.by_frame == (4,) * kept.frames for kept in inside)
