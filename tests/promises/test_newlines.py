"""Row separators of LLaVA-NeXT: kept on top of the budget, or dropped, by every method with the same word."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from oracles import separators
from promises.few import RECIPES
from tiny_models import make_inputs, shared

import vlmprune as vp

SAMPLES = [["text5", "image", "text4"], ["text2", "image", "text1", "image", "text3"], ["image", "text9"]]


def recipe(name: str, newlines: str) -> str:
    budget = re.sub(r"tokens=\d+", "tokens=7", RECIPES[name])
    return f"{name}:{budget}{',merge=2,cache_layer=-1' if name == 'mustdrop' else ''},newlines={newlines}"


@pytest.mark.parametrize("name", sorted(vp.METHODS))
def test_a_method_drops_them_or_keeps_them(name):
    """What the first cut chooses is the same. Dropped, exactly K tokens of a picture are left; kept, separators beside them.
    There are as many as the packed picture has rows: other numbers for other pictures."""
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, SAMPLES)
    rows = [int(separator.sum()) for separator in separators(model, inputs)]
    assert len(set(rows)) > 1, "the pictures of this test must have different numbers of rows"
    chosen, visible = {}, {}
    for newlines in ("keep", "drop"):
        with vp.wrap(model, recipe(name, newlines)) as run, torch.no_grad():
            model(**inputs)
        chosen[newlines] = [kept.index.tolist() for kept in run.last.kept[: len(rows)]]
        last = run.last.keep[max(run.last.keep)]
        visible[newlines] = int((last & (inputs["input_ids"] == model.config.image_token_id)).sum())
        report, left = run.report(), sum(len(kept.index) for kept in run.last.kept[-len(rows) :])
        assert (report.newlines, report.newline_policy) == (sum(rows), {"keep": "kept", "drop": "dropped"}[newlines])
    assert chosen["keep"] == chosen["drop"]
    assert visible == {"keep": left + sum(rows), "drop": left}
    most = 7 * len(rows)
    of_crops = {"flowcut": 0 < left < most, "pixelprune": left > most}  # K/2, or K, of each, less what un-padding drops
    assert of_crops.get(name, left == most)


@pytest.mark.parametrize("name", sorted(vp.METHODS))
def test_recipes_of_before_mean_the_same(name):
    """A file that says nothing of them keeps them, as it did; a string shows them only if they are dropped."""
    method = vp.METHODS[name]()
    assert method.newlines == "keep"
    assert method.keeps_newlines
    assert "newlines" not in str(vp.Recipe.of(method))
    data = vp.Recipe.of(method).to_dict()
    del data["methods"][0]["newlines"]
    assert vp.Recipe.from_dict(data) == vp.Recipe.of(method)
    dropping = vp.Recipe.parse(f"{name}:newlines=drop")
    assert str(dropping).endswith("newlines=drop")
    assert vp.Recipe.parse(str(dropping)) == vp.Recipe.from_dict(dropping.to_dict()) == dropping


def test_other_words_are_refused():
    with pytest.raises(vp.UsageError, match="unknown value of newlines in cls 'dropp': did you mean 'drop'"):
        vp.Recipe.parse("cls:newlines=dropp")


def test_the_first_method_that_drops_them_does():
    model = shared("llava_next")
    inputs = make_inputs("llava_next", model, SAMPLES)
    with vp.wrap(model, "divprune:tokens=9 + random:layer=3,tokens=5,newlines=drop") as run, torch.no_grad():
        model(**inputs)
    placeholders = inputs["input_ids"] == model.config.image_token_id
    count = sum(int(separator.sum()) for separator in separators(model, inputs))
    assert int((run.last.keep[0] & placeholders).sum()) == 4 * 9 + count
    assert int((run.last.keep[3] & placeholders).sum()) == 4 * 5


@pytest.mark.parametrize(
    "name", ["cdpruner", "cls", "dart", "divprune", "flowcut", "holov", "mustdrop", "pdrop", "visionzip", "vscan"]
)
def test_the_docstring_says_what_the_papers_code_does(name):
    text = " ".join((importlib.import_module(f"vlmprune.methods.pruning.{name}").__doc__ or "").split())
    assert 'unless newlines="drop"' in text
    assert "Differs from" in text
