"""Pruning equals masking: prefill, decode, caches, batches, and what each method selects."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles import (
    TOLERANCE,
    LiveMaskOracle,
    assert_equals_masked,
    cls_scores,
    columns_of_image,
    divprune,
    expected_counts,
    fastv_scores,
    generate_logits,
    image_columns,
    keep_from_record,
    kept_sets,
    masked_logits,
    naively_dropped_logits,
    physical_lengths,
    projected_features,
    prompt_positions,
    random_keep,
    scheduled_lengths,
)
from tiny_models import FAMILIES, FLEX, LAYERS, image_lengths, implementations_of, make_inputs, make_single, shared

import vlmprune as vp
from vlmprune.kernels.select_diverse import greedy_order, select_diverse

BATCHES = {
    "one image": [["text5", "image", "text4"]],
    "two images": [["text2", "image", "text3", "image", "text5"]],
    "ragged": [["text7", "image", "text4"], ["text2", "image", "image", "text3"], ["text3", "image", "text9"]],
    "with text row": [["text2", "image", "image", "text3"], ["text30"], ["text1", "image", "text12"]],
}
STAGES = {
    "0": ("random:layer=0,fraction=0.5,seed=0", {0: 0.5}),
    "2": ("random:layer=2,fraction=0.5,seed=0", {2: 0.5}),
    "1+3": ("random:layer=1|3,fraction=0.6|0.3,seed=0", {1: 0.6, 3: 0.3}),
}
METHODS = {
    "fastv": "fastv:layer=2,fraction=0.5",
    "fastv deep": "fastv:layer=1|4,fraction=0.5|0.2",
    "divprune": "divprune:layer=0,fraction=0.4",
    "divprune deep": "divprune:layer=3,tokens=5",
    "cls": "cls:layer=0,fraction=0.5",
    "cls deep": "cls:layer=2,fraction=0.5",
    "sum": "divprune:layer=0,fraction=0.75 + fastv:layer=2,fraction=0.5 + random:layer=4,fraction=0.2,seed=3",
    "nothing left": "random:layer=2,tokens=0",
    "last layer": f"random:layer={LAYERS - 1},fraction=0.25",
}
families = pytest.mark.parametrize("family", FAMILIES)
implementations = pytest.mark.parametrize(("family", "attn"), implementations_of(FAMILIES))
batches = pytest.mark.parametrize("batch", BATCHES)


def methods_of(family: str) -> list[str]:
    return [name for name in METHODS if not (name.startswith("cls") and family != "llava")]


every_method = pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(f, METHODS[m], id=f"{f}-{m}") for f in FAMILIES for m in methods_of(f)],
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# --- the oracles themselves ------------------------------------------------------------------------------------------
@implementations
def test_oracle_without_masks_is_the_model(family, attn):
    """Red: the oracle feeds other tokens, positions or masks than the model itself would."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, BATCHES["ragged"])
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(masked_logits(model, inputs, {})[real], model(**inputs).logits[real], atol=TOLERANCE, rtol=0)


@implementations
@pytest.mark.parametrize("fractions", [{0: 0.5}, {2: 0.5}, {1: 0.6, 3: 0.3}], ids=str)
def test_oracles_agree(family, attn, fractions):
    """Red: masking in one full forward, masking step by step with a cache, and naive dropping do not agree."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, BATCHES["ragged"])
    keep = random_keep(model, inputs, fractions)
    with LiveMaskOracle(model, keep):
        _, generated, logits = generate_logits(model, inputs)
    assert_equals_masked(model, inputs, keep, generated, logits)

    masked = masked_logits(model, inputs, keep)
    for row, real in enumerate(inputs["attention_mask"].bool()):
        single = make_single(family, model, BATCHES["ragged"], row)
        alone = {layer: mask[row : row + 1, real] for layer, mask in keep.items()}
        dropped, columns = naively_dropped_logits(model, single, alone)
        torch.testing.assert_close(dropped[0], masked[row, real][columns], atol=TOLERANCE, rtol=0)


def test_oracle_leaves_no_hooks():
    """Red: later tests would compare against a masked "stock" model."""
    model = shared("llava")
    inputs = make_inputs("llava", model, BATCHES["one image"])
    before = model(**inputs).logits
    with LiveMaskOracle(model, random_keep(model, inputs, {1: 0.2})):
        assert (model(**inputs).logits - before).abs().max() > 0.1
    masked_logits(model, inputs, random_keep(model, inputs, {1: 0.2}))
    assert torch.equal(model(**inputs).logits, before)


@families
def test_inputs_do_not_depend_on_the_batch(family):
    """Red: "batch == singles" would compare different prompts."""
    model = shared(family)
    batch = make_inputs(family, model, BATCHES["ragged"])
    pixels = []
    for row in range(3):
        single = make_single(family, model, BATCHES["ragged"], row)
        assert torch.equal(batch["input_ids"][row][batch["attention_mask"][row].bool()], single["input_ids"][0])
        pixels.append(single["pixel_values"])
    assert torch.equal(torch.cat(pixels), batch["pixel_values"])


# --- keeping everything ----------------------------------------------------------------------------------------------
KEEP_ALL = [
    (family, attn, f"{method}:layer={layers},fraction={fractions}")
    for family, attn in implementations_of(FAMILIES)
    for method in ("random", "fastv", "divprune", "cls")
    for layers, fractions in (("0", "1.0"), ("2", "1.0"), ("1|3", "1.0|1.0"))
    if not (method == "fastv" and layers == "0") and not (method == "cls" and family != "llava")
]


@pytest.mark.parametrize(("family", "attn", "recipe"), KEEP_ALL, ids=lambda value: str(value))
@pytest.mark.parametrize("batch", ["two images", "ragged"])
def test_keep_all_is_bit_identical(family, attn, recipe, batch):
    """Red: the machinery itself (scores, gathers, masks, caches) disturbs a model from which nothing is dropped."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, BATCHES[batch])
    real = inputs["attention_mask"].bool()
    plain = model(**inputs).logits
    output, sequence, logits = generate_logits(model, inputs)
    with vp.wrap(model, recipe):
        assert torch.equal(model(**inputs).logits[real], plain[real])
        output_kept, sequence_kept, logits_kept = generate_logits(model, inputs)
    assert torch.equal(sequence_kept, sequence)
    assert torch.equal(logits_kept, logits)
    assert physical_lengths(output_kept.past_key_values) == physical_lengths(output.past_key_values)


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


# --- pruned equals masked --------------------------------------------------------------------------------------------
@implementations
@batches
@pytest.mark.parametrize("stages", STAGES)
def test_generate_equals_masked(family, attn, batch, stages):
    """Red: prefill or a decode step computes with a wrong token, position or mask; or caches have the wrong length."""
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


@every_method
def test_methods_equal_masked(family, method):
    """Red: a method decides about other tokens than those that disappear, or its probes disturb the model."""
    model = shared(family)
    inputs = make_inputs(family, model, BATCHES["with text row"])
    with vp.wrap(model, method) as run:
        _, generated, logits = generate_logits(model, inputs)
        keep = run.last.keep
    assert_equals_masked(model, inputs, keep, generated, logits)


@pytest.mark.parametrize(
    ("family", "attn", "method"),
    [
        ("llava", "eager", "fastv"),
        ("llava", "eager", "cls"),
        ("qwen2_5_vl", "eager", "fastv"),
        ("qwen2_5_vl", "eager", "sum"),
        ("llava", FLEX, "fastv deep"),
        ("llava", FLEX, "cls"),
        ("llava", FLEX, "sum"),
        ("llava_next", FLEX, "sum"),
    ],
)
def test_methods_equal_masked_in_other_attention(family, attn, method):
    """Red: reading attention scores breaks models that run eager or flex attention."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, BATCHES["ragged"])
    with vp.wrap(model, METHODS[method]) as run:
        _, generated, logits = generate_logits(model, inputs)
        keep = run.last.keep
    assert_equals_masked(model, inputs, keep, generated, logits)


@implementations
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("stages", STAGES)
def test_plain_forward_equals_masked(family, attn, pad, use_cache, stages):
    """Red: a plain forward (scoring, training) returns logits of another length, or wrong ones at kept tokens."""
    recipe, budgets = STAGES[stages]
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
    """Red: only ``generate`` continues a pruned cache correctly, ``model(..., past_key_values=cache)`` does not."""
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


def test_cls_refuses_a_tower_without_class_token():
    """Red: CLS attention is silently replaced by something else on Qwen2.5-VL."""
    model = shared("qwen2_5_vl")
    inputs = make_inputs("qwen2_5_vl", model, BATCHES["one image"])
    before = model(**inputs).logits
    with pytest.raises(ValueError, match=r"(?i)cls"), vp.wrap(model, "cls:layer=0,fraction=0.5"):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, before)


# --- the record of a run ---------------------------------------------------------------------------------------------
@families
@batches
@pytest.mark.parametrize("stages", STAGES)
def test_record_tells_what_was_kept(family, batch, stages):
    """Red: budgets are not per image, not of the original count, or ``keep`` and ``kept`` contradict each other."""
    recipe, budgets = STAGES[stages]
    model = shared(family)
    inputs = make_inputs(family, model, BATCHES[batch])
    with vp.wrap(model, recipe) as run:
        generate_logits(model, inputs, 2)
        last = run.last
    lengths = image_lengths(family, BATCHES[batch])
    for layer, budget in budgets.items():
        assert last.keep[layer].dtype == torch.bool
        counts = expected_counts(lengths, budget)
        kept = {(row, n): index for (stage, row, n), index in kept_sets(last).items() if stage == layer}
        assert {place: len(index) for place, index in kept.items()} == {
            (row, n): count for row, images in enumerate(counts) for n, count in enumerate(images)
        }
        assert all(index == sorted(set(index)) for index in kept.values())
    for layer, rebuilt in keep_from_record(model, inputs, last).items():
        assert torch.equal(rebuilt, last.keep[layer])
    ordered = [last.keep[layer] for layer in sorted(last.keep)]
    assert all(not (later & ~earlier).any() for earlier, later in itertools.pairwise(ordered))


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


@families
def test_override_and_enabled(family):
    """Red: a budget for one call leaks into the next, or a disabled run still prunes."""
    model = shared(family)
    inputs = make_inputs(family, model, BATCHES["ragged"])
    lengths = image_lengths(family, BATCHES["ragged"])

    def counts(run):
        model(**inputs)
        rows = [[0] * len(images) for images in lengths]
        for image in run.last.kept:
            rows[image.sample][image.ordinal] = len(image.index)
        return rows

    plain = model(**inputs).logits
    _, sequence, logits = generate_logits(model, inputs)
    with vp.wrap(model, "random:layer=2,fraction=0.5,seed=0") as run:
        assert counts(run) == expected_counts(lengths, 0.5)
        with run.override(tokens=3):
            assert counts(run) == expected_counts(lengths, 3)
            _, generated, step_logits = generate_logits(model, inputs)
            keep = run.last.keep
        assert counts(run) == expected_counts(lengths, 0.5)
        with pytest.raises(ZeroDivisionError), run.override(tokens=1):
            raise ZeroDivisionError
        assert counts(run) == expected_counts(lengths, 0.5)

        run.enabled = False
        assert torch.equal(model(**inputs).logits, plain)
        _, disabled_sequence, disabled_logits = generate_logits(model, inputs)
        assert torch.equal(disabled_sequence, sequence)
        assert torch.equal(disabled_logits, logits)
        run.enabled = True
        assert counts(run) == expected_counts(lengths, 0.5)
        assert not torch.equal(model(**inputs).logits, plain)
    assert_equals_masked(model, inputs, keep, generated, step_logits)


# --- batches ---------------------------------------------------------------------------------------------------------
SAME_IN_BATCH = [
    (family, METHODS.get(name) or STAGES[name][0])
    for family in FAMILIES
    for name in [*STAGES, "fastv", "fastv deep", "divprune", "divprune deep", "cls", "sum"]
    if not (name == "cls" and family != "llava")
]


@pytest.mark.parametrize(("family", "recipe"), SAME_IN_BATCH, ids=lambda value: str(value))
@pytest.mark.parametrize("batch", ["ragged", "with text row"])
def test_batch_equals_singles(family, recipe, batch):
    """Red: a sample's answer depends on who shares its batch."""
    model = shared(family)
    samples = BATCHES[batch]
    inputs = make_inputs(family, model, samples)
    with vp.wrap(model, recipe) as run:
        _, generated, logits = generate_logits(model, inputs)
        together = kept_sets(run.last)
        for row, parts in enumerate(samples):
            _, alone_ids, alone = generate_logits(model, make_single(family, model, samples, row))
            if "image" in parts:
                expected = {(layer, 0, n): index for (layer, r, n), index in together.items() if r == row}
                assert kept_sets(run.last) == expected
            assert torch.equal(alone_ids[0], generated[row])
            torch.testing.assert_close(alone[0], logits[row], atol=TOLERANCE, rtol=0)


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


# --- what the methods select -----------------------------------------------------------------------------------------
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


def test_divprune_never_picks_a_token_twice():
    """Red: exact duplicates make the official code repeat tokens (20 distinct ones instead of 30)."""
    random = torch.Generator().manual_seed(0)
    twice = torch.randn(20, 16, generator=random).repeat(2, 1)
    chosen = select_diverse(twice[None], 30)[0].tolist()
    assert len(set(chosen)) == 30
    assert chosen == sorted(chosen)
    assert {index % 20 for index in chosen} == set(range(20)), "a duplicate was preferred to a new token"


@pytest.mark.parametrize(("images", "visual", "dim", "keep"), [(1, 9, 4, 1), (3, 17, 8, 16), (4, 40, 32, 11)])
def test_divprune_equals_the_loop(images, visual, dim, keep):
    """Red: the batched kernel is not the paper's algorithm, or mixes images."""
    features = torch.randn(images, visual, dim, generator=torch.Generator().manual_seed(visual))
    assert select_diverse(features, keep).tolist() == [sorted(divprune(x, keep)) for x in features]


def test_selection_ignores_scale():
    """Red: the distance is not the cosine's: the length of a feature decides."""
    features = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1))
    lengths = torch.rand(2, 24, 1, generator=torch.Generator().manual_seed(2)) * 8 + 0.5
    assert torch.equal(select_diverse(features * lengths, 9), select_diverse(features, 9))


def test_image_columns_of_the_tests():
    """Red: the tests' own idea of where images are is wrong."""
    for family in FAMILIES:
        model = shared(family)
        inputs = make_inputs(family, model, BATCHES["with text row"])
        found = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for row, images in enumerate(image_lengths(family, BATCHES["with text row"])):
            for ordinal, length in enumerate(images):
                columns = columns_of_image(model, inputs, row, ordinal)
                assert len(columns) == length
                found[row, columns] = True
        assert torch.equal(found, image_columns(model, inputs["input_ids"]))
