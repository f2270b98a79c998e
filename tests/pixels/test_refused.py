"""What cannot prune before the vision tower gets one sentence, before the model is touched, or before the tower runs."""

from __future__ import annotations

import pytest
import torch
from families import configs
from families.table import BATCHES, build, make_inputs, shared
from pixels.pictures import repetitive

import vlmprune as vp
from vlmprune.schedule import Budget, Schedule, Stage

pytestmark = pytest.mark.usefixtures("no_grad")


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text[-1] in ".?"
    return text


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("fastv:site=pixels,fraction=0.5", "fastv cannot prune before the vision tower: it looks at attention_from_last"),
        ("divprune:site=pixels,fraction=0.5", "divprune cannot prune before the vision tower: it looks at features"),
        ("cls:site=pixels,fraction=0.5", "cls cannot prune before the vision tower"),
        ("mustdrop:site=pixels,fraction=0.5", "mustdrop cannot prune before the vision tower"),
        ("pixelprune:layer=2,fraction=0.5", "pixelprune cannot prune at layer 2: it looks at the pixels of patches"),
        ("pixelprune:site=llm", "pixelprune cannot prune at layer 0: it looks at the pixels of patches"),
        ("pixelprune:tokens=0", "nothing would be kept before the language model"),
        ("random:site=pixels,fraction=0", "nothing would be kept before the language model"),
        ("random:site=pixels,layer=1,fraction=0.5", 'at site="pixels" is before the vision tower and has no layer'),
        ("random:site=pixel,fraction=0.5", "did you mean 'pixels'?"),
        ("uniform:site=vision,fraction=0.5", "uniform cannot prune in the vision tower"),
        ("pixelprune:tolerance=-1", "tolerance must be a number in [0, 2]"),
        ("pixelprune:tolerance=3", "tolerance must be a number in [0, 2]"),
        ("pixelprune + random:site=pixels,fraction=0.5", "pixelprune and random both prune at the vision tower's input"),
        ("random:site=pixels,fraction=0.5 + fastv:layer=2,fraction=0.7", "a later stage cannot keep more"),
    ],
)
def test_recipes(recipe, words):
    """Without a model. Red: a recipe that cannot work is found out at the first picture, or never."""
    with pytest.raises(vp.UsageError) as error:
        vp.Recipe.of(recipe)
    assert words in sentence(error)


@pytest.mark.parametrize("recipe", ["random:fraction=0.5,site=pixels", "uniform:tokens=7,site=pixels", "pixelprune:tokens=9"])
def test_the_site_is_written_and_read(recipe):
    """String, JSON and Python mean the same."""
    method = vp.Recipe.of(recipe)
    assert str(method) == recipe
    assert vp.Recipe.from_dict(method.to_dict()) == method
    assert [stage.site for stage, _ in method.stages()] == ["pixels"]


def test_the_site_in_python():
    assert vp.Random(site="pixels", fraction=0.5) == vp.Random(schedule=Schedule((Stage(0, Budget(fraction=0.5), "pixels"),)))
    assert vp.FlowCut(site="vision", tokens=9) == vp.FlowCut(tokens=9)
    with pytest.raises(vp.UsageError, match="only one of these"):
        vp.Random(site="pixels", schedule=vp.at(0, tokens=4))


@pytest.mark.parametrize("name", ["internvl", "llava_onevision", "gemma3", "idefics3", "mistral3", "fast_vlm"])
def test_a_family_whose_patches_are_not_known(name):
    model = shared(name)
    with pytest.raises(vp.UsageError) as error:
        vp.wrap(model, "pixelprune")
    assert "how patches enter that of" in sentence(error)
    assert not model.model._forward_pre_hooks


def test_patches_that_overlap():
    """Read from the patch embedding itself. Red: a dropped patch's pixels live on in its neighbours."""
    model = build("llava")
    tower = model.model.vision_tower.embeddings
    tower.patch_embedding = torch.nn.Conv2d(3, configs.TOWER, kernel_size=7, stride=4, padding=3, bias=False)
    with pytest.raises(vp.UsageError) as error:
        vp.wrap(model, "pixelprune")
    assert "a kernel of 7×7, a stride of 4×4 and a padding of 3×3" in sentence(error)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("vision_feature_select_strategy", "full", "keeps a token that is no patch"),
        ("vision_feature_layer", [-1, -2], "several tower layers"),
        ("vision_feature_layer", 0, "the tower's embeddings"),
    ],
)
def test_visual_tokens_that_are_no_patches(setting, value, words):
    model = build("llava")
    setattr(model.config, setting, value)
    with pytest.raises(vp.UsageError) as error:
        vp.wrap(model, "random:site=pixels,fraction=0.5")
    assert words in sentence(error)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_features_that_were_encoded_elsewhere(name):
    """Red: the un-pruned features of a picture pass for pruned ones, and nothing is dropped."""
    model, inputs = shared(name), repetitive(name, BATCHES["pictures"])
    given = {key: inputs.pop(key) for key in ("pixel_values", "image_grid_thw") if key in inputs}
    encoded = model.model.get_image_features(**given, return_dict=True)
    if "image_grid_thw" in given:
        inputs["image_grid_thw"] = given["image_grid_thw"]
    with vp.wrap(model, "pixelprune"), pytest.raises(vp.UsageError) as error:
        model(**inputs, mm_encoder_outputs={"image": encoded})
    assert "pass pixel_values instead of encoded features" in sentence(error)


def test_a_video():
    """Qwen's towers take its frames as one entry of the grid."""
    model, inputs = shared("qwen2_vl"), make_inputs("qwen2_vl", BATCHES["one"])
    grid = inputs["image_grid_thw"] * torch.tensor([2, 1, 1])
    pixels = inputs["pixel_values"].repeat(2, 1)
    with vp.wrap(model, "pixelprune") as run, pytest.raises(vp.UsageError) as error:
        model.model.visual(pixels, grid_thw=grid)
    assert "found a video of 2 frames" in sentence(error)
    with vp.wrap(model, "pixelprune") as run, run.override(enabled=False):
        model.model.visual(pixels, grid_thw=grid)


class Nothing(vp.Pruner):
    name, paper, needs = "nothing of the pixels", "", frozenset({"pixels"})
    default = Schedule((Stage(0, Budget(fraction=0.5), "pixels"),))
    adaptive = True

    def select(self, see, keep):
        return vp.Choice([see.position[0, :0]] * see.images)


class Merging(Nothing):
    name = "merging of the pixels"
    adaptive = False

    def select(self, see, keep):
        index = see.position[:, :keep]
        return vp.Choice(index, features=torch.zeros(*index.shape, 32))


@pytest.mark.parametrize(("method", "words"), [(Nothing(), "kept nothing of a picture"), (Merging(), "nothing can be merged")])
def test_methods_of_your_own(method, words):
    model, inputs = shared("qwen2_vl"), make_inputs("qwen2_vl", BATCHES["one"])
    stock = model(**inputs).logits
    with vp.wrap(model, method), pytest.raises(vp.UsageError) as error:
        model(**inputs)
    assert words in sentence(error)
    assert torch.equal(model(**inputs).logits, stock)
