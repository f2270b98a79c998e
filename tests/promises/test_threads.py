"""Several threads, one or several models."""

from __future__ import annotations

import pytest
from callers import (
    assert_same,
    in_threads,
    several_generations,
)
from oracles import (
    decoder_layers,
)
from promises.runs import (
    KINDS,
)
from tiny_models import (
    FAMILIES,
    build,
    shared,
    warm_up,
)

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("others", FAMILIES)
def test_two_models_in_two_threads(others):
    """Red: a call's context is global, so that two models disturb each other."""
    jobs = []
    for family, recipe, seed in (("llava", "fastv:layer=2,fraction=0.4", 0), (others, KINDS["two stages"], 10)):
        model = build(family, seed=seed)
        warm_up(model, family)

        def job(family=family, recipe=recipe, seed=seed, model=model):
            out = []
            for _ in range(2):
                with vp.wrap(model, recipe):
                    out += several_generations(family, model, range(seed, seed + 3))
                out += several_generations(family, model, [seed])
            return out

        jobs.append(job)
    expected = [job() for job in jobs]
    for ours, theirs in zip(in_threads(*jobs), expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llava", "fastv:layer=2,fraction=0.4"),
        ("llava", "cls:layer=0,fraction=0.4"),
        ("llava", KINDS["two stages"]),
        ("qwen2_5_vl", "fastv:layer=2,fraction=0.4"),
        ("qwen2_5_vl", KINDS["two stages"]),
    ],
)
def test_one_model_in_two_threads(family, recipe, use_cache):
    """Red: the state of a call lives on the run or on the model, so that two callers mix their prompts."""
    model = shared(family)
    layers = decoder_layers(model)
    meet_in = [layers[0], layers[2]]
    if family == "llava":
        meet_in.append(model.model.vision_tower.encoder.layers[-1])
    with vp.wrap(model, recipe):
        jobs = [
            lambda seed=seed: several_generations(family, model, range(seed, seed + 2), use_cache=use_cache)
            for seed in (0, 100)
        ]
        expected = [job() for job in jobs]
        got = in_threads(*jobs, meet_in=meet_in)
    for ours, theirs in zip(got, expected, strict=True):
        assert_same(ours, theirs)
