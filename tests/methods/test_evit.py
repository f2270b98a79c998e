"""EViT: the loops of its paper by hand, and the method against them, alone and in the towers of models."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from methods.comparing import close, pictures, select
from methods.loops import plain
from methods.loops.evit import evit_clip, evit_counts, evit_step
from methods.views import random_view
from transformers import CLIPVisionConfig, CLIPVisionModel

import vlmprune as vp
from vlmprune.methods.tower import Block, TowerState
from vlmprune.view import TowerFacts

CLIP = TowerFacts(cls=True, blocks=12)


def test_counts_of_the_loops():
    """Officially 138, 98 and 70 of 196 stay (each ⌈0.7 n⌉, and one more); here the share is the same, and exact at the end."""
    assert evit_counts(196, 67, 3) == [137, 96, 67]
    assert evit_counts(196, 49, 1) == [49]
    assert evit_counts(5, 9, 2) == [5, 5]
    assert evit_counts(4, 1, 3) == [3, 2, 1]


def test_a_step_by_hand():
    hidden = [[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [4.0, 8.0]]
    attention = [0.1, 0.4, 0.05, 0.2]
    assert evit_step(attention, hidden, 3, "no") == ([0, 1, 3], [[1.0, 0.0], [0.0, 1.0], [4.0, 8.0]])
    ids, left = evit_step(attention, hidden, 3, "sum")  # patch 0 is the highest of those that do not stay
    assert ids == [0, 1, 3]
    assert left[0] == pytest.approx([0.1 * 1 + 0.05 * 2, 0.05 * 2])
    assert left[1:] == [[0.0, 1.0], [4.0, 8.0]]
    assert evit_step(attention, hidden, 3, "mean")[1][0] == pytest.approx([0.2 / 0.15, 0.1 / 0.15])
    assert evit_step(attention, hidden, 1, "sum") == ([1], [[0.0, 1.0]])


@pytest.mark.parametrize("fuse", ["sum", "mean", "no"])
@pytest.mark.parametrize("target", [1, 2, 5, 20])
@pytest.mark.parametrize("padded", [False, True])
def test_evit_step(target, fuse, padded):
    """Behind each of its blocks: counts, choice and the fused patch, of every crop as if it were alone."""
    draw = torch.Generator().manual_seed(target)
    crops, patches, heads = 3, 25, 2
    method = vp.EViT(tokens=target, fuse=fuse, blocks=[1, 4])
    for block, steps in ((1, 2), (4, 1)):
        valid = torch.arange(patches) >= torch.tensor([0, 3, 8])[:, None] if padded else None
        state = TowerState(CLIP, target, torch.arange(patches).expand(crops, -1), 5, valid)
        q, k, v = (torch.randn(crops, heads, 1 + patches, 4, generator=draw) for _ in range(3))
        seen = None if valid is None else torch.nn.functional.pad(valid, (1, 0), value=True)
        method.watch(Block(block, 11, q, k, v, 0.5, True, seen), state)
        hidden = torch.randn(crops, patches, 3, generator=draw)
        stays, found = method.drop(block, 11, hidden, state)
        for crop in range(crops):
            real = list(range(patches)) if valid is None else valid[crop].nonzero()[:, 0].tolist()
            rows = [
                plain.softmax(
                    [0.5 * plain.dot(q[crop, h, 0].tolist(), k[crop, h, j].tolist()) for j in (0, *(1 + r for r in real))]
                )
                for h in range(heads)
            ]
            attention = [plain.mean([row[1 + j] for row in rows]) for j in range(len(real))]
            leave = evit_counts(len(real), target, steps)[0]
            ids, left = evit_step(attention, hidden[crop, real].tolist(), leave, fuse)
            assert stays[crop].nonzero()[:, 0].tolist() == [real[j] for j in ids]
            close(found[crop, stays[crop]], torch.tensor(left))


def test_evit_looks_at_its_own_blocks_only():
    """Red: all blocks are watched, which costs time; or other ones than a quarter, half and three quarters."""
    assert [index for index in range(12) if vp.EViT().watches_block(index, 11)] == [3, 6, 9]
    assert [index for index in range(16) if vp.EViT().watches_block(index, 15)] == [4, 8, 12]
    assert [index for index in range(24) if vp.EViT().watches_block(index, 22)] == [5, 11, 17]
    assert [index for index in range(9) if vp.EViT(blocks="2|0").watches_block(index, 7)] == [0, 2]
    assert [index for index in range(3) if vp.EViT().watches_block(index, 2)] == [0, 1]
    state = TowerState(CLIP, 2, torch.arange(9).expand(1, -1), 3)
    vp.EViT(blocks=3).watch(Block(2, 11, *(torch.randn(1, 2, 10, 4) for _ in range(3)), 0.5, True, None), state)
    assert state.carried == {}
    assert vp.EViT(blocks=3).drop(2, 11, torch.zeros(1, 9, 3), state) is None


def test_what_is_written():
    """Blocks as a number, a string or a list are the same recipe, which can be written and read."""
    recipes = [vp.Recipe.of(vp.EViT(tokens=9, blocks=blocks)) for blocks in ("6|3", [3, 6], (6, 3), "3|6")]
    assert len(set(recipes)) == 1
    assert str(recipes[0]) == "evit:tokens=9,blocks=3|6"
    assert vp.Recipe.parse("evit:tokens=9,blocks=3|6") == vp.Recipe.from_dict(recipes[0].to_dict()) == recipes[0]
    assert (
        vp.Recipe.parse("evit:blocks=3")
        == vp.Recipe.of(vp.EViT(blocks=3))
        == vp.Recipe.from_dict({"schema": 1, "methods": [{"method": "evit", "blocks": [3]}]})
    )


@pytest.mark.parametrize("blocks", ["x", "3|3", -1, 1.5, [], "3||4", None])
def test_blocks_that_are_none(blocks):
    with pytest.raises(vp.UsageError, match=r"blocks must be different whole numbers >= 0, for example 3\|6\|9, found"):
        vp.EViT(blocks=blocks)


# --- in models ---------------------------------------------------------------------------------------------------------
SAMPLES = [["text2", "image", "text3"], ["text4", "image", "image"]]


@pytest.mark.parametrize("fuse", ["sum", "no"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_evit_in_llavas_tower(attn, fuse, monkeypatch):
    """What enters the language model is what loops over one picture in float64 give, behind the projector."""
    model = tiny_models.build("llava", attn)
    tower = model.model.vision_tower
    feature_block = tower.config.num_hidden_layers - 2
    assert feature_block >= 2
    inputs = tiny_models.make_inputs("llava", model, SAMPLES)
    seen = {}

    def enter(_, args, kwargs):
        seen["embeddings"] = kwargs["inputs_embeds"].clone()

    handle = model.model.language_model.register_forward_pre_hook(enter, with_kwargs=True)
    method = vp.EViT(tokens=5, blocks=[0, feature_block - 1], fuse=fuse)
    with vp.wrap(model, method) as run, torch.no_grad():
        model(**inputs)
    handle.remove()
    pictures_ = inputs["pixel_values"]
    expected = [evit_clip(tower, pixels, 5, feature_block, [0, feature_block - 1], fuse) for pixels in pictures_]
    assert [kept.index.tolist() for kept in run.last.kept] == [ids for ids, _ in expected]
    for picture, (ids, features) in enumerate(expected):
        row = [0, 1, 1][picture]
        places = (inputs["input_ids"][row] == model.config.image_token_id).nonzero()[:, 0]
        own = places[16 * (picture == 2) :][:16]
        with torch.no_grad():
            projected = model.model.multi_modal_projector(features[None].float())[0]
        torch.testing.assert_close(seen["embeddings"][row, own[ids]], projected, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("fuse", ["sum", "no"])
def test_evit_in_an_image_tower(fuse):
    """A CLIP tower alone: what leaves its last block is what the loops give, of every picture of a batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, image_size=48, patch_size=8
            )
        ).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.3)
        pixels = torch.randn(3, 3, 48, 48)
    with vp.wrap(model, vp.EViT(tokens=7, fuse=fuse)) as run, torch.no_grad():
        left = model(pixels).last_hidden_state[:, 1:]
    expected = [evit_clip(model, picture, 7, 5, [1, 3, 4], fuse) for picture in pixels]  # quarters of six blocks
    assert [kept.index.tolist() for kept in run.last.kept] == [ids for ids, _ in expected]
    for found, (_, features) in zip(left, expected, strict=True):
        torch.testing.assert_close(found.double(), features, atol=3e-4, rtol=3e-4)
    assert run.last.entering == [37, 37, 22, 22, 13, 8]


@pytest.mark.parametrize(
    ("family", "recipe", "sentence"),
    [
        ("llava", "evit:tokens=4,blocks=99", "behind block 99 nothing is left to save"),
        ("llava", "evit:tokens=4,layer=2", "leave layer out"),
        ("qwen2_vl", "evit:tokens=4", "needs the attention of the vision tower's CLS token"),
        ("llava", "evit:tokens=4 + flowcut:tokens=4", "both prune at the vision tower"),
    ],
)
def test_refused(family, recipe, sentence):
    with pytest.raises(vp.UsageError, match=sentence) as error:
        vp.wrap(tiny_models.shared(family), recipe)
    assert "\n" not in str(error.value)


def test_crops_are_shared_out_by_attention():
    see = random_view(layer=0)
    expected = [
        plain.top([plain.mean(column) for column in zip(*own.attention_from_cls.tolist(), strict=True)], 4)
        for own in pictures(see)
    ]
    assert select(vp.EViT(), see, 4)[0] == expected
