"""Recipes, the batch they run on, and one greedy generation of each, which several tests look at.

The oracles (`tests/oracles/`) play what a run says it did on the un-pruned stock model. Whether a method chooses and merges as
its paper says is tested in `tests/methods/`; in this folder, that the model computes exactly what was chosen.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import PRUNING, ROWS
from oracles import (
    Effect,
    Entering,
    effect_of,
    generate_logits,
    separators,
)
from tiny_models import (
    ALL_FAMILIES,
    FAMILIES,
    LAYERS,
    image_lengths,
    make_inputs,
    shared,
)

import vlmprune as vp

LLAVAS, QWENS = ("llava", "llava_next"), ("qwen2_5_vl", "qwen2_vl")

# Rows of different lengths with different numbers of pictures (of different sizes but for LLaVA-1.5), text between two
# pictures, a picture at the very beginning, and a row without one.
BATCH = [["text7", "image", "text4"], ["text2", "image", "text3", "image", "text5"], ["text11"], ["image", "text9"]]

TEXT_ROW = 2

STEPS = 4

EVERYWHERE = [row.recipe(arguments) for row in PRUNING if not row.cls for arguments in row.tiny]

MUSTDROP, THRESHOLDS = (f"mustdrop:{arguments}" for arguments in ROWS["mustdrop"].tiny)

WITH_CLS = [row.recipe(arguments) for row in PRUNING if row.cls for arguments in row.tiny]

SINGLE = [
    *((family, recipe) for family in ALL_FAMILIES for recipe in EVERYWHERE),
    *((family, recipe) for family in LLAVAS for recipe in WITH_CLS),
    ("qwen2_vl", "flowcut:fraction=0.3,variant_on_units=unit"),
    ("llava_next", "flowcut:fraction=0.2,newlines=drop"),
    *(
        ("llava_next", f"{recipe},newlines=drop")
        for recipe in (
            "cls:layer=0,fraction=0.4",
            "divprune:layer=0,fraction=0.4",
            "fastv:layer=2,fraction=0.4",
            "holov:layer=0,fraction=0.4",
            "visionzip:fraction=0.4",
        )
    ),
]

COMPACT = [(family, f"{recipe},positions=compact") for family, recipe in SINGLE if family in LLAVAS]

COMPOSED = [
    *(
        (family, recipe)
        for family in ALL_FAMILIES
        for recipe in (
            "divprune:fraction=0.6 + random:layer=4,fraction=0.2",
            "dart:layer=2,fraction=0.6 + random:layer=4,fraction=0.2",
            "flowcut:fraction=0.6 + pdrop:layer=4,fraction=0.2",
            "tome:layer=1,fraction=0.5 + random:layer=3,tokens=0",
            "uniform:fraction=0.8 + fastv:layer=3,fraction=0.4,cache_layer=0",
            "divprune:fraction=0.6 + random:layer=4,fraction=0.2,cache_layer=2",
        )
    ),
    *(
        (family, recipe)
        for family in LLAVAS
        for recipe in (
            "visionzip:fraction=0.6 + fastv:layer=3,fraction=0.3",
            "visionzip:fraction=0.6,positions=compact + fastv:layer=3,fraction=0.3",
            "uniform:fraction=0.7 + sparsevlm:layer=2,fraction=0.5,positions=compact + random:layer=4,fraction=0.2",
            "mustdrop:layer=1,fraction=0.6,merge=0.3,cache_layer=0",
            "mustdrop:layer=1,fraction=0.6,merge=0.3,cache_layer=3 + cls:layer=4,fraction=0.3",
        )
    ),
]

STAGED = [  # one or several stages, from the first layer to the last
    *(
        (family, recipe)
        for family in FAMILIES
        for recipe in (
            "random:layer=2,fraction=0.5",
            "random:layer=1|3,fraction=0.6|0.3",
            "random:layer=2,tokens=0",
            f"random:layer={LAYERS - 1},fraction=0.25",
            "fastv:layer=1|4,fraction=0.5|0.2",
            "divprune:layer=3,tokens=5",
            "divprune:layer=0,fraction=0.75 + fastv:layer=2,fraction=0.5 + random:layer=4,fraction=0.2,seed=3",
        )
    ),
    ("llava", "cls:layer=2,fraction=0.5"),
]
CASES = SINGLE + COMPACT + COMPOSED + STAGED

FEW = [  # one of each kind: merging, tower, cache stage, compact, several stages
    ("llava", "fastv:layer=2,fraction=0.4,positions=compact"),
    ("llava", MUSTDROP),
    ("llava", "visionzip:fraction=0.4"),
    ("llava", "vscan:layer=0|3,fraction=0.5|0.25,positions=compact"),
    ("llava_next", "flowcut:fraction=0.3"),
    ("llava_next", "sparsevlm:layer=2,fraction=0.4,positions=compact"),
    ("qwen2_5_vl", "flowcut:fraction=0.3"),
    ("qwen2_5_vl", "dart:layer=2,fraction=0.4"),
    ("qwen2_vl", "flowcut:fraction=0.3"),
    ("qwen2_vl", "tome:layer=1,fraction=0.4"),
]


def over(cases):
    return pytest.mark.parametrize(("family", "recipe"), cases, ids=[f"{family}-{recipe}" for family, recipe in cases])


def without_cache_stage(cases):
    """The methods as they are where nothing can be forgotten after prefill."""
    return [
        (family, re.sub(r",cache_layer=\d", "", recipe) + ",cache_layer=-1" * ("mustdrop" in recipe))
        for family, recipe in cases
    ]


def one_sentence(refusal: Exception) -> None:
    assert "\n" not in str(refusal)


@dataclass(frozen=True)
class Ran:
    """One greedy generation of `BATCH`, which several tests look at."""

    inputs: dict
    effect: Effect
    last: Any
    report: vp.Report
    generated: torch.Tensor
    logits: torch.Tensor
    cache: Any


def run_on(model, inputs: dict, recipe: str, steps: int = STEPS, **strategy) -> Ran:
    with torch.no_grad(), Entering(model) as entering, vp.wrap(model, recipe) as run:
        output, generated, logits = generate_logits(model, inputs, steps, **strategy)
        effect = effect_of(model, inputs, run, entering.prompts[0])
        return Ran(inputs, effect, run.last, run.report(), generated, logits, output.past_key_values)


@functools.cache
def ran(family: str, recipe: str) -> Ran:
    model = shared(family)
    return run_on(model, make_inputs(family, model, BATCH), recipe)


@functools.cache
def untouched(family: str, attn: str = "sdpa") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences, logits of each step and logits of a plain forward of the model without us."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, BATCH)
    with torch.no_grad():
        output, _, logits = generate_logits(model, inputs, STEPS)
        return output.sequences, logits, model(**inputs).logits


def assert_untouched(family: str, model, attn: str = "sdpa") -> None:
    inputs = make_inputs(family, model, BATCH)
    output, _, logits = generate_logits(model, inputs, STEPS)
    real = inputs["attention_mask"].bool()
    for ours, theirs in zip((output.sequences, logits), untouched(family, attn), strict=False):
        assert torch.equal(ours, theirs)
    assert torch.equal(model(**inputs).logits[real], untouched(family, attn)[2][real])


def pictures(family: str, model, inputs: dict) -> list[int]:
    """Visual tokens of every picture, row separators left out."""
    if family == "llava_next":
        return [int((~separator).sum()) for separator in separators(model, inputs)]
    return [n for row in image_lengths(family, BATCH) for n in row]


KINDS = {
    "before the model": "random:layer=0,fraction=0.5,seed=0",
    "two stages": "random:layer=1|3,fraction=0.6|0.3,seed=0",
    "fastv": "fastv:layer=2,fraction=0.4",
}

recipes = pytest.mark.parametrize("recipe", KINDS.values(), ids=KINDS.keys())
