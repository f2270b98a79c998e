"""A removed or disabled run leaves no trace, whatever happened before."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    assert_equals_masked,
    decoder_layers,
    generate_logits,
    kept_sets,
)
from promises.runs import (
    BATCH,
    SINGLE,
    assert_untouched,
    over,
    untouched,
)
from promises.stages import families
from snapshot import Snapshot
from tiny_models import (
    FAMILIES,
    FLEX,
    build,
    make_inputs,
    shared,
    warm_up,
)
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
)

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")

SAMPLES = [["text7", "image", "text4"], ["text2", "image", "image", "text3"]]

RECIPES = {
    ("llava", "sum"): "cls:layer=0,fraction=0.8 + fastv:layer=2,fraction=0.5 + random:layer=4,fraction=0.2",
    ("llava", "divprune"): "divprune:layer=0,fraction=0.3",
    ("qwen2_5_vl", "fastv"): "fastv:layer=2|4,fraction=0.5|0.2",
    ("qwen2_5_vl", "sum"): "divprune:layer=0,fraction=0.6 + random:layer=3,fraction=0.2",
}

every_recipe = pytest.mark.parametrize(
    ("family", "recipe"), [pytest.param(key[0], value, id="-".join(key)) for key, value in RECIPES.items()]
)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def models(request):
    """Models of this file's own, so that a failing test cannot spoil other files."""
    out = {family: build(family, request.param) for family in FAMILIES}
    for family, model in out.items():
        warm_up(model, family)
    return out


def state(family, model):
    inputs = make_inputs(family, model, SAMPLES)
    _, sequences, logits = generate_logits(model, inputs, 4)
    return model(**inputs).logits, sequences, logits


def assert_same_as_before(family, model, before: Snapshot, expected) -> None:
    for ours, theirs in zip(state(family, model), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert Snapshot(model).differences(before) == []


def prunes(family, model, run) -> None:
    """The run does what it should: equals the oracle of what it says it kept."""
    inputs = make_inputs(family, model, SAMPLES)
    _, generated, logits = generate_logits(model, inputs, 4)
    keep = run.last.keep
    run.remove()
    assert_equals_masked(model, inputs, keep, generated, logits)


def test_the_snapshot_sees_traces(models):
    """Red: the tests below are blind."""
    model = models["llava"]
    before = Snapshot(model)
    assert before.differences(Snapshot(model)) == []

    layer = decoder_layers(model)[3]
    handle = layer.register_forward_pre_hook(lambda *_: None)
    assert Snapshot(model).differences(before) != []
    handle.remove()
    layer.trace = 1
    assert Snapshot(model).differences(before) != []
    del layer.trace
    model.model.language_model.config._trace = 1
    assert Snapshot(model).differences(before) != []
    del model.model.language_model.config._trace
    forward = type(layer).forward
    type(layer).forward = lambda self: None
    assert Snapshot(model).differences(before) != []
    type(layer).forward = forward
    assert before.differences(Snapshot(model)) == []


@every_recipe
def test_remove_leaves_no_trace(models, family, recipe):
    """Red: a hook, an attribute, a config value or a rebound function stays behind; or the logits differ in a bit."""
    model = models[family]
    expected, before = state(family, model), Snapshot(model)
    run = vp.wrap(model, recipe)
    assert not torch.equal(state(family, model)[2], expected[2])
    run.remove()
    assert_same_as_before(family, model, before, expected)
    run.remove()
    assert_same_as_before(family, model, before, expected)


@every_recipe
def test_remove_without_use(models, family, recipe):
    """Red: removal depends on something that only a call sets up."""
    model = models[family]
    expected, before = state(family, model), Snapshot(model)
    with vp.wrap(model, recipe):
        pass
    assert_same_as_before(family, model, before, expected)


class Raises(LogitsProcessor):
    """Fails at the n-th token."""

    def __init__(self, at: int):
        self.left = at

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError
        return scores


@every_recipe
@pytest.mark.parametrize("at", [1, 3])
def test_exception_while_decoding(models, family, recipe, at):
    """Red: a failed `generate` leaves the model wrapped, or leaves half a call's state for the next one."""
    model = models[family]
    inputs = make_inputs(family, model, SAMPLES)
    expected, before = state(family, model), Snapshot(model)
    with pytest.raises(ZeroDivisionError), vp.wrap(model, recipe):
        model.generate(**inputs, max_new_tokens=5, logits_processor=LogitsProcessorList([Raises(at)]))
    assert_same_as_before(family, model, before, expected)


@every_recipe
@pytest.mark.parametrize("layer", [0, 2, 5])
def test_exception_inside_a_forward(models, family, recipe, layer):
    """Red: state of a forward that died half-way through the layers leaks into the next call, or survives removal."""
    model = models[family]
    expected, before = state(family, model), Snapshot(model)
    run = vp.wrap(model, recipe)

    def fail(module, args, output):
        raise ZeroDivisionError

    handle = decoder_layers(model)[layer].register_forward_hook(fail)
    other = make_inputs(family, model, [["text3", "image", "image", "text30"]], seed=9)
    with pytest.raises(ZeroDivisionError):
        model(**other)
    with pytest.raises(ZeroDivisionError):
        model.generate(**other, max_new_tokens=3)
    handle.remove()
    prunes(family, model, run)
    assert_same_as_before(family, model, before, expected)


def test_refused_wrap_leaves_no_trace(models):
    """Red: a recipe that is refused half-way leaves the hooks of its first half."""
    model = models["qwen2_5_vl"]
    expected, before = state("qwen2_5_vl", model), Snapshot(model)
    reasons = {
        "random:layer=1,fraction=0.5 + cls:layer=3,fraction=0.2": r"(?i)cls",
        "random:layer=99,fraction=0.5": "99",
        "nonsense": "nonsense",
    }
    for recipe, reason in reasons.items():
        with pytest.raises(ValueError, match=reason), vp.wrap(model, recipe):
            model(**make_inputs("qwen2_5_vl", model, SAMPLES))
        assert_same_as_before("qwen2_5_vl", model, before, expected)


def test_refused_wrap_leaves_the_earlier_run(models):
    """Red: asking for something impossible un-prunes a model that was being pruned."""
    model = models["qwen2_5_vl"]
    inputs = make_inputs("qwen2_5_vl", model, SAMPLES)
    with vp.wrap(model, "random:layer=1,fraction=0.5") as run:
        logits = model(**inputs).logits
        before = Snapshot(model)
        with pytest.raises(ValueError, match=r"(?i)cls"):
            vp.wrap(model, "cls:layer=3,fraction=0.2")
        assert Snapshot(model).differences(before) == []
        assert torch.equal(model(**inputs).logits, logits)
        assert run.last.keep.keys() == {1}


@pytest.mark.parametrize("recipe", [RECIPES["llava", "sum"], "flowcut:fraction=0.5", "pai + fastv:layer=2,fraction=0.5"])
def test_remove_leaves_no_trace_under_flex_attention(recipe):
    """Red: block masks of shorter sequences, or routed attention, outlive the run."""
    model = build("llava", FLEX)
    warm_up(model, "llava")
    expected, before = state("llava", model), Snapshot(model)
    with vp.wrap(model, recipe):
        assert not torch.equal(state("llava", model)[0], expected[0])
    assert_same_as_before("llava", model, before, expected)


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@families
def test_wrapping_again_replaces(models, family):
    """Red: two wraps prune twice, or removing the first takes the second one's hooks away."""
    model = models[family]
    inputs = make_inputs(family, model, SAMPLES)
    expected, before = state(family, model), Snapshot(model)
    with vp.wrap(model, "random:layer=3,fraction=0.25,seed=1") as alone:
        only_second = state(family, model)
        sets, count = kept_sets(alone.last), hooks(model)

    first = vp.wrap(model, "random:layer=1,fraction=0.5,seed=0")
    model(**inputs)
    last = first.last
    second = vp.wrap(model, "random:layer=3,fraction=0.25,seed=1")
    assert hooks(model) == count
    for ours, theirs in zip(state(family, model), only_second, strict=True):
        assert torch.equal(ours, theirs)
    assert first.last is last, "the replaced run still records"
    assert kept_sets(second.last) == sets

    first.remove()
    first.enabled = False
    assert hooks(model) == count
    model(**inputs)
    assert kept_sets(second.last) == sets
    second.remove()
    assert_same_as_before(family, model, before, expected)


@families
def test_wrapping_again_after_removal(models, family):
    """Red: a removed run cannot be followed by another, or the order of removals matters."""
    model = models[family]
    expected, before = state(family, model), Snapshot(model)
    for recipe in ("random:layer=0,fraction=0.5", "fastv:layer=2,fraction=0.3", "random:layer=0,fraction=0.5"):
        prunes(family, model, vp.wrap(model, recipe))
        assert_same_as_before(family, model, before, expected)


@families
def test_disabled_is_bit_identical(models, family):
    """Red: `enabled = False` still prunes, gathers or changes a mask."""
    model = models[family]
    expected = state(family, model)
    with vp.wrap(model, "fastv:layer=2|4,fraction=0.5|0.2") as run:
        run.enabled = False
        for ours, theirs in zip(state(family, model), expected, strict=True):
            assert torch.equal(ours, theirs)
        run.enabled = True
        prunes(family, model, run)
    for ours, theirs in zip(state(family, model), expected, strict=True):
        assert torch.equal(ours, theirs)


@over(SINGLE)
def test_leaving_restores_the_model(family, recipe):
    """Red: a hook stays, or a disabled run still works inside the tower or the cache."""
    model = shared(family)
    inputs = make_inputs(family, model, BATCH)
    before = Snapshot(model)
    with vp.wrap(model, recipe) as run:
        pruned = model(**inputs).logits
        run.enabled = False
        assert_untouched(family, model)
        run.enabled = True
        assert torch.equal(model(**inputs).logits, pruned)
    assert_untouched(family, model)
    assert Snapshot(model).differences(before) == []
    run = vp.wrap(model, recipe)
    model(**inputs)
    run.remove()
    assert torch.equal(model(**inputs).logits[:, -1], untouched(family)[2][:, -1])
