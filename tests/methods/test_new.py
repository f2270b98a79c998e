"""Adding a method takes one file: this one. And precision: `torch.autocast` must not reach into scores."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from oracles import assert_equals_masked, generate_logits
from tiny_models import ALL_FAMILIES, make_inputs, shared

import vlmprune as vp
from vlmprune.kernels.select_diverse import select_diverse

SAMPLES = [["text5", "image", "text4"], ["text2", "image", "text1", "image", "text3"]]


@dataclass(frozen=True, kw_only=True)
class Loud(vp.ScorePruner):
    """Toy: keep the tokens with the largest features."""

    name = "loud"
    paper = "none"
    needs = frozenset({"features"})
    default = vp.at(layer=1, fraction=0.4)

    def score(self, see):
        return see.features.float().norm(dim=-1)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_toy_method_is_exact_in_every_family(family):
    model = shared(family)
    inputs = make_inputs(family, model, SAMPLES)
    with vp.wrap(model, Loud()) as run:
        _, ids, logits = generate_logits(model, inputs, 3)
        keep, text = run.last.keep, str(run.report())
    assert_equals_masked(model, inputs, keep, ids, logits)
    assert "loud" in text


def test_diversity_is_fp32_under_autocast():
    features = torch.randn(1, 576, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = select_diverse(features, 56)
    assert torch.equal(inside, select_diverse(features, 56))


RECIPES = [
    "fastv:layer=2,tokens=4",
    "adaptinfer:layer=2,tokens=4",
    "pdrop:layer=2,tokens=4",
    "cls:tokens=4",
    "flowcut:tokens=4",
]
RECIPES += ["visionzip:tokens=6", "mustdrop:layer=2,tokens=4,merge=0.3", "dart:layer=2,tokens=5", "sparsevlm:layer=2,tokens=5"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_methods_run_under_autocast(recipe):
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES)
    with vp.wrap(model, recipe) as run, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert run.report().stages[-1].kept[0] < 16


@pytest.mark.parametrize("recipe", ["flowcut:tokens=4", "mustdrop:layer=2,tokens=4,merge=0.3"])
def test_nan_of_the_tower_is_not_taken_for_dropped_patches(recipe):
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES[:1])
    inputs["pixel_values"] = inputs["pixel_values"] * torch.nan
    with vp.wrap(model, recipe), torch.no_grad(), pytest.raises(vp.UsageError, match="returned NaN for a picture"):
        model(**inputs)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: vp.Random(tokens=0), "nothing would be kept before the language model"),
        (lambda: vp.Random(fraction=0.0), "nothing would be kept before the language model"),
        (lambda: vp.FlowCut(tokens=0), "nothing would be kept before the language model"),
        (lambda: vp.Recipe.parse("adaptinfer:preset=64"), "unknown preset of adaptinfer '64'"),
        (lambda: vp.CDPruner(relevance=3), "relevance must be a function"),
        (lambda: vp.FastV(schedule={8: 0.5}), "schedule must be a Schedule"),
        (lambda: vp.Stage(2, 5), "a stage needs a budget"),
        (lambda: vp.Stage(2, vp.Budget(tokens=5), "tower"), "unknown site 'tower'"),
    ],
)
def test_one_sentence_for_odd_python(make, sentence):
    with pytest.raises(vp.UsageError) as error:
        make()
    assert sentence in str(error.value)


def test_nothing_may_be_kept_at_later_layers():
    assert vp.Random(layer=1, tokens=0).stages[0].budget.tokens == 0


def test_flowcut_unit_has_no_stage_in_the_tower():
    with pytest.raises(vp.UsageError, match="unit variant has no stage inside the tower"):
        vp.wrap(shared("qwen2_5_vl"), "flowcut:layer=0|2,tokens=8|4,site=vision|llm")


def test_a_preset_brings_its_version():
    assert vp.SparseVLM(preset="v2-64").version == 2
    assert vp.SparseVLM(preset="v1.5-64").version == 1.5


def test_mixed_budgets_are_shown():
    model = shared("llava")
    with vp.wrap(model, vp.FastV(schedule=vp.stages({2: 8, 4: 0.25}))) as run, torch.no_grad():
        model(**make_inputs("llava", model, SAMPLES))
    assert "fastv:layer=2|4,kept=8|0.25" in str(run.report())


def test_override_of_a_stage_that_keeps_everything():
    model = shared("llava")
    with vp.wrap(model, "divprune:fraction=1.0") as run, torch.no_grad(), run.override(tokens=3):
        model(**make_inputs("llava", model, SAMPLES))
    assert run.report().stages[0].kept == (3, 3, 3)


def test_override_is_the_callers_alone():
    """A thread that was there before goes on as it was; one that is started inside the block begins as its caller."""
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES[:1])
    counts, opened, done = {}, threading.Event(), threading.Event()

    def count(name):
        with torch.no_grad():
            model(**inputs)
        counts[name] = run.report().stages[0].kept[0]

    def before():
        opened.wait(60)
        count("before")
        done.set()

    with vp.wrap(model, "random:tokens=8") as run:
        earlier = threading.Thread(target=before)
        earlier.start()
        with run.override(tokens=2):
            opened.set()
            inside = threading.Thread(target=count, args=("inside",))
            inside.start()
            inside.join()
            count("caller")
            done.wait(60)
        earlier.join()
    assert counts == {"before": 8, "inside": 2, "caller": 2}


def test_pictures_encoded_shorter_are_not_used_unpruned():
    model = shared("llava")
    inputs = make_inputs("llava", model, SAMPLES[:1])
    with vp.wrap(model, "flowcut:tokens=4") as run, torch.no_grad():
        encoded = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        run.enabled = False
        with pytest.raises(vp.UsageError, match="encode them again"):
            model(**inputs, mm_encoder_outputs={"image": encoded})
