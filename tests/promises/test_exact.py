"""A pruned model computes what the un-pruned one computes with the same tokens masked, at the prompt and at each step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import (
    TOLERANCE,
    Entering,
    assert_equals_masked,
    decisions,
    effect_of,
    generate_logits,
    kept_sets,
    masked_logits,
    naively_dropped_logits,
    physical_lengths,
    prompt_positions,
    resident_lengths,
    scheduled_lengths,
)
from promises.runs import (
    BATCH,
    CASES,
    COMPACT,
    SINGLE,
    STEPS,
    one_sentence,
    over,
    ran,
    run_on,
    without_cache_stage,
)
from promises.stages import BATCHES, METHODS, STAGES, families, implementations
from tiny_models import (
    ALL_FAMILIES,
    FLEX,
    FLEX_FAMILIES,
    LAYERS,
    make_inputs,
    make_single,
    shared,
)

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")


def test_every_pair_of_a_method_and_a_family_is_here():
    """Red: a family that a method works with is left out."""
    claimed = set()
    for name in vp.METHODS:
        for family in ALL_FAMILIES:
            try:
                vp.wrap(
                    shared(family), f"{name}:layer=2|3,fraction=0.5|0.2" if name in ("mustdrop", "adaptinfer") else name
                ).remove()
            except vp.UsageError as refusal:
                if "CLS" in str(refusal):
                    continue
            claimed.add((family, name))
    assert {(family, recipe.split(":")[0]) for family, recipe in SINGLE} == claimed
    assert len(vp.METHODS) >= 16


@over(CASES)
def test_generation_equals_masked(family, recipe):
    """Red: prefill or a decoding step computes with a wrong token, feature, position or mask."""
    it = ran(family, recipe)
    assert_equals_masked(shared(family), it.inputs, it.effect, it.generated, it.logits)


@over(CASES)
def test_all_logits_of_a_plain_forward_equal_masked(family, recipe):
    """Red: logits at another place than the last token are wrong; the layers behind the last stage forget a row."""
    model, it = shared(family), ran(family, recipe)
    positions = prompt_positions(model, it.inputs)  # generate's: DART's key norms depend on them
    with vp.wrap(model, recipe) as run:
        logits = model(**it.inputs, position_ids=positions, use_cache=False).logits
        assert decisions(run.last).items() <= decisions(it.last).items(), "another choice than under generate"
    kept = it.effect.real.clone()
    for mask in it.effect.keep.values():
        kept &= mask
    expected = masked_logits(model, it.inputs, replace(it.effect, keep_cache={}))
    torch.testing.assert_close(logits[kept], expected[kept], atol=TOLERANCE, rtol=0)


TWICE_IN_THE_TOWER = [  # the second looks where the first has dropped patches already
    ("llava", "flowcut:fraction=0.6 + vscan:layer=0|3,fraction=0.4|0.2"),
    ("llava", "mustdrop:layer=2,fraction=0.5,merge=0.3 + vscan:layer=0|3,fraction=0.5|0.25"),
    ("llava", "flowcut:fraction=0.6 + visionzip:fraction=0.4"),
    ("llava_next", "mustdrop:layer=2,fraction=0.5,merge=0.3 + visionzip:fraction=0.5"),
    ("qwen2_vl", "flowcut:fraction=0.3 + flowcut:layer=4,fraction=0.2"),
]


@over(TWICE_IN_THE_TOWER)
def test_two_methods_in_the_tower_are_exact_or_refused(family, recipe):
    """Red: what the tower knew of a token is lost or given to another where a method before it shortened the sequence."""
    model = shared(family)
    try:
        vp.wrap(model, recipe).remove()
    except vp.UsageError as refusal:
        return one_sentence(refusal)
    it = ran(family, recipe)
    assert_equals_masked(model, it.inputs, it.effect, it.generated, it.logits)


@pytest.mark.parametrize("recipe", ["visionzip:tokens=4,contextual=1", "vscan:layer=0|3,fraction=0.95|0.2"])
def test_a_view_that_keeps_nothing_or_all_leaves_the_merging_of_the_others(recipe):
    """Red: what was merged in the other views of a picture is silently thrown away."""
    it = ran("llava_next", recipe)
    cut = [image for image in it.last.kept if image.layer == 0 and len(image.index) < image.original]
    assert cut
    assert all(image.features is not None and len(image.features) == len(image.index) for image in cut)
    assert_equals_masked(shared("llava_next"), it.inputs, it.effect, it.generated, it.logits)


@over(SINGLE)
def test_generation_equals_masked_in_eager(family, recipe):
    """Red: scores, masks or features of eager models; or a decoding step after a cut has masks of a wrong size."""
    model = shared(family, "eager")
    it = run_on(model, make_inputs(family, model, BATCH), recipe, 2)
    assert_equals_masked(model, it.inputs, it.effect, it.generated, it.logits)


@over([case for case in SINGLE if case[0] in FLEX_FAMILIES])
def test_generation_equals_masked_in_flex_attention(family, recipe):
    """Red: scores, tower or masks of models that run flex attention; or it chooses otherwise than SDPA."""
    model = shared(family, FLEX)
    it = run_on(model, make_inputs(family, model, BATCH), recipe, 2)
    assert_equals_masked(model, it.inputs, it.effect, it.generated, it.logits)
    assert decisions(it.last) == decisions(ran(family, recipe).last)


@over(without_cache_stage(SINGLE + COMPACT))
def test_generation_equals_the_recomputed_pruned_sequence(family, recipe):
    """Red: prefill and cached steps differ from running the sequence again with its rows really cut out."""
    model = shared(family)
    it = run_on(model, make_single(family, model, BATCH, 1), recipe)
    logits, columns = naively_dropped_logits(model, it.inputs, it.effect, it.generated[:, :-1])
    assert len(columns) == resident_lengths(it.effect, LAYERS)[-1] + STEPS - 1
    torch.testing.assert_close(logits[:, -STEPS:], it.logits, atol=TOLERANCE, rtol=0)


@over(SINGLE + COMPACT)
def test_no_mask_and_no_cache_equal_the_mask_of_ones(family, recipe):
    """Red: without mask and cache, gaps in the positions are taken for packed sequences."""
    model = shared(family)
    inputs = make_single(family, model, BATCH, 1)
    assert inputs["attention_mask"].all()
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with vp.wrap(model, recipe) as run:
        expected = model(**inputs, use_cache=True).logits[:, -1]
        chosen = decisions(run.last)
        assert torch.equal(model(**bare, use_cache=False).logits[:, -1], expected)
        assert decisions(run.last).items() <= chosen.items()
        torch.testing.assert_close(model(**bare, use_cache=True).logits[:, -1], expected, atol=TOLERANCE, rtol=0)


@over(SINGLE + COMPACT)
def test_padding_on_the_right_equals_masked(family, recipe):
    """Red: the end of the prompt, its text or its pictures are looked for at the columns of a left-padded prompt."""
    model, left = shared(family), ran(family, recipe)
    inputs = make_inputs(family, model, BATCH, pad="right")
    with Entering(model) as entering, vp.wrap(model, recipe) as run:
        logits = model(**inputs, use_cache=False).logits
        effect = effect_of(model, inputs, run, entering.prompts[0])
    assert decisions(run.last).items() <= decisions(left.last).items()
    kept = effect.keep[max(effect.keep)]
    torch.testing.assert_close(logits[kept], masked_logits(model, inputs, effect)[kept], atol=TOLERANCE, rtol=0)


@implementations
@pytest.mark.parametrize(("batch", "stages"), [("one image", "0"), ("one image", "1+3"), ("with text row", "1+3")])
def test_generate_equals_masked(family, attn, batch, stages):
    """In every attention implementation. Red: an unpadded sample, which needs no mask of ours, sees tokens behind it."""
    recipe, budgets = STAGES[stages]
    model = shared(family, attn)
    inputs = make_inputs(family, model, BATCHES[batch])
    with vp.wrap(model, recipe) as run:
        output, generated, logits = generate_logits(model, inputs)
        keep = run.last.keep
    assert set(keep) == set(budgets)
    assert_equals_masked(model, inputs, keep, generated, logits)

    steps = generated.shape[1] - 1
    expected = [n + steps for n in scheduled_lengths(keep, inputs["attention_mask"], LAYERS)]
    assert physical_lengths(output.past_key_values) == expected
    assert expected[-1] < expected[0] or min(budgets) == 0
    logical = inputs["input_ids"].shape[1] + steps
    assert [layer.get_seq_length() for layer in output.past_key_values.layers] == [logical] * LAYERS


UNEVEN = {
    "first stage keeps all": "random:layer=1|3,fraction=1.0|0.3",
    "some images keep all": "random:layer=2,tokens=16",
    "second stage drops nothing more": "random:layer=1|3,fraction=0.3|0.3",
}


@families
@pytest.mark.parametrize("batch", ["ragged", "with text row"])
@pytest.mark.parametrize("recipe", UNEVEN.values(), ids=UNEVEN.keys())
def test_uneven_budgets_equal_masked(family, batch, recipe):
    """Red: stages or images from which nothing is dropped confuse those from which something is."""
    model = shared(family)
    inputs = make_inputs(family, model, BATCHES[batch])
    with vp.wrap(model, recipe) as run:
        _, generated, logits = generate_logits(model, inputs)
        keep = run.last.keep
    expected = masked_logits(model, inputs, keep, generated[:, :-1])[:, inputs["input_ids"].shape[1] - 1 :]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    _, _, untouched = generate_logits(model, inputs)
    dropped = (inputs["attention_mask"].bool() & ~keep[max(keep)]).any()
    assert bool(dropped) == (not torch.equal(untouched, logits)), "dropping and changing something must go together"


@implementations
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_plain_forward_equals_masked(family, attn, pad, use_cache):
    """Red: a plain forward (scoring, training) returns logits of another length, or wrong ones at kept tokens."""
    recipe, budgets = STAGES["1+3"]
    model = shared(family, attn)
    inputs = make_inputs(family, model, BATCHES["with text row"], pad=pad)
    with vp.wrap(model, recipe) as run:
        logits = model(**inputs, use_cache=use_cache).logits
        keep = run.last.keep
    kept = keep[max(budgets)]
    assert logits.shape[:2] == inputs["input_ids"].shape
    torch.testing.assert_close(logits[kept], masked_logits(model, inputs, keep)[kept], atol=TOLERANCE, rtol=0)
    assert (logits[kept] - model(**inputs).logits[kept]).abs().max() > 0.1


@implementations
def test_forward_without_attention_mask(family, attn):
    """Red: gaps in the positions are mistaken for packed sequences when neither mask nor cache is there."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, BATCHES["two images"])
    without = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with vp.wrap(model, STAGES["1+3"][0]) as run:
        logits = model(**without, use_cache=False).logits
        keep = run.last.keep
    torch.testing.assert_close(logits[keep[3]], masked_logits(model, inputs, keep)[keep[3]], atol=TOLERANCE, rtol=0)


@implementations
@pytest.mark.parametrize("batch", ["one image", "ragged"])
@pytest.mark.parametrize("chunks", [(1, 1, 1), (2, 1, 3)], ids=str)
def test_decode_by_plain_forwards(family, attn, batch, chunks):
    """Red: only `generate` continues a pruned cache correctly, `model(..., past_key_values=cache)` does not."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, BATCHES[batch])
    rows, prompt = inputs["input_ids"].shape
    extra = torch.arange(20, 20 + rows * sum(chunks)).view(rows, -1)
    with vp.wrap(model, STAGES["1+3"][0]) as run:
        given = {"position_ids": prompt_positions(model, inputs)} if rows > 1 else {}
        first = model(**inputs, use_cache=True, **given)
        keep = run.last.keep
        cache, logits = first.past_key_values, [first.logits[:, -1:]]
        for ids in extra.split(chunks, 1):
            step = {}  # for one row, the default positions: logical cache length (+ Qwen's rope delta)
            if rows > 1:
                past = cache.get_seq_length()
                padding = torch.ones(rows, past + ids.shape[1], dtype=torch.long)
                padding[:, :prompt] = inputs["attention_mask"]
                positions = prompt_positions(model, inputs)[..., -1:] + torch.arange(1, ids.shape[1] + 1) + past - prompt
                step = {"attention_mask": padding, "position_ids": positions}
            logits.append(model(input_ids=ids, past_key_values=cache, use_cache=True, **step).logits)
    expected = masked_logits(model, inputs, keep, extra)[:, prompt - 1 :]
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=TOLERANCE, rtol=0)


@families
@pytest.mark.parametrize("method", [METHODS["fastv"], STAGES["1+3"][0]])
def test_logits_to_keep_changes_nothing_else(family, method):
    """Red: asking for the logits of the last n tokens moves what counts as the end of the prompt."""
    model = shared(family)
    inputs = make_inputs(family, model, BATCHES["ragged"])
    with vp.wrap(model, method) as run:
        all_logits = model(**inputs).logits
        sets = kept_sets(run.last)
        for count in (1, 3):
            some = model(**inputs, logits_to_keep=count).logits
            assert kept_sets(run.last) == sets
            torch.testing.assert_close(some, all_logits[:, -count:], atol=TOLERANCE, rtol=0)


@families
def test_output_options(family):
    """Red: tuples or recorded hidden states instead of the default output break a wrapped model."""
    model = shared(family)
    inputs = make_inputs(family, model, BATCHES["ragged"])
    with vp.wrap(model, STAGES["1+3"][0]):
        logits = model(**inputs).logits
        assert torch.equal(model(**inputs, return_dict=False)[0], logits)
        output = model(**inputs, output_hidden_states=True)
    assert torch.equal(output.logits, logits)
    assert len(output.hidden_states) == LAYERS + 1
    assert output.hidden_states[0].shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "method", ["uniform:layer=0,tokens=4", "uniform:layer=2,tokens=4", "fastv:layer=2,tokens=4,cache_layer=0"]
)
@torch.no_grad()
def test_padding_that_comes_later(method, attn):
    """A sample that has ended hides its tokens with zeros in the mask, and later goes on as if they were not there."""
    model = shared("llava", attn)
    samples = [["text3", "image", "text4"], ["text5", "image", "text2"]]

    def last_logits(inputs, tokens, real, places):
        mask, prompt = inputs["attention_mask"], inputs["attention_mask"].shape[1]
        with vp.wrap(model, method):
            cache = model(**inputs, use_cache=True).past_key_values
            for token, there, place in zip(tokens, real, places, strict=True):
                mask = torch.cat((mask, torch.tensor(there)[:, None]), dim=1)
                step = {"attention_mask": mask, "position_ids": torch.tensor(place)[:, None] + prompt}
                out = model(input_ids=torch.tensor(token)[:, None], past_key_values=cache, use_cache=True, **step)
        return out.logits[0, -1]

    together = last_logits(
        make_inputs("llava", model, samples),
        tokens=[[20, 21], [0, 22], [0, 23], [24, 25]],
        real=[[1, 1], [0, 1], [0, 1], [1, 1]],
        places=[[0, 0], [1, 1], [1, 2], [1, 3]],
    )
    alone = last_logits(make_inputs("llava", model, samples[:1]), tokens=[[20], [24]], real=[[1], [1]], places=[[0], [1]])
    torch.testing.assert_close(together, alone, rtol=0, atol=5e-5)


@torch.no_grad()
def test_padding_that_the_cut_made_invisible():
    """Both samples keep equally many tokens behind the cut, but one is padded before it. Red: layers before it see padding."""
    model = shared("llava")
    samples = [["text4", "image", "image"], ["text8", "image"]]

    def last_logits(inputs):
        mask = inputs["attention_mask"]
        with vp.wrap(model, "uniform:layer=2,tokens=4"):
            out = model(**inputs, position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0), use_cache=True)
            for word in (20, 21):
                mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
                step = {"attention_mask": mask, "position_ids": mask.sum(dim=1, keepdim=True) - 1}
                ids = torch.full((len(mask), 1), word)
                out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True, **step)
        return out.logits[:, -1]

    together = last_logits(make_inputs("llava", model, samples))
    for row in range(2):
        alone = last_logits(make_inputs("llava", model, samples[row : row + 1], first=row))
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=5e-5)
