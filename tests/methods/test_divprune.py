"""DivPrune: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import pytest
import torch
from methods.comparing import hots, pictures, select, sizes
from methods.loops.divprune import divprune
from methods.views import random_view, replaced
from oracles import (
    projected_features,
)
from promises.stages import BATCHES, families
from tiny_models import make_inputs, shared

import vlmprune as vp
from vlmprune.kernels.select_diverse import greedy_order, select_diverse
from vlmprune.view import View

pytestmark = pytest.mark.usefixtures("no_grad")


@sizes
def test_divprune(seed, visual, keep, text):
    see = random_view(seed, visual=visual, text=text)
    expected = [sorted(divprune(own.features, keep)) for own in pictures(see)]
    assert select(vp.DivPrune(), see, keep)[0] == expected


def test_divprune_with_duplicates():
    """Equal distances everywhere: the lower index, and never the same twice."""
    see = replaced(random_view(images=3, visual=20), features=hots(3, 20))
    for keep in (1, 7, 12, 19):
        assert select(vp.DivPrune(), see, keep)[0] == [sorted(divprune(own.features, keep)) for own in pictures(see)]


def test_divprune_takes_no_token_twice():
    """20 vectors, each twice, 30 to keep: 30 different ones, where the official code gives 20."""
    vectors = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1)[None]
    see = View(0, 40, torch.arange(40)[None], {"features": vectors})
    for chosen in (vp.DivPrune().select(see, 30)[0].tolist(), greedy_order(vectors, 30, impl="reference")[0].tolist()):
        assert len(set(chosen)) == 30
        assert {index % 20 for index in chosen} == set(range(20)), "a duplicate was preferred to a new token"


@families
def test_divprune_keeps_what_the_paper_says(family):
    """Red: DivPrune looks at other features than those entering the language model, or deviates from its algorithm."""
    model = shared(family)
    inputs = make_inputs(family, model, BATCHES["ragged"])
    features = projected_features(model, inputs)
    with vp.wrap(model, vp.DivPrune(layer=0, tokens=7)) as run:
        model(**inputs)
        last = run.last
    assert [image.index.tolist() for image in last.kept] == [sorted(divprune(x, 7)) for x in features]


def circle(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_divprune_golden_circle():
    """Red: greedy max-min differs from the official selection (order 5, 0, 3, 6, 7) on eight points of a circle."""
    points = circle(0, 10, 25, 90, 104, 180, 263, 300)
    assert divprune(points, 5) == [5, 0, 3, 6, 7]
    assert greedy_order(points[None], 5).tolist() == [[5, 0, 3, 6, 7]]
    for keep in range(9):
        assert select_diverse(points[None], keep).tolist() == [sorted(divprune(points, keep))]
    see = View(0, 8, torch.arange(8)[None], {"features": points[None]})
    assert vp.DivPrune().select(see, 5).tolist() == [[0, 3, 5, 6, 7]]


def test_selection_ignores_scale():
    """Red: the distance is not the cosine's: the length of a feature decides."""
    features = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1))
    lengths = torch.rand(2, 24, 1, generator=torch.Generator().manual_seed(2)) * 8 + 0.5
    assert torch.equal(select_diverse(features * lengths, 9), select_diverse(features, 9))
