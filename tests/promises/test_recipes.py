"""Every parameter goes through a string and through a file."""

from __future__ import annotations

from dataclasses import fields

import pytest
from cases import PRUNING
from promises.runs import (
    one_sentence,
)

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")

FORMS = [row.recipe(arguments) for row in PRUNING for arguments in row.written]
FORMS = [form if "cache_layer" in form else f"{form},cache_layer=1" for form in FORMS]


@pytest.mark.parametrize(
    "text",
    [
        *FORMS,
        *vp.METHODS,
        "divprune:fraction=0.6 + dart:layer=2,fraction=0.5,positions=compact + random:layer=4,tokens=3,seed=9",
    ],
)
def test_recipes_come_back_from_strings_and_files(text, tmp_path):
    """Red: a parameter, a site or a digit is lost on the way through a string or a file."""
    recipe = vp.Recipe.parse(text)
    assert vp.Recipe.parse(str(recipe)) == recipe
    assert vp.Recipe.from_dict(recipe.to_dict()) == recipe
    recipe.save_pretrained(tmp_path)
    assert vp.Recipe.from_pretrained(tmp_path) == recipe
    assert str(vp.Recipe.from_pretrained(tmp_path)) == str(recipe)


PLACES = [
    "flowcut:layer=0,tokens=5,site=vision",
    "flowcut:layer=1,tokens=5,site=vision",
    "random:layer=3|1,fraction=0.4|0.4,site=llm|cache",
    "random:layer=3,fraction=0.4,site=cache",
    "random:layer=0,fraction=0.4,site=vision",
]


@pytest.mark.parametrize("text", PLACES)
def test_places_come_back_or_are_refused(text):
    """Red: written down, a stage moves to another place."""
    try:
        recipe = vp.Recipe.parse(text)
    except vp.UsageError as refusal:
        return one_sentence(refusal)
    assert vp.Recipe.parse(str(recipe)) == recipe
    assert vp.Recipe.from_dict(recipe.to_dict()) == recipe


def test_code_cannot_be_written_down():
    """Red: a file is written that cannot be read again."""
    recipe = vp.Recipe.of(vp.CDPruner(tokens=5, relevance=lambda features, ids, valid: features.sum(-1)))
    with pytest.raises(vp.UsageError, match="cannot hold relevance"):
        recipe.to_dict()


def test_every_parameter_goes_through_a_string():
    """Red: a parameter was added that no form above carries. `relevance` is code, which no string can hold."""
    given: dict[str, set[str]] = {name: set() for name in vp.METHODS}
    for form in FORMS:
        name, _, arguments = form.partition(":")
        given[name] |= {pair.split("=")[0] for pair in arguments.split(",")}
        method, default = vp.Recipe.parse(form).methods[0], vp.METHODS[name]()
        for pair in arguments.split(","):
            key = pair.split("=")[0]
            if key not in ("layer", "tokens", "fraction", "preset", "site"):
                given[name] -= {key} if getattr(method, key) == getattr(default, key) else set()
    for name, method in vp.METHODS.items():
        own = {field.name for field in fields(method)} - {"schedule", "relevance"}
        drops = vp.Recipe.of(method(newlines="drop"))  # every method has it, and no form above is about it
        assert "newlines=drop" in str(drops)
        assert vp.Recipe.parse(str(drops)) == drops
        given[name] |= {"newlines"}
        if not method.compares_frames and method.default.stages[0].site == "llm":
            frames = vp.Recipe.of(method(per="frame", layer=2, fraction=0.25))
            assert vp.Recipe.parse(str(frames)) == frames == vp.Recipe.from_dict(frames.to_dict())
            assert frames.methods[0].per == "frame"
        given[name] |= {"per"}
        if name == "sparsevlm":
            given[name] |= {"version"}
        assert own - given[name] == set(), name
