"""A relevance that a recipe names: written in strings and files, loaded when wrapping, refused in one sentence."""

from __future__ import annotations

import sys

import pytest
import torch
from methods.clip import clip, tokenizer
from transformers import CLIPImageProcessor

import vlmprune as vp
from vlmprune import tiny
from vlmprune.loading import relevances
from vlmprune.tiny.scenes import make_scene

NAME = "open_clip:ViT-B-32/laion2b_s34b_b79k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP model of the embedded model's width, saved with its tokenizer."""
    place = tmp_path_factory.mktemp("clip")
    clip(tiny.load("cpu")[0].config.vision_config.hidden_size).save_pretrained(place)
    tokenizer(marks=True).save_pretrained(place)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(place)
    return place


@pytest.mark.parametrize("name", [NAME, "open_clip:local-dir:/some/where", "clip:openai/clip-vit-large-patch14-336"])
def test_strings_and_files_hold_a_name(name):
    recipe = vp.Recipe.parse(f"cdpruner:tokens=64,relevance={name} + random:layer=4,fraction=0.1,seed=0")
    assert recipe.methods[0].relevance == name
    assert vp.Recipe.parse(str(recipe)) == vp.Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.to_dict()["methods"][0]["relevance"] == name


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ViT-B-32", "relevance must be a function or the name of a model, found 'ViT-B-32': write open_clip:NAME/PRETRAINED"),
        ("open_clip:", "must be a function or the name of a model, found 'open_clip:'"),
        ("openclip:ViT-B-32/openai", "must be a function or the name of a model, found 'openclip:ViT-B-32/openai'"),
    ],
)
def test_names_that_are_none(name, sentence):
    """When the recipe is read, and not at the first prompt."""
    with pytest.raises(vp.UsageError) as error:
        vp.Recipe.parse(f"cdpruner:relevance={name}")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_a_folder_that_is_named_is_the_model_that_is_passed(folder):
    """Red: another model, another tokenizer or another question is used than in Python; or the handle forgets the name."""
    model, processor = tiny.load("cpu")
    inputs = processor(images=make_scene(1).image, text=tiny.prompt("what colour is the circle ?"), return_tensors="pt")
    kept = []
    given = vp.ClipRelevance(clip(model.config.vision_config.hidden_size), tokenizer(marks=True), processor)
    recipe = f"cdpruner:tokens=20,relevance=clip:{folder}"
    for method in (vp.CDPruner(tokens=20, relevance=given), recipe, vp.CDPruner(tokens=20)):
        with vp.wrap(model, method) as run:
            model(**inputs)
            kept.append(run.last.kept[0].index.tolist())
            if method == recipe:
                assert str(run.recipe) == str(vp.Recipe.parse(recipe))
                assert "cdpruner (ClipRelevance)" in str(run.report())
    assert kept[0] == kept[1] != kept[2]


def test_it_is_loaded_once_for_a_command(folder, monkeypatch):
    model, _ = tiny.load("cpu")
    relevances._opened.cache_clear()
    loads = []
    read = relevances.load_image_text
    monkeypatch.setattr(relevances, "load_image_text", lambda *args: loads.append(args) or read(*args))
    for _ in range(3):
        vp.wrap(model, f"cdpruner:relevance=clip:{folder}").remove()
    assert len(loads) == 1


def test_a_tower_without_cls_is_refused_before_anything_is_loaded(monkeypatch):
    from tiny_models import shared

    monkeypatch.setattr(relevances, "load_image_text", lambda *args: pytest.fail("it was loaded"))
    with pytest.raises(
        vp.UsageError, match="relevance compares what a CLIP tower made of each patch, but its vision tower has no"
    ):
        vp.wrap(shared("qwen2_vl"), f"cdpruner:relevance={NAME}")


def refused(model, name: str) -> str:
    relevances._opened.cache_clear()
    with pytest.raises(vp.UsageError) as error:
        vp.wrap(model, f"cdpruner:relevance={name}")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_that_says_nothing_of_its_tokenizer(folder):
    from tiny_models import shared

    assert "needs the tokenizer of the wrapped model, which was not loaded" in refused(shared("llava"), f"clip:{folder}")


def test_another_width_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    clip(16).save_pretrained(tmp_path)
    assert "with a CLIP model whose patches have 16" in refused(tiny.load("cpu")[0], f"clip:{tmp_path}")


def test_a_tokenizer_of_more_words_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    longer = tokenizer(marks=True)
    longer.add_tokens([f"word{number}" for number in range(100)])
    longer.save_pretrained(tmp_path)
    assert "clip_tokenizer knows 359 tokens, but the CLIP model reads 300" in refused(tiny.load("cpu")[0], f"clip:{tmp_path}")


def test_siglip_has_no_embedding_of_a_patch():
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SiglipModel(
        SiglipConfig(text_config=sizes | {"vocab_size": 9}, vision_config=sizes | {"image_size": 16, "patch_size": 8})
    )
    with pytest.raises(
        vp.UsageError, match="SiglipModel pools the patches of a picture by attention, so that one patch has no"
    ):
        vp.CDPruner(relevance=vp.ClipRelevance(model, tokenizer(), tokenizer()))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "clip:openai/clip-vit-base-patch32",
            "no model at 'openai/clip-vit-base-patch32': there is no such folder, the hub cannot be",
        ),
        ("clip:no/such/folder", "there is no such folder"),
    ],
)
def test_without_a_network(name, sentence, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert sentence in refused(tiny.load("cpu")[0], name)


def test_a_model_that_is_no_clip(tmp_path):
    from vlmprune.tiny import CHECKPOINT

    assert "is no model of pictures and texts, found a 'llava'" in refused(tiny.load("cpu")[0], f"clip:{CHECKPOINT}")


def test_without_open_clip(monkeypatch):
    monkeypatch.setattr("vlmprune.loading.image_text.find_spec", lambda name: None)
    said = refused(tiny.load("cpu")[0], NAME)
    assert said == f"{NAME!r} needs the package open_clip: install it with `pip install vlmprune[open_clip]`."


def test_a_torchvision_that_does_not_fit(monkeypatch, tmp_path):
    """As the one of PyPI beside a torch for CPUs: its import fails deep inside."""
    (tmp_path / "open_clip.py").write_text("import torchvision")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    relevances._opened.cache_clear()
    from vlmprune.loading.image_text import load_image_text

    with pytest.raises(
        vp.UsageError, match=r"torchvision is installed but does not fit this torch \(operator torchvision::nms does"
    ):
        load_image_text(NAME, "cpu")
