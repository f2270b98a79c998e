"""NumPy numbers are numbers, and a method that somebody else wrote is a method: in Python, in strings, in files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_models import make_inputs, shared

import vlmprune as vp
from vlmprune.methods.base import DEFINED

# -- numbers ---------------------------------------------------------------------------------------------------------------

SAME = [
    (lambda: vp.DivPrune(tokens=np.int64(8)), "divprune:tokens=8"),
    (lambda: vp.DivPrune(fraction=np.float32(0.25)), "divprune:fraction=0.25"),
    (lambda: vp.FastV(layer=np.int32(2), fraction=np.float64(0.5)), "fastv:layer=2,fraction=0.5"),
    (
        lambda: vp.Random(schedule=vp.stages({np.int64(1): np.float16(0.5), np.int8(3): np.float32(0.25)})),
        "random:layer=1|3,fraction=0.5|0.25",
    ),
    (lambda: vp.Random(schedule=vp.stages({1: np.int64(9), 3: np.uint8(5)})), "random:layer=1|3,tokens=9|5"),
    (lambda: vp.Random(fraction=0.25, seed=np.int64(3)), "random:fraction=0.25,seed=3"),
    (lambda: vp.DivPrune(tokens=np.array(8), cache_layer=np.int64(-1)), "divprune:tokens=8"),
    (lambda: vp.PAI(alpha=np.float32(0.5), layers=np.int64(2)), "pai:alpha=0.5,layers=2"),
    (lambda: vp.VAR(p=np.float32(0.5), sink_dims=[np.int64(1), np.int64(2)]), "var:p=0.5,sink_dims=1|2"),
    (lambda: vp.ACT(beta=np.float64(0.5), layers=[np.int64(1), 2]), "act:beta=0.5,layers=1|2"),
]


@pytest.mark.parametrize(("make", "text"), SAME, ids=[text for _, text in SAME])
def test_numpy_numbers_are_plain_numbers(make, text, tmp_path):
    """Red: `tokens must be a whole number >= 0, found np.int64(8)`."""
    recipe = vp.Recipe.of(make())
    assert recipe == vp.Recipe.parse(text)
    assert "np." not in repr(recipe)
    recipe.save_pretrained(tmp_path)
    assert vp.Recipe.from_pretrained(tmp_path) == recipe
    assert json.loads((tmp_path / "vlmprune.json").read_text()) == vp.Recipe.parse(text).to_dict()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: vp.DivPrune(tokens=np.bool_(True)), "tokens must be a whole number >= 0, found True"),
        (lambda: vp.DivPrune(tokens=np.float64(8.0)), "tokens must be a whole number >= 0, found 8.0"),
        (lambda: vp.DivPrune(tokens=np.array([8, 9])), "tokens must be a whole number >= 0, found array([8, 9])"),
        (lambda: vp.DivPrune(tokens=np.arange(2000).reshape(2, 1000)), "tokens must be a whole number >= 0, found array([["),
        (lambda: vp.DivPrune(fraction=np.float32("nan")), "fraction must lie in [0, 1], found nan"),
        (lambda: vp.DivPrune(fraction=np.array([0.1, 0.2])), "fraction must be a number in [0, 1], found array([0.1, 0.2])"),
        (lambda: vp.FastV(layer=np.float32(2)), "layer must be a whole number >= 0"),
        (lambda: vp.FastV(layer=np.int64(-1)), "layer must be a whole number >= 0 (0 is before the language model), found -1"),
        (lambda: vp.PAI(alpha=np.bool_(True)), "pai: alpha must be a number in"),
        (lambda: vp.PAI(alpha=np.zeros((40, 40))), "pai: alpha must be a number in"),
        (lambda: vp.VAR(p=np.array([0.1, 0.2])), "var: p must be a number in [0, 1]"),
        (lambda: vp.DivPrune(tokens=torch.tensor([8, 9])), "tokens must be a whole number >= 0, found tensor([8, 9])"),
    ],
)
def test_other_arrays_get_one_sentence(make, sentence):
    with pytest.raises(vp.UsageError) as error:
        make()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@torch.no_grad()
def test_override_with_a_numpy_number():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text3"]])
    with vp.wrap(model, "divprune:fraction=0.5") as run, run.override(tokens=np.int64(3)):
        model(**inputs)
    assert run.report().stages[0].kept == (3,)


# -- a method of one's own -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Corner(vp.ScorePruner):
    """Keeps the first tokens, or the last."""

    name, paper, needs, default = "outer", "", frozenset(), vp.at(0, fraction=0.5)
    last: bool = False
    weight: float = 1.0

    def score(self, see):
        return self.weight * (see.position if self.last else -see.position).float()


@dataclass(frozen=True, kw_only=True)
class Louder(vp.PAI):
    """PAI under a name of its own, with one more parameter."""

    name = "louder"
    more: int = 0


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (Corner(tokens=4, last=True), "outer:tokens=4,last=True"),
        (Corner(layer=2, fraction=0.25, weight=np.float32(0.5)), "outer:layer=2,fraction=0.25,weight=0.5"),
        (Louder(alpha=0.25, more=3), "louder:alpha=0.25,more=3"),
    ],
    ids=["outer", "outer at a layer", "louder"],
)
def test_a_method_of_ones_own_is_saved_and_loaded(method, text, tmp_path):
    """Red: it could be saved, and then nothing could read the file."""
    recipe = vp.Recipe.of(method)
    recipe.save_pretrained(tmp_path)
    assert vp.Recipe.from_pretrained(tmp_path) == recipe
    assert vp.Recipe.parse(text) == recipe
    assert vp.Recipe.parse(str(recipe)) == recipe
    assert vp.Recipe.of(f"{text} + random:layer=4,fraction=0.1").methods[0] == method


@torch.no_grad()
def test_it_runs_by_its_name():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text3"]])
    with vp.wrap(model, "outer:tokens=3,last=True") as run:
        model(**inputs)
    assert run.last.kept[0].index.tolist() == [13, 14, 15]


CODE = """
from dataclasses import dataclass
import vlmprune as vp

@dataclass(frozen=True, kw_only=True)
class Corner(vp.ScorePruner):
    name, paper, needs, default = "outer", "", frozenset(), vp.at(0, fraction=0.5)
    last: bool = False
    weight: float = 1.0
"""


def test_another_process_needs_the_class_and_imports_nothing_by_itself(tmp_path):
    vp.Recipe.of(Corner(tokens=4)).save_pretrained(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    read = f"import vlmprune as vp; print(vp.Recipe.from_pretrained({str(tmp_path)!r}))"
    command = f"import sys; sys.path.append({str(tmp_path)!r})\n"
    done = subprocess.run([sys.executable, "-c", f"{command}import mine; {read}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "outer:layer=0,tokens=4"
    done = subprocess.run([sys.executable, "-c", command + read], capture_output=True, text=True, check=False)
    assert "unknown method 'outer'" in done.stderr
    assert "A method of your own must be imported before its recipe is read." in done.stderr


def test_a_name_that_another_method_has(tmp_path):
    """Red: a subclass without a name of its own was saved as the method it extends, and loaded as that."""

    @dataclass(frozen=True, kw_only=True)
    class Slower(vp.FastV):
        pass

    with pytest.raises(vp.UsageError, match="'fastv' is the name of another method than Slower: give the class a name"):
        vp.Recipe.of(Slower()).save_pretrained(tmp_path)

    class Taken(vp.ScorePruner):
        name, paper, needs, default = "fastv", "", frozenset(), vp.at(2, fraction=0.5)

    assert type(vp.Recipe.parse("fastv").methods[0]) is vp.FastV
    with pytest.raises(vp.UsageError, match="than Taken: give"):
        vp.Recipe.of(Taken()).to_dict()
    del DEFINED["fastv"]


def test_instruments_of_evaluations_are_no_methods():
    from vlmprune.evals.horizon import Only

    with pytest.raises(vp.UsageError, match="unknown method 'only'"):
        vp.Recipe.parse(Only.name)


def test_defining_a_method_again_replaces_it():
    """As in a notebook."""
    made = []
    for number in (1, 2):

        class Again(vp.ScorePruner):
            name, paper, needs, default = "redefined", str(number), frozenset(), vp.at(0, fraction=0.5)

        made.append(Again)
    assert type(vp.Recipe.parse("redefined").methods[0]) is made[1]


# -- relevance -------------------------------------------------------------------------------------------------------------


class Tokenizer:
    model_max_length = 77

    def __call__(self, text, **_):
        return {"input_ids": [1]}

    def decode(self, ids, **_):
        return ""


def clip(width=16):
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPModel(
        CLIPConfig(text_config=sizes | {"vocab_size": 9}, vision_config=sizes | {"image_size": 16, "patch_size": 8})
    )


class Processor(Tokenizer):
    def __init__(self):
        self.image_processor, self.tokenizer = object(), Tokenizer()


class Endless(Tokenizer):
    model_max_length = 10**30


def of_clip(*parts):
    return lambda: vp.ClipRelevance(*parts)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: 3, "relevance must be a function such as ClipRelevance(…), found 3"),
        (lambda: vp.ClipRelevance, "must be a function such as ClipRelevance(…), found <class"),
        (clip, "found the model CLIPModel: pass vlmprune.ClipRelevance(clip, clip_tokenizer, tokenizer)"),
        (lambda: lambda features: features, "relevance is called as relevance(tower_features"),
        (of_clip("openai/clip", Tokenizer(), Tokenizer()), "clip must be a loaded CLIPModel, found 'openai/clip' without"),
        (
            of_clip(torch.nn.Linear(2, 2), Tokenizer(), Tokenizer()),
            "found Linear without visual_projection, vision_model.post_layer",
        ),
        (of_clip(clip(), "clip", Tokenizer()), "clip_tokenizer must be the CLIP model's tokenizer, found 'clip'"),
        (of_clip(clip(), Processor(), Tokenizer()), "found the processor Processor: pass its .tokenizer"),
        (of_clip(clip(), Endless(), Tokenizer()), "allows texts of 1000000000000000000000000000000 tokens"),
        (of_clip(clip(), Tokenizer(), None), "tokenizer must be the vision-language model's own, found None"),
    ],
)
def test_what_cannot_be_a_relevance(make, sentence):
    """Red: anything that could be called was taken, and failed at the first prompt."""
    with pytest.raises(vp.UsageError) as error:
        vp.CDPruner(relevance=make())
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_clip_model_of_another_width_is_refused_when_wrapping():
    """The tiny LLaVA's tower has patches of 32 numbers."""
    vp.wrap(shared("llava"), vp.CDPruner(relevance=vp.ClipRelevance(clip(32), Tokenizer(), Tokenizer()))).remove()
    with pytest.raises(
        vp.UsageError, match="this model's vision tower, 32 numbers each, with a CLIP model whose patches have 16"
    ):
        vp.wrap(shared("llava"), vp.CDPruner(relevance=vp.ClipRelevance(clip(16), Tokenizer(), Tokenizer())))


@torch.no_grad()
def test_functions_and_modules_are_relevances():
    class Learned(torch.nn.Module):
        def forward(self, tower_features, text_ids, text_valid):
            return tower_features.sum(dim=-1)

    model = shared("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text3"]])
    kept = []
    for relevance in (lambda features, ids, valid: features.sum(dim=-1), Learned()):
        with vp.wrap(model, vp.CDPruner(tokens=4, relevance=relevance)) as run:
            model(**inputs)
        kept.append(run.last.kept[0].index.tolist())
    assert kept[0] == kept[1]
