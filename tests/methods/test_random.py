"""Random tokens: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import math

import pytest
import torch
from methods.comparing import select
from oracles import (
    kept_sets,
)
from promises.stages import families
from tiny_models import make_inputs, shared

import vlmprune as vp
from vlmprune.view import View

pytestmark = pytest.mark.usefixtures("no_grad")


def test_random_is_reproducible():
    """The set follows from seed, layer and prompt alone: not from global seeds, other pictures, or the order of calls."""

    def draw(identity, seed=0, layer=0, visual=50, keep=20):
        see = View(layer, visual, torch.arange(visual).expand(len(identity), -1), {"identity": identity})
        return select(vp.Random(seed=seed), see, keep)[0]

    torch.manual_seed(1)
    first = draw((7, 8, 7))
    torch.manual_seed(2)
    assert draw((7, 8, 7)) == first
    assert draw((8,)) == [first[1]]
    assert first[0] == first[2]
    different = [first[0], first[1], draw((7,), seed=1)[0], draw((7,), layer=1)[0]]
    assert len(set(map(tuple, different))) == 4
    smaller = draw((7,), keep=5)[0]
    assert set(smaller) <= set(first[0])  # a smaller budget keeps some of the same


def test_random_is_uniform():
    """Over many prompts every token is kept as often as any other (4.5 standard deviations)."""
    visual, keep, prompts = 12, 5, 2000
    see = View(0, visual, torch.arange(visual).expand(prompts, -1), {"identity": tuple(range(prompts))})
    often = torch.bincount(vp.Random().select(see, keep).flatten(), minlength=visual).double() / prompts
    deviation = math.sqrt(keep / visual * (1 - keep / visual) / prompts)
    assert (often - keep / visual).abs().max() < 4.5 * deviation


@families
def test_random_depends_on_seed_and_picture(family):
    """Red: every image, or every seed, keeps the same fixed positions."""
    model = shared(family)
    inputs = make_inputs(family, model, [["text2", "image", "text3", "image", "text2", "image", "text5"]])
    sets = {}
    for seed in (0, 1):
        with vp.wrap(model, vp.Random(layer=2, fraction=0.5, seed=seed)) as run:
            model(**inputs)
            sets[seed] = kept_sets(run.last)
            model(**inputs)
            assert kept_sets(run.last) == sets[seed], "the same prompt twice must keep the same tokens"
    assert sets[0] != sets[1]
    assert sets[0][2, 0, 0] != sets[0][2, 0, 2], "two images of one size keep the same indices"
