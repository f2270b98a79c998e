"""Inside `torch.autocast`, rotated queries and keys are fp32 where values are bf16: every method takes them as they come."""

import pytest
import torch
from gradients import CLS_ONLY, COMPACT_ONLY, RECIPES
from tiny_models import build, make_inputs

import vlmprune as vp


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_every_method_runs_under_autocast(family, cached, grad):
    model = build(family)
    inputs = make_inputs(family, model, [["text3", "image", "text4"], ["text9"]])
    recipes = {**RECIPES, "flowcut, decoder": "flowcut:layer=2,fraction=0.4"}
    left_out = CLS_ONLY | COMPACT_ONLY if family == "qwen2_5_vl" else frozenset()
    for name, recipe in recipes.items():
        if name in left_out:
            continue
        with vp.wrap(model, recipe), torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
            logits = model(**inputs, use_cache=cached).logits
        assert logits.isfinite().all(), name


def test_a_row_chooses_the_same_alone_and_beside_another_under_autocast():
    model = build("llava")
    rows = [["text3", "image", "text4"], ["text2", "image", "text6"]]
    kept = []
    for samples in (rows, rows[:1]):
        with (
            vp.wrap(model, "flowcut:layer=2,fraction=0.4") as run,
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.no_grad(),
        ):
            model(**make_inputs("llava", model, samples), use_cache=False)
            kept.append(run.last.kept[0].index.tolist())
    assert kept[0] == kept[1]
