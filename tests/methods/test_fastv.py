"""FastV: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import pytest
from methods.comparing import quantised, select, sizes
from methods.loops.fastv import fastv
from methods.views import random_view
from oracles import (
    columns_of_image,
    fastv_scores,
)
from promises.stages import BATCHES, implementations
from tiny_models import make_inputs, shared

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")


@sizes
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_fastv(ties, seed, visual, keep, text):
    """The mean over heads of one row of attention; ties go to the lower index."""
    see = random_view(seed, visual=visual, text=text)
    see = quantised(see) if ties else see
    expected = [fastv(heads.tolist(), keep) for heads in see.probes["attention_from_last"]]
    assert select(vp.FastV(), see, keep)[0] == expected


@implementations
@pytest.mark.parametrize("layer", [1, 2, 4])
def test_fastv_keeps_what_eager_attention_says(family, attn, layer):
    """Red: wrong layer, wrong query row, wrong heads, or padding counted, in FastV's score."""
    model = shared(family, attn)
    samples = BATCHES["ragged"]
    inputs = make_inputs(family, model, samples)
    scores = fastv_scores(shared(family, "eager"), inputs, layer)
    with vp.wrap(model, vp.FastV(layer=layer, fraction=0.5)) as run:
        model(**inputs)
        last = run.last
    assert len(last.kept) == 4
    for image in last.kept:
        of_image = scores[image.sample, columns_of_image(model, inputs, image.sample, image.ordinal)]
        assert image.index.tolist() == sorted(of_image.topk(len(of_image) // 2).indices.tolist())


@implementations
def test_fastv_second_stage_sees_the_pruned_attention(family, attn):
    """Red: the second stage's scores come from a layer that still saw the dropped tokens, or from the wrong tokens."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, BATCHES["ragged"])
    with vp.wrap(model, "random:layer=1,fraction=0.6,seed=0 + fastv:layer=3,fraction=0.3") as run:
        model(**inputs)
        last = run.last
    scores = fastv_scores(shared(family, "eager"), inputs, 3, {1: last.keep[1]})
    scores = scores.masked_fill(~last.keep[1], -1)
    for image in (image for image in last.kept if image.layer == 3):
        of_image = scores[image.sample, columns_of_image(model, inputs, image.sample, image.ordinal)]
        assert image.index.tolist() == sorted(of_image.topk(len(image.index)).indices.tolist())
