"""What every redistribution method promises: batches, steps, conversations, neutrality, removal, no leak."""

from __future__ import annotations

import pytest
import torch
from cases import REDISTRIBUTION
from oracles import TOLERANCE, generate_logits
from redistribution.recipes import CASES, SAMPLES
from tiny_models import attentions_of, make_inputs, make_single, shared

import vlmprune as vp

every_case = pytest.mark.parametrize(("family", "recipe"), CASES)

every_attention = pytest.mark.parametrize(
    ("family", "recipe", "attn"),
    [pytest.param(*case.values, attn, id=f"{case.id}-{attn}") for case in CASES for attn in attentions_of(case.values[0])],
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@every_case
def test_batch_equals_singles(family, recipe):
    """Red: padding, other samples' pictures, or rows of samples without one leak into a sample."""
    model = shared(family)
    with vp.wrap(model, recipe):
        _, generated, logits = generate_logits(model, make_inputs(family, model, SAMPLES), 4)
        for row in range(3):
            _, alone, expected = generate_logits(model, make_single(family, model, SAMPLES, row), 4)
            assert torch.equal(generated[row : row + 1], alone)
            torch.testing.assert_close(logits[row : row + 1], expected, atol=TOLERANCE, rtol=0)
    _, _, plain = generate_logits(model, make_inputs(family, model, SAMPLES), 1)
    torch.testing.assert_close(logits[2, 0], plain[2, 0], atol=TOLERANCE, rtol=0)


@every_case
@pytest.mark.parametrize("pruned", ["", "random:layer=0|3,fraction=0.7|0.4,seed=0 + "], ids=["", "pruned"])
def test_without_a_cache(family, recipe, pruned):
    """Red: what is marked at the prompt is marked anew, or for generated tokens, when the prompt is run again."""
    model = shared(family)
    inputs = make_inputs(family, model, SAMPLES)
    with vp.wrap(model, pruned + recipe):
        _, cached, expected = generate_logits(model, inputs, 5)
        _, uncached, logits = generate_logits(model, inputs, 5, use_cache=False)
    assert torch.equal(cached, uncached)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@every_case
def test_interleaved_conversations(family, recipe):
    """Red: anything of one conversation is kept outside its cache."""
    model = shared(family)
    prompts = [make_inputs(family, model, [SAMPLES[0]], seed=seed) for seed in (1, 2)]

    def step(inputs, cache, length):
        token = torch.full((1, 1), 20 + length)
        mask = torch.ones(1, inputs["input_ids"].shape[1] + length)
        kwargs = {"position_ids": torch.full((3, 1, 1), 50 + length)} if "image_grid_thw" in inputs else {}
        return model(input_ids=token, attention_mask=mask, past_key_values=cache, **kwargs).logits

    def alone(inputs):
        output = model(**inputs, use_cache=True)
        return [output.logits, *(step(inputs, output.past_key_values, n) for n in (1, 2, 3))]

    with vp.wrap(model, recipe):
        expected = [alone(inputs) for inputs in prompts]
        outputs = [model(**inputs, use_cache=True) for inputs in prompts]
        found = [[output.logits] for output in outputs]
        for n in (1, 2, 3):
            for index, inputs in enumerate(prompts):
                found[index].append(step(inputs, outputs[index].past_key_values, n))
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


NEUTRAL = [row.recipe(arguments) for row in REDISTRIBUTION for arguments in row.neutral]


@pytest.mark.parametrize("attn", attentions_of("llava"))
@pytest.mark.parametrize("recipe", NEUTRAL)
def test_neutral_is_bit_identical(attn, recipe):
    """Red: the machinery disturbs a model in which nothing is edited."""
    model = shared("llava", attn)
    inputs = make_inputs("llava", model, SAMPLES)
    plain = model(**inputs).logits
    with vp.wrap(model, recipe):
        assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, plain)


@every_attention
def test_removal_is_bit_identical(family, recipe, attn):
    model = shared(family, attn)
    inputs = make_inputs(family, model, SAMPLES)
    plain = model(**inputs).logits
    run = vp.wrap(model, recipe)
    assert not torch.equal(model(**inputs).logits, plain)
    run.remove()
    assert torch.equal(model(**inputs).logits, plain)


@every_attention
def test_no_leak_from_later_tokens(family, recipe, attn):
    """Red: an edit ignores the causal mask, which SDPA leaves implicit. ACT and VHR look at the whole prompt, by design."""
    if not vp.REDISTRIBUTORS[recipe.partition(":")[0]].causal:
        assert recipe.startswith(("act", "vhr"))
        return
    model = shared(family, attn)
    inputs = make_inputs(family, model, [SAMPLES[1]])
    del inputs["attention_mask"]
    with vp.wrap(model, recipe):
        before = model(**inputs).logits
        changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
        changed["input_ids"][0, -1] = 90 if inputs["input_ids"][0, -1] != 90 else 91
        after = model(**changed).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
