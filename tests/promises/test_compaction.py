"""Compaction: one launch per stage, one per group of layers in the cache, and the memory of what was dropped is given back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny_models import build, make_inputs
from transformers import DynamicCache

import vlmprune as vp
import vlmprune.live.pruning
import vlmprune.live.rows

SAMPLES = [["text3", "image", "text4"], ["text5", "image", "text2"]]
FORGETS = [
    ("fastv:layer=2,tokens=4,cache_layer=0", 1),
    ("mustdrop:layer=2|4,tokens=8|4,merge=2,cache_layer=1", 2),  # before the first cut, and between the two
    ("random:layer=2,tokens=8 + fastv:layer=4,tokens=4,cache_layer=3", 1),
]


@pytest.fixture
def launches(monkeypatch):
    """Tensors moved in each launch."""
    moved: list[int] = []
    gather_all, gather_tokens = vlmprune.live.rows.gather_all, vlmprune.live.rows.gather_tokens

    def all_of_them(tensors, *rest):
        moved.append(len(tensors))
        return gather_all(tensors, *rest)

    def one(*args):
        moved.append(1)
        return gather_tokens(*args)

    monkeypatch.setattr(vlmprune.live.rows, "gather_all", all_of_them)
    monkeypatch.setattr(vlmprune.live.rows, "gather_tokens", one)
    return moved


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_a_stage_is_one_launch(family, launches):
    """Hidden states, cosines and sines together."""
    model = build(family)
    with vp.wrap(model, "random:layer=0,tokens=12 + fastv:layer=2,tokens=8 + random:layer=4,tokens=4"):
        model(**make_inputs(family, model, SAMPLES))
    assert launches == [3, 3, 3]


@pytest.mark.parametrize(("recipe", "groups"), FORGETS)
@torch.no_grad()
def test_the_cache_is_one_launch_per_group(recipe, groups, launches):
    """Keys and values of all layers that store the same entries together."""
    model = build("llava")
    with vp.wrap(model, recipe) as run:
        model(**make_inputs("llava", model, SAMPLES))
    stages = sum(stage.site == "llm" for stage in run.report().stages)
    cache = launches[stages:]
    assert len(cache) == groups
    last = max(stage.layer for stage in run.report().stages if stage.site == "llm")
    assert sum(cache) == 2 * (last - run.report().stages[-1].layer)  # behind the last cut there is nothing to forget


@pytest.mark.parametrize(("recipe", "groups"), FORGETS)
@torch.no_grad()
def test_memory_of_the_cache_is_given_back_and_reported(recipe, groups, monkeypatch):
    model, cache = build("llava"), DynamicCache()
    before: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []
    keep_only = vlmprune.live.pruning.keep_only

    def bytes_of(layers) -> int:
        return sum(x.untyped_storage().nbytes() for layer in layers for x in (layer.keys, layer.values))

    def watched(layers, *rest):
        before.extend(weakref.ref(x) for layer in layers for x in (layer.keys, layer.values))
        whole = bytes_of(cache.layers)
        keep_only(layers, *rest)
        held.append(whole + bytes_of(layers))

    monkeypatch.setattr(vlmprune.live.pruning, "keep_only", watched)
    with vp.wrap(model, recipe) as run:
        model(**make_inputs("llava", model, SAMPLES), past_key_values=cache)
    report = run.report()
    gc.collect()
    assert len(held) == groups
    assert not [old for old in before if old() is not None]
    assert report.kv_bytes == bytes_of(cache.layers)
    assert report.kv_bytes_peak == max(held)
    assert "before the cache was shortened" in str(report)


@torch.no_grad()
def test_without_a_cache_stage_the_peak_is_what_stays():
    model = build("llava")
    with vp.wrap(model, "fastv:layer=2,tokens=4") as run:
        model(**make_inputs("llava", model, SAMPLES))
    assert run.report().kv_bytes_peak == run.report().kv_bytes
    assert "before the cache" not in str(run.report())
