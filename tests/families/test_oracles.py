"""The oracles agree with the stock model, with each other, and notice what they are there to notice."""

from __future__ import annotations

import pytest
import torch
from families.oracles import (
    MOVED,
    TOLERANCE,
    Keep,
    before_layers,
    dropped_logits,
    dropped_row,
    expected_logits,
    language_model,
    masked_logits,
    native_logits,
    whole,
)
from families.running import generate
from families.table import BATCHES, LAYERS, NAMES, TINY, make_inputs, make_single, shared, visual_columns

pytestmark = pytest.mark.usefixtures("no_grad")

families = pytest.mark.parametrize("name", NAMES)
WORDS = torch.tensor([[11, 40, 73, 20]])


def drop_some(inputs: dict, shares: dict[int, float]) -> Keep:
    """Visual tokens dropped at random, more at each stage; text never."""
    visual, real = visual_columns(inputs), inputs["attention_mask"].bool()
    luck = torch.rand(visual.shape, generator=torch.Generator().manual_seed(5))
    return {layer: real & (~visual | (luck < share)) for layer, share in shares.items()}


@families
def test_batches_are_really_ragged(name):
    """Red: rows that look ragged have the same number of tokens, so that a mask that is forgotten changes nothing."""
    inputs = make_inputs(name, BATCHES["ragged"])
    lengths, visual = inputs["attention_mask"].sum(1), visual_columns(inputs).sum(1)
    assert len(set(lengths.tolist())) == 3
    assert len(set(visual.tolist())) >= 2
    assert make_inputs(name, BATCHES["text row"])["attention_mask"].sum(1).unique().numel() == 3
    for row in range(3):
        single = make_single(name, BATCHES["ragged"], row)
        assert torch.equal(single["input_ids"][0], inputs["input_ids"][row, -int(lengths[row]) :])


@families
@pytest.mark.parametrize("batch", ["long", "ragged", "text row"])
def test_the_oracle_that_hides_nothing_is_the_stock_model(name, batch):
    """Red: positions, kinds of new tokens, or masks of a call without a cache are not those of `generate`."""
    model = shared(name)
    inputs = make_inputs(name, BATCHES[batch])
    _, new, logits = generate(model, inputs)
    expected = expected_logits(name, model, BATCHES[batch], {}, new[:, :-1])
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    assert logits.std() > 0.8


@pytest.mark.parametrize("name", [name for name in NAMES if not TINY[name].recurrent])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_equals_dropped(name, attention):
    """Red: one of the two misses a window, a block, an injected layer, a shared key or a per-layer input."""
    if attention not in TINY[name].attentions:
        attention = TINY[name].attentions[0]
    model = shared(name, attention)
    for batch in ("long", "pictures"):
        inputs = make_inputs(name, BATCHES[batch])
        for shares in ({0: 0.5}, {2: 0.5}, {1: 0.6, 2: 0.3}):
            keep = drop_some(inputs, shares)
            dropped, columns = dropped_logits(name, model, inputs, keep, WORDS)
            masked = masked_logits(name, model, inputs, keep, WORDS)[:, columns]
            torch.testing.assert_close(dropped, masked, atol=TOLERANCE, rtol=0)
            assert (dropped - masked_logits(name, model, inputs, {}, WORDS)[:, columns]).abs().max() > MOVED


@pytest.mark.parametrize(
    "name", [name for name in NAMES if not (TINY[name].window or TINY[name].blocks or TINY[name].injected)]
)
def test_dropped_before_the_model_equals_shorter_embeddings(name):
    """Red: something of a dropped token is left behind; recurrent layers have no other judge."""
    model = shared(name)
    inputs = make_inputs(name, BATCHES["pictures"])
    keep = drop_some(inputs, {0: 0.5})
    dropped, _ = dropped_logits(name, model, inputs, keep, WORDS)
    native = native_logits(name, model, inputs, keep[0], WORDS)
    if hasattr(model.config.get_text_config(), "logit_scale"):
        native = native * model.config.get_text_config().logit_scale
    torch.testing.assert_close(dropped, native, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if TINY[name].recurrent])
def test_masking_is_not_dropping_in_recurrent_layers(name):
    """Why these families have the oracle *dropped* only: a hidden token still moves the state. Red: it no longer does."""
    model = shared(name)
    inputs = make_single(name, BATCHES["pictures"], 0)
    keep = drop_some(inputs, {0: 0.5})
    dropped, columns = dropped_logits(name, model, inputs, keep)
    length = keep[0].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril() & keep[0] | torch.eye(length, dtype=torch.bool)

    def hide(index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        has_attention = hasattr(language_model(model).layers[index], "self_attn")
        return args, {**kwargs, "attention_mask": causal[None, None] if has_attention else keep[0].long()}

    with before_layers(model, hide):
        masked = model(**whole(name, model, inputs, None)).logits[:, columns]
    assert (dropped - masked).abs().max() > MOVED


@pytest.mark.parametrize("name", [name for name in NAMES if TINY[name].window])
def test_windows_matter(name):
    """Red: the prompts are so short that no window hides anything, and a forgotten one is not noticed."""
    model = shared(name)
    inputs = make_inputs(name, BATCHES["long"])
    narrow = masked_logits(name, model, inputs, {}, WORDS)
    config = language_model(model).config
    window, config.sliding_window = config.sliding_window, 1000
    try:
        wide = masked_logits(name, model, inputs, {}, WORDS)
    finally:
        config.sliding_window = window
    assert (narrow - wide).abs().max() > MOVED


@pytest.mark.parametrize("name", [name for name in NAMES if TINY[name].blocks])
def test_blocks_matter(name):
    """Red: a causal mask in the place of the blocks is not noticed."""
    model = shared(name)
    inputs = make_inputs(name, BATCHES["pictures"])
    causal = {name_: value for name_, value in inputs.items() if name_ != TINY[name].kinds}
    if TINY[name].kind_of_new:
        causal[TINY[name].kinds] = torch.ones_like(inputs["input_ids"])
    assert (model(**inputs).logits - model(**causal).logits).abs().max() > MOVED


@pytest.mark.parametrize("name", [name for name in NAMES if TINY[name].injected])
def test_injected_features_matter(name):
    """Red: a cut before the last injected layer may forget them unnoticed."""
    model = shared(name)
    inputs = make_inputs(name, BATCHES["pictures"])
    whole = model(**inputs).logits
    text = language_model(model)
    text._deepstack_process = lambda hidden, places, features: hidden
    try:
        without = model(**inputs).logits
    finally:
        del text._deepstack_process
    assert (whole - without).abs().max() > MOVED


def test_a_wrong_claim_is_noticed():
    """Red: the oracles say yes to anything."""
    for name in ("gemma3", "qwen3_vl", "qwen3_5", "internvl"):
        model = shared(name)
        inputs = make_single(name, BATCHES["ragged"], 1)
        keep = drop_some(inputs, {2: 0.5})
        other = {2: keep[2].clone()}
        other[2][0, int(keep[2][0].logical_and(visual_columns(inputs)[0]).nonzero()[0])] = False  # one token fewer
        ours, theirs = (dropped_row(name, model, BATCHES["ragged"][1:2], 0, claim, WORDS) for claim in (keep, other))
        assert (ours - theirs).abs().max() > 100 * TOLERANCE


def test_the_tiny_models_have_the_layers_that_stages_name():
    for name in NAMES:
        assert len(language_model(shared(name)).layers) == LAYERS
