"""The CLS token's attention (FasterVLM's rule): the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import pytest
from methods.comparing import quantised, select, sizes
from methods.loops.cls import cls
from methods.views import random_view
from oracles import (
    cls_scores,
)
from promises.stages import BATCHES
from tiny_models import make_inputs, shared

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")


@sizes
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_cls(ties, seed, visual, keep, text):
    """The mean over heads of one row of attention; ties go to the lower index."""
    see = random_view(seed, visual=visual, text=text)
    see = quantised(see) if ties else see
    expected = [cls(heads.tolist(), keep) for heads in see.probes["attention_from_cls"]]
    assert select(vp.CLS(), see, keep)[0] == expected


def test_cls_keeps_what_the_towers_eager_attention_says():
    """Red: wrong tower block, the CLS column itself counted, or images of a batch confused."""
    model = shared("llava")
    inputs = make_inputs("llava", model, BATCHES["ragged"])
    scores = cls_scores(shared("llava", "eager"), inputs["pixel_values"])
    for call in (lambda: model(**inputs), lambda: model.generate(**inputs, max_new_tokens=2)):
        with vp.wrap(model, "cls:layer=0,fraction=0.5") as run:
            call()
            last = run.last
        assert [image.index.tolist() for image in last.kept] == [sorted(row.topk(8).indices.tolist()) for row in scores]
