"""What a sample keeps and computes depends on no other sample, on no padding, and on no earlier call."""

from __future__ import annotations

import functools

import pytest
import torch
from oracles import (
    TOLERANCE,
    decisions,
    generate_logits,
    image_columns,
    kept_sets,
)
from promises.runs import (
    BATCH,
    CASES,
    SINGLE,
    STEPS,
    TEXT_ROW,
    over,
    ran,
    run_on,
)
from promises.stages import BATCHES, METHODS, families
from tiny_models import (
    make_inputs,
    make_single,
    shared,
)

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")


@functools.cache
def text_alone(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of text by the stock model: in a batch, pruning leaves it as it is."""
    return generate_logits(shared(family), make_single(family, shared(family), BATCH, TEXT_ROW), STEPS)[1:]


@over(CASES)
def test_a_batch_equals_its_rows_alone(family, recipe):
    """Red: what a picture keeps, or a row computes, depends on who shares its batch."""
    model, it = shared(family), ran(family, recipe)
    together = decisions(it.last)
    for row in range(len(BATCH)):
        single = make_single(family, model, BATCH, row)
        if row == TEXT_ROW:
            generated, logits = text_alone(family)
        else:
            alone = run_on(model, single, recipe)
            assert decisions(alone.last) == {(*key[:2], 0, key[3]): value for key, value in together.items() if key[2] == row}
            generated, logits = alone.generated, alone.logits
        assert torch.equal(generated[0], it.generated[row])
        torch.testing.assert_close(logits[0], it.logits[row], atol=TOLERANCE, rtol=0)


def test_the_batch_is_uneven():
    """Red: the test above compares rows of one length, or with one number of kept tokens."""
    for family, recipe in SINGLE:
        it = ran(family, recipe)
        assert len(set(it.inputs["attention_mask"].sum(1).tolist())) == len(BATCH)
        visual = image_columns(shared(family), it.inputs["input_ids"])
        assert len(set((it.effect.keep[max(it.effect.keep)] & visual).sum(1).tolist())) >= 3


@over(SINGLE)
def test_the_same_seed_is_the_same_set(family, recipe):
    """Red: a choice depends on what ran before, or on torch's random state."""
    model, it = shared(family), ran(family, recipe)
    torch.manual_seed(123)
    again = run_on(model, it.inputs, recipe)
    assert decisions(again.last) == decisions(it.last)
    assert torch.equal(again.logits, it.logits)
    if recipe.startswith("random"):
        assert decisions(run_on(model, it.inputs, f"{recipe},seed=1").last) != decisions(it.last)


@families
@pytest.mark.parametrize("method", ["random:layer=2,fraction=0.5", METHODS["fastv"], METHODS["divprune deep"]])
def test_padding_side_does_not_matter(family, method):
    """Red: with right padding, scores are read at a padding token, or images are looked for at the wrong columns."""
    model = shared(family)
    sets, logits = {}, {}
    for pad in ("left", "right"):
        inputs = make_inputs(family, model, BATCHES["with text row"], pad=pad)
        with vp.wrap(model, method) as run:
            full = model(**inputs).logits
            sets[pad] = kept_sets(run.last)
            logits[pad] = full[run.last.keep[max(run.last.keep)]]
    assert sets["left"] == sets["right"]
    torch.testing.assert_close(logits["left"], logits["right"], atol=TOLERANCE, rtol=0)
