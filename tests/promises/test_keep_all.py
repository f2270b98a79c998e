"""A recipe that keeps every token changes no bit."""

from __future__ import annotations

import pytest
import torch
from cases import PRUNING
from oracles import (
    generate_logits,
)
from promises.runs import (
    LLAVAS,
    assert_untouched,
)
from promises.stages import BATCHES, STAGES, families
from tiny_models import (
    ALL_FAMILIES,
    FAMILIES,
    FLEX,
    implementations_of,
    make_inputs,
    shared,
)

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")

KEEP_ALL = [
    *(
        (family, row.recipe(arguments))
        for row in PRUNING
        for family in (LLAVAS if row.cls else ALL_FAMILIES)
        for arguments in row.all_kept()
    ),
    *((family, "pdrop:layer=1|3,fraction=1.0|1.0,positions=compact") for family in LLAVAS),
    *((family, "vscan:layer=0|3,fraction=1.0|1.0,positions=compact") for family in LLAVAS),
]


IN_OTHER_ATTENTION = [
    (family, recipe, attn)
    for family, attn in implementations_of(FAMILIES)
    if attn != "sdpa"
    for recipe in ("random:layer=1|3,fraction=1.0|1.0", "fastv:layer=2,fraction=1.0", "divprune:layer=0,fraction=1.0")
] + [("llava", "cls:layer=0,fraction=1.0", attn) for attn in ("eager", FLEX)]


@pytest.mark.parametrize(("family", "recipe", "attn"), [*((*case, "sdpa") for case in KEEP_ALL), *IN_OTHER_ATTENTION])
def test_keeping_everything_is_bit_identical(family, recipe, attn):
    """Red: the machinery itself (scores, towers, gathers, masks, caches) disturbs a model from which nothing is dropped."""
    model = shared(family, attn)
    with vp.wrap(model, recipe) as run:
        assert_untouched(family, model, attn)
        assert all(len(image.index) == image.original and image.features is None for image in run.last.kept)
        assert run.last.kept


@families
def test_text_only_prompt_simply_runs(family):
    """Red: a prompt without a picture is refused, is changed, or spoils the calls after it."""
    model = shared(family)
    text, inputs = make_inputs(family, model, [["text9"], ["text4"]]), make_inputs(family, model, BATCHES["ragged"])
    plain, (_, sequence, logits) = model(**text).logits, generate_logits(model, text)
    with vp.wrap(model, STAGES["1+3"][0]) as run:
        before = model(**inputs).logits
        assert torch.equal(model(**text).logits, plain)
        report = run.report()
        assert (report.visual_tokens, report.stages, report.flops) == (0, (), report.flops_unpruned)
        assert "no picture found: nothing to prune" in str(report)
        _, ours, our_logits = generate_logits(model, text)
        assert torch.equal(ours, sequence)
        assert torch.equal(our_logits, logits)
        assert torch.equal(model(**inputs).logits, before)
        assert run.report().visual_tokens
