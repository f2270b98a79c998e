"""Bad input, and methods that users wrote wrongly: one sentence each, also under `explain=True`."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections import namedtuple

import numpy as np
import pytest
import torch
from tiny_models import build, make_inputs, shared
from torch import nn

import vlmprune as vp
from vlmprune.cli.why import explained, lines
from vlmprune.methods.redistributing import GroupEditor
from vlmprune.view import TowerFacts

Crop = namedtuple("Crop", ["name", "cells"])
CHATTY = [["text4", "image", "text6"], ["text3", "image", "text3"]]


def own(base=vp.Pruner, **parts):
    """A method as users write one: it keeps the first four tokens of each picture."""

    def select(self, see, keep):
        index = torch.arange(keep).expand(see.images, keep)
        return vp.Choice(index, joined=self.merged_into(see)) if hasattr(self, "merged_into") else index

    traits = {"name": "mine", "paper": "", "needs": frozenset({"features"}), "default": vp.at(0, tokens=4), "select": select}
    return type("Mine", (base,), traits | parts)()


# -- explain=True ------------------------------------------------------------------------------------------------------------

JOINED = {
    "out of range": (
        lambda self, see: torch.full((see.images, see.visual), 99),
        r"must hold the kept token that each token was merged into, .*, found 99 for token 0 of picture 0\.",
    ),
    "into a dropped token": (
        lambda self, see: torch.arange(see.visual).expand(see.images, -1),
        r"found 4 for token 4 of picture 0\.",
    ),
    "a kept one into another": (
        lambda self, see: torch.zeros(see.images, see.visual, dtype=torch.long),
        r"found 0 for token 1 of picture 0\.",
    ),
    "wrong shape": (
        lambda self, see: torch.zeros(see.images, 3, dtype=torch.long),
        r"must be a tensor \[image, visual\] of shape \[2, 16\], found shape \[2, 3\]\.",
    ),
    "a list": (lambda self, see: [[0]], r"must be a tensor \[image, visual\] of shape \[2, 16\], found \[\[0\]\]\."),
    "floats": (lambda self, see: torch.zeros(see.images, see.visual), r"of whole numbers, found torch.float32\."),
}
ORDERS = {
    "out of range": (
        lambda self, see, keep: torch.arange(30, 30 + keep).expand(see.images, keep),
        r"must return the tokens that select\(see, keep\) kept, each once, found \[30, 31, 32, 33\] instead of "
        r"\[0, 1, 2, 3\] for picture 0\.",
    ),
    "other tokens": (
        lambda self, see, keep: torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]]),
        r"found \[0, 1, 2, 4\] instead of \[0, 1, 2, 3\] for picture 1\.",
    ),
    "one twice": (lambda self, see, keep: torch.zeros(see.images, keep).long(), r"found \[0, 0, 0, 0\] instead of"),
    "too many": (
        lambda self, see, keep: torch.arange(keep + 3).expand(see.images, -1),
        r"must be a tensor \[image, keep\] of shape \[2, 4\], found shape \[2, 7\]\.",
    ),
    "a list": (lambda self, see, keep: [[0, 1, 2, 3]] * 2, r"found \[\[0, 1, 2, 3\], \[0, 1, 2, 3\]\]\."),
}


@pytest.mark.parametrize(
    ("part", "wrong", "said"),
    [
        *(pytest.param("merged_into", *case, id=f"joined: {name}") for name, case in JOINED.items()),
        *(pytest.param("order", *case, id=f"order: {name}") for name, case in ORDERS.items()),
    ],
)
@torch.no_grad()
def test_what_explains_is_checked(part, wrong, said):
    """Red: a run that works without `explain=True` crashes with it, or is explained by tokens that are not there."""
    model = shared("llava")
    inputs = make_inputs("llava", model, CHATTY)
    what = r"mine: the joined of its Choice" if part == "merged_into" else r"mine: order\(see, keep\)"
    with vp.wrap(model, own(**{part: wrong})):
        model(**inputs)
    with vp.wrap(model, own(**{part: wrong}), explain=True), pytest.raises(vp.UsageError, match=f"^{what} .*{said}"):
        model(**inputs)


@torch.no_grad()
def test_what_explains_may_be_of_any_whole_numbers():
    model = shared("llava")
    order = lambda self, see, keep: torch.tensor([[3, 1, 0, 2]] * 2, dtype=torch.int16)  # noqa: E731
    joined = lambda self, see: torch.tensor([[0, 1, 2, 3, 1, 1, *[-1] * 10]] * 2, dtype=torch.int8)  # noqa: E731
    with vp.wrap(model, own(order=order, merged_into=joined), explain=True) as run:
        model(**make_inputs("llava", model, CHATTY))
        found = [run.explain(token, sample=1).verdicts[0] for token in range(7)]
    assert [verdict.pick for verdict in found] == [3, 2, 4, 1, None, None, None]
    assert [verdict.merged_into for verdict in found] == [None] * 4 + [1, 1, None]
    assert found[1].merged_from == 2


# -- tokens without a place --------------------------------------------------------------------------------------------------

NO_PLACE = "numbers their tokens 0 to {}, so that no number is a place in the picture"


@torch.no_grad()
def test_tokens_that_the_tower_merged_anywhere_have_no_place():
    """Red: token 0 of what is left is said to be the first of the picture."""
    model = shared("qwen2_vl")
    inputs = make_inputs("qwen2_vl", model, CHATTY)
    with vp.wrap(model, "flowcut:fraction=0.3", explain=True) as run:
        model(**inputs)
    left = len(run.last.kept[0].index)
    assert run.last.kept[0].index.tolist() == list(range(left))
    for token in range(16):
        why = run.explain(token)
        assert not why.in_place
        assert NO_PLACE.format(left - 1) in str(why.verdicts[0])
        assert str(why).count("no number is a place") == 1
        assert why.to_dict()["verdicts"][0]["in_place"] is False


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("qwen2_vl", "flowcut:fraction=1.0"),
        ("qwen2_vl", "flowcut:fraction=0.3,variant_on_units=unit"),
        ("qwen2_5_vl", "flowcut:fraction=0.3"),
        ("qwen2_vl", "fastv:layer=2,tokens=4"),
        ("llava", "flowcut:tokens=4"),
        ("llava_next", "flowcut:tokens=4"),
    ],
)
@torch.no_grad()
def test_all_others_have_one(family, recipe):
    model = shared(family)
    with vp.wrap(model, recipe, explain=True) as run:
        model(**make_inputs(family, model, CHATTY))
    assert all(run.explain(token).in_place for token in range(run.last.kept[0].original))
    assert "no place" not in str(run.explain(0))


@torch.no_grad()
def test_a_token_without_a_place_has_no_cell():
    """Red: `run --why` prints "Its cell is row 0, column 0" of a token that was merged from patches of anywhere."""
    model = shared("qwen2_vl")

    class Asked:
        def crops(self):
            return [Crop("picture", torch.arange(16).reshape(4, 4))]

    for recipe, cell in (
        ("flowcut:fraction=0.3", None),
        ("fastv:layer=2,tokens=4", {"crop": "picture", "row": 1, "column": 1}),
    ):
        with vp.wrap(model, recipe, explain=True) as run:
            model(**make_inputs("qwen2_vl", model, CHATTY))
        (why,) = explained(run, Asked(), [5])
        assert why["cell"] == cell
        assert ("Its cell is row 1, column 1" in " ".join(lines(why))) is (cell is not None)


# -- values of the wrong kind ------------------------------------------------------------------------------------------------

STAGE = vp.Stage(2, vp.Budget(3))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: vp.VAR(preset=[1]),
            r"^unknown preset of var '\[1\]': known: general, hallucination, released-code, vision\.$",
        ),
        (lambda: vp.stages([1, 2]), r"^stages takes what is kept by the numbers of the layers, .*, found \[1, 2\]\.$"),
        (lambda: vp.stages(None), r"^stages takes what is kept .*, found None\.$"),
        (lambda: vp.stages({"a": 0.5, 2: 0.5}), r"^stages takes what is kept .*, found \{'a': 0\.5, 2: 0\.5\}\.$"),
        (
            lambda: vp.Schedule((1, 2)),
            r"^a Schedule is made of stages, found 1 among them: write vlmprune\.Stage\(layer, budget\)",
        ),
        (lambda: vp.Schedule("ab"), r"^a Schedule is made of stages, found 'a' among them"),
        (
            lambda: vp.Schedule(STAGE),
            r"^a Schedule is made of a tuple of stages, found Stage\(layer=2, .*: write vlmprune\.Schedule",
        ),
        (lambda: vp.Schedule(None), r"^a Schedule is made of a tuple of stages, found None: write"),
        (lambda: vp.Schedule(()), r"^a schedule needs at least one stage\.$"),
        (lambda: vp.Recipe.parse(None), r"^Recipe\.parse reads a recipe string, for example 'fastv:.*', found None: "),
        (lambda: vp.Recipe.parse(vp.FastV()), r"^Recipe\.parse reads a recipe string, .*, found FastV\(.*Recipe\.of"),
        (
            lambda: vp.Recipe.from_pretrained(None),
            r"^a recipe is read from a JSON file, a folder or a hub id, found None: give",
        ),
        (
            lambda: vp.PAI(layers=[]),
            r"^pai: layers=… names the decoder layers to edit, found \[\], which names none: give at least",
        ),
        (lambda: vp.PAI(layers=range(0)), r"^pai: layers=… .*, found range\(0, 0\), which names none"),
        (lambda: vp.PAI(layers=np.array([])), r"^pai: layers=… .*, found array\(\[\], .*\), which names none"),
    ],
)
def test_values_of_the_wrong_kind(make, said):
    """Red: a TypeError or AttributeError from inside; or the paper's layers, where none were named."""
    with pytest.raises(vp.UsageError, match=said):
        make()


def test_a_schedule_of_a_list_is_one_of_a_tuple():
    """Red: a frozen schedule holds a list, and has no hash."""
    given = [STAGE, vp.Stage(4, vp.Budget(2))]
    schedule = vp.Schedule(given)
    assert schedule == vp.Schedule(tuple(given)) == vp.stages({2: 3, 4: 2}) == vp.Schedule(stage for stage in given)
    assert hash(schedule) == hash(vp.Schedule(tuple(given)))
    assert vp.stages({np.int64(2): np.float32(0.5)}) == vp.stages({2: 0.5})
    assert vp.PAI(layers="").layers == vp.PAI().layers == ""


@pytest.mark.parametrize("value", ["no", "False", 0, 1, None, [], torch.tensor(False)])
def test_switches_are_bools(value):
    """Red: "no" switches on, because a string that is not empty counts as true."""
    model = build("llava")
    recipe, shown = "fastv:layer=2,tokens=4", re.escape(repr(value))
    with pytest.raises(vp.UsageError, match=rf"^explain must be True or False, found {shown}\.$"):
        vp.wrap(model, recipe, explain=value)
    assert not list(model.model.language_model.layers[2]._forward_pre_hooks), "refused before the model changes"
    with vp.wrap(model, recipe) as run:
        with pytest.raises(vp.UsageError, match=rf"^enabled must be True or False, found {shown}\.$"):
            run.enabled = value
        if value is not None:
            with pytest.raises(vp.UsageError, match=rf"^enabled must be True or False, found {shown}\.$"):
                run.override(enabled=value).__enter__()
        assert run.enabled
        run.enabled = np.bool_(False)
        assert run.enabled is False
        with run.override(enabled=np.bool_(True)):
            assert run.enabled is True


HOLDERS = {
    "Sequential": nn.Sequential,
    "ModuleList": lambda model: nn.ModuleList([nn.Linear(2, 2), model]),
    "ModuleDict": lambda model: nn.ModuleDict({"vlm": model}),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_what_holds_a_model_is_named(name):
    """Red: a container of the model is taken for a module of timm, and the answer is to load a model."""
    model = shared("llava")
    said = rf"found a {name}, which holds a model \(LlavaForConditionalGeneration\): pass that one\.$"
    with pytest.raises(vp.UsageError, match=said):
        vp.wrap(HOLDERS[name](model), "fastv:layer=2,tokens=4")
    with pytest.raises(vp.UsageError, match=r"found a ModuleList, which holds 2 models \(Llava.*\): wrap each of them"):
        vp.wrap(nn.ModuleList([model, shared("llava_next")]), "fastv:layer=2,tokens=4")
    with pytest.raises(vp.UsageError, match=r"found a Sequential, which has no config\.model_type"):
        vp.wrap(nn.Sequential(nn.Linear(2, 2)), "fastv:layer=2,tokens=4")


def test_a_method_of_a_model_is_named():
    """Red: `wrap(model.generate)` is told to call the function, and to pass the model that it returns."""
    model = shared("llava")
    for method in (model.generate, model.forward):
        with pytest.raises(vp.UsageError, match=r"found a method of a LlavaForConditionalGeneration: pass the model itself\.$"):
            vp.wrap(method, "fastv:layer=2,tokens=4")
    pipeline = type("Pipeline", (), {"model": model, "ask": lambda self: None})()
    with pytest.raises(vp.UsageError, match=r"found a method of a Pipeline: pass the model in it, its attribute \.model\.$"):
        vp.wrap(pipeline.ask, "fastv:layer=2,tokens=4")
    with pytest.raises(
        vp.UsageError, match=r"found the function .*from_pretrained: call it, and pass the model that it returns"
    ):
        vp.wrap(type(model).from_pretrained, "fastv:layer=2,tokens=4")


# -- names of earlier versions -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_reading_a_former_name_says_the_new_one():
    """Red: a method that was written for an earlier version ends in an AttributeError without a word about the new name."""
    model = shared("llava")
    with vp.wrap(model, "pai") as run:
        model(**make_inputs("llava", model, CHATTY))
    renamed = [
        (TowerFacts(), "unit", "patches_per_token"),
        (run.last, "steered", "edits"),
        (run.last.edits[0], "codes", "groups"),
    ]
    for found, former, new in renamed:
        with pytest.raises(AttributeError, match=rf"object has no attribute '{former}': it is called {new} now$"):
            getattr(found, former)
        assert not hasattr(found, former)
        assert hasattr(found, new)
        with pytest.raises(AttributeError, match=r"object has no attribute 'nothing'$"):
            found.nothing  # noqa: B018
    facts = TowerFacts(cls=True)
    assert pickle.loads(pickle.dumps(facts)) == copy.deepcopy(facts) == dataclasses.replace(facts) == facts
    assert [field.name for field in dataclasses.fields(facts)][:3] == ["cls", "crops", "patches_per_token"]


def test_a_class_with_the_former_name_of_its_groups_is_refused():
    """Red: `codes` is never called, and the method ends in a NotImplementedError at its first prompt."""
    traits = {"name": "mine", "paper": "", "rows": "all", "default_layers": ":", "codes": lambda self, see: None}
    with pytest.raises(vp.UsageError, match=r"^the method Mine defines codes, which is called groups now: rename it\.$"):
        type("Mine", (GroupEditor,), traits)()


@torch.no_grad()
def test_one_index_for_all_pictures_is_refused():
    """Red: a tensor without axes cannot be looped over."""
    model = shared("llava")
    method = own(select=lambda self, see, keep: torch.tensor(3))
    said = r"^mine\.select must return whole numbers \[image, keep\], found torch\.int64 of shape \[\] for a picture\.$"
    with vp.wrap(model, method), pytest.raises(vp.UsageError, match=said):
        model(**make_inputs("llava", model, CHATTY))
