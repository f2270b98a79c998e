"""The numbers of `run.report()`, where layers differ: windows, shared keys, experts, recurrent layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.configs import LAYERS
from families.table import BATCHES, TINY, build, make_inputs, shared
from torch.utils.flop_counter import FlopCounterMode

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")


def bytes_of(cache: Any) -> int:
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None] if cache else []
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4_e", "gemma4_moe", "qwen3_vl_moe"])
def test_reported_bytes_are_the_caches(name):
    """Windows, shared keys and other widths in some layers included."""
    model = shared(name)
    inputs = make_inputs(name, BATCHES["long"])
    plain = bytes_of(model(**inputs, use_cache=True).past_key_values)
    with vp.wrap(model, "random:layer=1,fraction=0.3,cache_layer=0,seed=0") as run:
        pruned = bytes_of(model(**inputs, use_cache=True).past_key_values)
    report = run.report()
    assert (report.kv_bytes, report.kv_bytes_unpruned) == (pruned, plain)
    assert report.kv_bytes_peak > report.kv_bytes


def test_reported_flops_of_a_later_turn_know_what_left_the_window():
    """Red: the keys of all turns are counted in sliding layers, and what pruning saves there is overstated."""
    model, name = build("aya_vision", "eager"), "aya_vision"
    words, picture = (make_inputs(name, [parts], 1) for parts in (["text40"], ["text2", "image", "text3"]))
    turn = {**picture, "attention_mask": torch.cat([words["attention_mask"], picture["attention_mask"]], 1)}
    layers, reported = "AyaVisionForConditionalGeneration.model.language_model.layers.", []
    for recipe in ("random:fraction=1.0", "random:layer=2,fraction=0.4,seed=0"):
        with vp.wrap(model, recipe) as run:
            cache = model(**words, use_cache=True).past_key_values
            with FlopCounterMode(display=False) as counter:
                model(**turn, past_key_values=cache)
        counted = counter.get_flop_counts()
        reported.append(run.report().flops)
        assert reported[-1] == sum(sum(counted[f"{layers}{index}"].values()) for index in range(LAYERS))
    assert run.report().flops_unpruned == reported[0]


@pytest.mark.parametrize("name", ["gemma4", "gemma4_e", "gemma4_moe", "glm4v_moe", "qwen3_vl_moe", "qwen3_5", "lfm2_vl"])
def test_reported_flops_are_those_of_the_layers(name):
    """As torch counts them in the layers, with experts that are run one by one. What recurrent layers do beside multiplying by
    their weights is not reported."""
    model = build(name, "eager")
    model.set_experts_implementation("eager")
    inputs = make_inputs(name, BATCHES["long"])
    layers = f"{type(model).__name__}.model.language_model.layers."
    for recipe in ("random:fraction=1.0", "random:layer=2,fraction=0.4,seed=0"):
        with vp.wrap(model, recipe) as run, FlopCounterMode(display=False) as counter:
            model(**inputs)
        counted = sum(
            sum(flops.values())
            for module, flops in counter.get_flop_counts().items()
            if module.startswith(layers) and module.removeprefix(layers).isdigit()
        )
        reported = run.report().flops
        if TINY[name].recurrent:
            assert 0.6 * counted < reported <= counted
        else:
            assert reported == counted
    assert run.report().flops < run.report().flops_unpruned
