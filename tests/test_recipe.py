"""Recipes mean the same as Python, as a string and as a JSON file, and refuse what they do not know."""

from __future__ import annotations

import json

import pytest

import vlmprune as vp

SAME = [
    ("fastv:layer=2,fraction=0.25", vp.FastV(layer=2, fraction=0.25)),
    ("random:layer=0,fraction=0.1,seed=3", vp.Random(layer=0, fraction=0.1, seed=3)),
    ("divprune:fraction=0.1", vp.DivPrune(fraction=0.1)),
    ("cls:tokens=64", vp.CLS(tokens=64)),
    ("fastv", vp.FastV()),
    (" random : layer = 1 | 3 , fraction = 0.5 | 0.25 ", vp.Random(schedule=vp.stages({1: 0.5, 3: 0.25}))),
    ("random:layer=1|3,tokens=9|5,seed=2", vp.Random(schedule=vp.stages({1: 9, 3: 5}), seed=2)),
]


@pytest.mark.parametrize(("text", "method"), SAME, ids=[text for text, _ in SAME])
def test_string_json_and_python_agree(text, method, tmp_path):
    recipe = vp.Recipe.parse(text)
    assert recipe == vp.Recipe((method,)) == vp.Recipe.of(text) == vp.Recipe.of(method)
    assert vp.Recipe.parse(str(recipe)) == recipe
    recipe.save_pretrained(tmp_path / "saved")
    assert vp.Recipe.from_pretrained(tmp_path / "saved") == recipe
    assert vp.Recipe.from_pretrained(tmp_path / "saved" / "vlmprune.json") == recipe


def test_several_methods_are_ordered_by_layer():
    recipe = vp.Recipe.of("random:layer=4,fraction=0.1", vp.DivPrune(fraction=0.5))
    assert [(stage.layer, method.name) for stage, method in recipe.cuts()] == [(0, "divprune"), (4, "random")]
    assert vp.Recipe.parse(str(recipe)) == recipe


def test_published_defaults():
    """The papers' own budgets: FastV K=2 and half; DivPrune 9.8 %, which is 56 of 576."""
    assert str(vp.Recipe.of(vp.FastV())) == "fastv:layer=2,fraction=0.5"
    assert vp.DivPrune().stages[0].budget.resolve(576) == 56


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fastvv:layer=2", "unknown method 'fastvv': did you mean 'fastv' or 'fastvid'?"),
        ("zzz", "unknown method 'zzz': known: act, adaptinfer, cdpruner, cls, dart, divprune, evit, evs, fastv, fastvid,"),
        ("", "the recipe is empty: name a method"),
        ("fastv + ", "a part of the recipe 'fastv + ' is empty"),
        ("fastv:leyer=2", "unknown parameter of fastv 'leyer': did you mean 'layer' or 'per' or 'cache_layer'?"),
        ("fastv:seed=1", "unknown parameter of fastv 'seed'"),
        ("random:sed=1", "did you mean 'seed' or 'site'?"),
        ("fastv:layer", "cannot read 'layer'"),
        ("fastv:layer=", "cannot read 'layer='"),
        ("fastv:layer=two", "layer must be a number, found 'two'"),
        ("fastv:layer=2,layer=3", "'layer' is given twice"),
        ("fastv:layer=2.5", "layer must be a whole number"),
        ("fastv:layer=0", "fastv cannot prune before layer 1"),
        ("fastv:fraction=2", "fraction must lie in [0, 1], found 2"),
        ("fastv:tokens=3,fraction=0.5", "found both"),
        ("random:seed=0.5", "seed must be a whole number, found 0.5"),
        ("random:seed=1|2", "seed takes one value"),
        ("random:layer=1|2,fraction=0.5", "as many layers as budgets"),
        ("random:fraction=0.5|0.4", "as many layers as budgets"),
        ("random:layer=1|2,fraction=0.2|0.5", "a later stage cannot keep more"),
        ("random:layer=2,fraction=0.2 + divprune:layer=4,fraction=0.5", "a later stage cannot keep more"),
        ("random:layer=2,fraction=0.2 + fastv:layer=2,fraction=0.1", "random and fastv both prune at layer 2"),
    ],
)
def test_bad_strings_get_one_sentence(text, sentence):
    with pytest.raises(vp.UsageError) as error:
        vp.Recipe.parse(text)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], "a key is missing"),
        ({"methods": []}, "a key is missing"),
        ({"schema": 1, "methods": []}, "at least one method"),
        ({"schema": 2, "methods": [{"method": "fastv"}]}, "schema 2, this vlmprune reads up to 1"),
        ({"schema": "new", "methods": []}, "schema 'new'"),
        ({"schema": 1, "methods": [], "metods": []}, "unknown key in a recipe file 'metods': did you mean 'methods'?"),
        ({"schema": 1, "methods": ["fastv"]}, "must be a list of objects"),
        ({"schema": 1, "methods": [{"method": "fastv", "ratio": 0.5}]}, "unknown parameter of fastv 'ratio'"),
        ({"schema": 1, "methods": [{"layer": 2}]}, "unknown method 'None'"),
        ({"schema": 1, "methods": [{"method": ["a"]}]}, "unknown method"),
        ({"schema": True, "methods": []}, "schema True"),
        ({"schema": 0, "methods": []}, "schema 0"),
        ({"schema": 1, "methods": [{"method": "random", "layer": [2], "fraction": 0.5}]}, "as many layers as budgets"),
    ],
    ids=str,
)
def test_bad_files_get_one_sentence(data, sentence, tmp_path):
    path = tmp_path / "vlmprune.json"
    path.write_text(json.dumps(data))
    with pytest.raises(vp.UsageError) as error:
        vp.Recipe.from_pretrained(tmp_path)
    assert sentence in str(error.value)


def test_missing_and_broken_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(vp.UsageError, match="no recipe at"):
        vp.Recipe.from_pretrained(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(vp.UsageError, match="is not a JSON file"):
        vp.Recipe.from_pretrained(tmp_path / "broken.json")


def test_of_refuses_other_things():
    with pytest.raises(vp.UsageError, match="expected a method, a recipe or a recipe string, found 3"):
        vp.Recipe.of(3)
    with pytest.raises(vp.UsageError, match="at least one method"):
        vp.Recipe.of()


def test_mixed_budgets_cannot_be_written():
    """One method's schedule in a file has one unit; Python may mix them."""
    schedule = vp.Schedule((*vp.at(1, fraction=0.5).stages, *vp.at(3, tokens=2).stages))
    with pytest.raises(vp.UsageError, match="cannot mix tokens and fraction"):
        vp.Recipe.of(vp.Random(schedule=schedule)).to_dict()


def test_schedule_beside_a_budget_is_refused():
    with pytest.raises(vp.UsageError, match="only one of these"):
        vp.FastV(schedule=vp.at(2, tokens=3), tokens=4)


@pytest.mark.parametrize("text", ["", "  ", "+", "fastv +"])
def test_nothing_is_no_recipe(text):
    with pytest.raises(vp.UsageError, match="is empty: name a method"):
        vp.Recipe.parse(text)
