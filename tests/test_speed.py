"""The prefill timer measures the un-pruned model and every recipe in the same rounds, and leaves the model alone."""

from __future__ import annotations

import torch
from tiny_models import make_inputs, shared

from vlmprune.evals.speed import prefill


def test_prefill_times_every_recipe():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text5", "image", "text4"]])
    with torch.no_grad():
        before = model(**inputs).logits
    ticks: list[int] = []
    recipes = ["cls:layer=0,tokens=4", "fastv:layer=2,tokens=4"]
    whole, *pruned = prefill(model, inputs, recipes, rounds=3, tick=lambda: ticks.append(1))
    assert len(ticks) == 4 * 3  # a warm-up and three rounds of three
    assert whole.recipe == "un-pruned"
    assert whole.ratio == whole.flops == 1
    assert [timing.recipe for timing in pruned] == recipes
    for timing in (whole, *pruned):
        assert timing.rounds == 3
        assert 0 < timing.quartiles[0] <= timing.ms <= timing.quartiles[1]
    assert pruned[0].flops < pruned[1].flops < 1  # a cut at layer 0 saves more than one at layer 2
    assert pruned[0].kv_bytes < pruned[1].kv_bytes < whole.kv_bytes
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
