"""Relevance from models of open_clip: equal to that of the same model in transformers, and refused where it cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import open_clip
import pytest
import torch
from image_towers.converted import converted, own_tokenizer, saved, small
from methods.clip import TEMPLATES, ids
from methods.clip import tokenizer as bytes_tokenizer

import vlmprune as vp
from vlmprune import tiny
from vlmprune.loading.image_text import load_image_text
from vlmprune.tiny.scenes import make_scene

QUESTIONS = ["What is this?", "Where is the red circle, and what stands to the left of it in the picture?", "word " * 100]


@pytest.mark.parametrize("kind", ["ViT", "quick GELU", "average pooling"])
def test_relevance_equals_that_of_the_converted_model(kind):
    """To 1e-6, for short questions and for one of several pieces."""
    model, words = small(kind), open_clip.get_tokenizer("ViT-B-32")
    clip, clip_words = converted(model), own_tokenizer()
    patches = torch.randn(2, 25, 64, generator=torch.Generator().manual_seed(0))
    for question in QUESTIONS:
        row = ids("x")[None].expand(2, -1)
        found, expected = (
            vp.ClipRelevance(*parts, bytes_tokenizer(TEMPLATES["llava"]), question=question)(patches, row, row >= 0)
            for parts in ((model, words), (clip, clip_words))
        )
        assert found.std() > 1e-3, "the test is blind"
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_patch_is_embedded_as_the_model_embeds_its_cls_token():
    """What is compared with texts is what `encode_image` makes of the CLS token that leaves the blocks."""
    model = small("ViT")
    left = []
    handle = model.visual.transformer.register_forward_hook(lambda module, args, output: left.append(output))
    image = model.encode_image(torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1)), normalize=True)
    handle.remove()
    relevance = vp.ClipRelevance(model, open_clip.get_tokenizer("ViT-B-32"), bytes_tokenizer(), question="a red circle")
    text = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a red circle"]), normalize=True)
    row = ids("x")[None].expand(2, -1)
    torch.testing.assert_close(relevance(left[0][:, :1], row, row >= 0), -(image @ text.T), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_recipe_names_a_folder_of_open_clip(tmp_path):
    """The same choice as with the model passed in Python."""
    model, processor = tiny.load("cpu")
    clip = small("ViT", width=model.config.vision_config.hidden_size)
    inputs = processor(images=make_scene(1).image, text=tiny.prompt("what colour is the circle ?"), return_tensors="pt")
    given = vp.ClipRelevance(clip, open_clip.get_tokenizer("ViT-B-32"), processor)
    kept = []
    for method in (vp.CDPruner(tokens=20, relevance=given), f"cdpruner:tokens=20,relevance=open_clip:{saved(clip, tmp_path)}"):
        with vp.wrap(model, method) as run:
            model(**inputs)
            kept.append(run.last.kept[0].index.tolist())
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("open_clip:ViT-B-23/openai", "unknown model of open_clip 'ViT-B-23': did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32/laion", "unknown weights of ViT-B-32 in open_clip 'laion': "),
        ("open_clip:ViT-B-32", "'open_clip:ViT-B-32' names no weights, so that they would be random: write"),
        ("open_clip:local-dir:/no/such", "no model at 'open_clip:local-dir:/no/such': the folder has no open_clip_config.json"),
        (
            "open_clip:ViT-B-32/laion2b_s34b_b79k",
            "no model at 'laion/CLIP-ViT-B-32-laion2B-s34B-b79K': there is no such folder, the hub",
        ),
        (
            "open_clip:hf-hub:someone/something",
            "no model at 'someone/something': there is no such folder, the hub cannot be asked",
        ),
    ],
)
def test_what_cannot_be_loaded(name, sentence, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(vp.UsageError) as error:
        load_image_text(name, "cpu")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_torchvision_that_does_not_fit(monkeypatch, tmp_path):
    (Path(tmp_path) / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision")
    with pytest.raises(
        vp.UsageError, match=r"torchvision is installed but does not fit this torch \(operator torchvision::nms does"
    ):
        load_image_text("open_clip:ViT-B-32/openai", "cpu")


def of(clip, words):
    return lambda: vp.CDPruner(relevance=vp.ClipRelevance(clip, words, bytes_tokenizer()))


def test_what_does_not_fit():
    words, model = open_clip.get_tokenizer("ViT-B-32"), small("ViT")
    few = small("ViT", vocabulary=100)
    for make, sentence in (
        (lambda: vp.CDPruner(relevance=model), "found the model CLIP: pass vlmprune.ClipRelevance(clip"),
        (of(model, bytes_tokenizer()), "clip_tokenizer must be the tokenizer of the open_clip model"),
        (of(model, None), "clip_tokenizer must be the tokenizer of the open_clip model, found None"),
        (of(few, words), "clip_tokenizer knows 49408 tokens, but the CLIP model reads 100"),
        (of(small("ResNet"), words), "with the image tower ModifiedResNet, which has no visual.ln_post and visual.proj"),
    ):
        with pytest.raises(vp.UsageError) as error:
            make()
        assert sentence in str(error.value)
    model, _ = tiny.load("cpu")
    with pytest.raises(vp.UsageError, match="with a CLIP model whose patches have 48"):
        vp.wrap(model, of(small("ViT", width=48), words)())
