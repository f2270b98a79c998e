"""Models of open_clip and timm in which nothing can be dropped, and what can go wrong in others."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
from image_towers.open_clip_towers import TEXT, native, of_timm
from image_towers.towers import PATCH, pictures
from open_clip.model import CLIP

import vlmprune as vp

RECIPE = "divprune:layer=2,tokens=6"


def test_resnet():
    model = CLIP(16, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None}, TEXT)
    with pytest.raises(vp.UsageError, match=r"\(ModifiedResNet\) has no blocks through which patches go"):
        vp.wrap(model, RECIPE)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("convnext_atto", "has no list of blocks"),
        ("deit_tiny_distilled_patch16_224", r"\(VisionTransformerDistilled\) has a way of its own to run its blocks"),
        ("vit_relpos_small_patch16_224", r"has blocks of a kind that is not known \(RelPosBlock\)"),
    ],
)
def test_towers_of_timm(name, sentence):
    with pytest.raises(vp.UsageError, match=sentence):
        vp.wrap(timm.create_model(name), RECIPE)


def test_registers():
    """A CLS token among registers is not looked at; methods that need none run."""
    model = timm.create_model("vit_small_patch14_reg4_dinov2", depth=3, img_size=56)
    with pytest.raises(vp.UsageError, match="it has 5 tokens before its patches"):
        vp.wrap(model, "flowcut:tokens=6")
    with vp.wrap(model.eval(), "divprune:layer=1,tokens=6") as run, torch.no_grad():
        model(torch.randn(1, 3, 56, 56))
        assert run.report().entering == (21, 11, 11)


def test_patch_dropout_in_training():
    model = native(patch_dropout=0.5)().train()
    with vp.wrap(model, RECIPE), pytest.raises(vp.UsageError, match=r"patch dropout is on in training; call model.eval\(\)"):
        model.encode_image(pictures(1))


def test_other_sizes_and_intermediates():
    model = native()().eval()
    with vp.wrap(model, RECIPE) as run, torch.no_grad():
        with pytest.raises(vp.UsageError, match="takes pictures of 48 × 48 pixels, found 64 × 64"):
            model.encode_image(torch.zeros(1, 3, 64, 64))
        with pytest.raises(vp.UsageError, match=r"called by itself \(as in forward_intermediates\)"):
            model.visual.forward_intermediates(pictures(1))
        run.enabled = False
        model.visual.forward_intermediates(pictures(1))


def test_pictures_that_the_tower_pads():
    """Red: patch dropout is blamed alone."""
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=3, img_size=64, dynamic_img_size=True, dynamic_img_pad=True, num_classes=0
    ).eval()
    with vp.wrap(model, "tome:layer=1,tokens=4") as run, torch.no_grad():
        with pytest.raises(vp.UsageError, match=r"pads pictures \(dynamic_img_pad\): give them sides that are multiples"):
            model(torch.randn(1, 3, 66, 64))
        model(torch.randn(1, 3, 96, 64))
        assert run.report().entering == (25, 5, 5)


def test_blocks_are_wrapped_once():
    """Red: a ViT of timm drops twice, once as `visual.trunk` and once as `visual`; the second pass ends in an IndexError."""
    model = of_timm("vit_base_patch16_224", "token", patch_size=PATCH)().eval()
    for first, second in ((model, model.visual.trunk), (model.visual.trunk, model)):
        with vp.wrap(first, RECIPE), pytest.raises(vp.UsageError, match="wrapped already, as those of a module around it"):
            vp.wrap(second, RECIPE)
    for part in (model, model.visual):  # the same tower: the last recipe replaces the first
        run = vp.wrap(part, RECIPE)
    run.remove()
    assert "forward" not in vars(model.visual)


def test_gradient_checkpointing():
    model = native()().train()
    model.set_grad_checkpointing()
    with vp.wrap(model, RECIPE), pytest.raises(vp.UsageError, match="gradient checkpointing runs the blocks"):
        model.encode_image(pictures(1))


def test_attention_that_cannot_be_seen(monkeypatch):
    """timm computes attention by hand if it is told so."""
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64).eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    with (
        vp.wrap(model, "cls:layer=1,tokens=4"),
        torch.no_grad(),
        pytest.raises(vp.UsageError, match="the attention of block 0"),
    ):
        model(torch.randn(1, 3, 64, 64))


def test_text_towers_are_left_alone():
    model = native()().eval()
    ids = torch.randint(0, 64, (2, 8))
    with torch.no_grad():
        plain = model.encode_text(ids)
        with vp.wrap(model, RECIPE):
            assert torch.equal(model.encode_text(ids), plain)


def test_whatever_carries_the_tower():
    """A model, its `visual`, and a model of timm are wrapped alike."""
    assert open_clip.__version__
    model = native()().eval()
    with torch.no_grad():
        with vp.wrap(model, RECIPE):
            expected = model.encode_image(pictures(2))
        with vp.wrap(model.visual, RECIPE):
            assert torch.equal(model.encode_image(pictures(2)), expected)
        trunk = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64, num_classes=0).eval()
        with vp.wrap(trunk, "tome:layer=1,tokens=4") as run:
            trunk(torch.randn(1, 3, 64, 64))
            assert run.report().entering == (17, 5, 5)
