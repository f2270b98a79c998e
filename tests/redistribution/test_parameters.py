"""What parameters of redistribution come to: nothing at all, which reports say; and layers as whatever holds numbers."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from tiny_models import make_inputs, shared

import vlmprune as vp

SAMPLES = [["text3", "image", "text4"]]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("recipe", ["zerotuning", "pai:alpha=0", "divprune:layer=0,tokens=4 + zerotuning:gain=1,layers=1"])
def test_a_method_that_changes_nothing_says_so(recipe):
    model, name = shared("llava"), recipe.split(" + ")[-1].split(":")[0]
    with vp.wrap(model, recipe) as run:
        model(**make_inputs("llava", model, SAMPLES))
        report = run.report()
    assert report.neutral == (name,) == tuple(report.to_dict()["neutral"])
    assert (f"redistributed ({name})", "changes nothing with these parameters") in report.rows()
    assert "changes nothing with these parameters" in str(report)


def test_a_method_that_changes_something_does_not():
    model = shared("llava")
    with vp.wrap(model, "zerotuning:gain=2,layers=1") as run:
        model(**make_inputs("llava", model, SAMPLES))
    assert run.report().neutral == ()
    assert "changes nothing" not in str(run.report())


@pytest.mark.parametrize(
    "layers", [[1, 2], (1, 2), range(1, 3), np.array([1, 2]), np.arange(1, 3, dtype=np.uint8), ("1", 2)], ids=repr
)
def test_layers_are_whatever_holds_numbers(layers):
    made = vp.PAI(layers=layers)
    assert made.layers == "1|2"
    assert vp.Recipe.of(made) == vp.Recipe.parse("pai:layers=1|2")
    assert made.layers_of(6) == (1, 2)


def test_sink_dimensions_too():
    assert vp.VAR(sink_dims=np.array([5, 40])).dims == vp.VAR(sink_dims=(5, 40)).dims == (5, 40)
    assert vp.VAR(sink_dims=range(5, 7)).dims == (5, 6)


@pytest.mark.parametrize("layers", [np.array([1.5, 2.0]), np.array([[1], [2]]), ("a",)], ids=repr)
def test_what_holds_none_is_refused(layers):
    with pytest.raises(vp.UsageError, match="layers are written as indices and slices"):
        vp.PAI(layers=layers)


def test_what_is_given_wins_over_a_preset():
    """Red: a parameter that is given as its default counts as not given."""
    assert vp.VAR(preset="released-code").keep == 0.6
    assert vp.VAR(preset="released-code", keep=0.4).keep == 0.4
    assert vp.VAR(preset="hallucination", max_sink_share=0.2).max_sink_share == 0.2
    assert vp.PAINT(preset="released-code", beta=0.4).beta == 0.4
    (parsed,) = vp.Recipe.parse("var:preset=hallucination,max_sink_share=0.2").methods
    assert parsed.max_sink_share == 0.2


@pytest.mark.parametrize("given", [{"keep": 0.4}, {"keep": 0.9}, {"preset": "general"}])
def test_two_ways_of_saying_one_thing(given):
    """Red: p beside keep passes because keep is given as its default."""
    with pytest.raises(vp.UsageError, match="give p, keep or a preset; only one"):
        vp.VAR(p=0.6, **given)


def test_methods_can_be_copied():
    method = vp.VAR(keep=0.4, preset="released-code", sink_dims="3")
    assert copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == method
    assert dataclasses.replace(method, keep=0.1) == vp.VAR(preset="released-code", keep=0.1, sink_dims="3")


@pytest.mark.parametrize("text", ["²", "①", "1.5", "-3", "4|"])
def test_dimensions_are_numbers(text):
    with pytest.raises(vp.UsageError, match="sink_dims must be"):
        vp.VAR(sink_dims=text)
