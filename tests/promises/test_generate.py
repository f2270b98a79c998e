"""Every strategy of `generate` on a pruned model."""

from __future__ import annotations

import contextlib

import pytest
import torch
from callers import (
    ONE,
    RAGGED,
    CountQueries,
    generate,
    one_row_per_sample,
)
from oracles import (
    TOLERANCE,
    Entering,
    LiveMaskOracle,
    assert_equals_masked,
    decisions,
    effect_of,
    generate_logits,
    kept_sets,
    physical_lengths,
    prompt_positions,
    resident_lengths,
)
from promises.runs import (
    BATCH,
    FEW,
    KINDS,
    MUSTDROP,
    STEPS,
    THRESHOLDS,
    assert_untouched,
    one_sentence,
    over,
    recipes,
    run_on,
    without_cache_stage,
)
from promises.stages import families
from tiny_models import (
    CHUNKS_PICTURES,
    FAMILIES,
    FIRST_WORD,
    FLEX,
    LAYERS,
    VOCAB,
    build,
    make_inputs,
    make_single,
    shared,
    warm_up,
)
from transformers import DynamicCache

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")

STRATEGIES = {
    "greedy": {},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True, "top_k": 0},
    "no cache": {"use_cache": False},
    "no cache, beam": {"use_cache": False, "num_beams": 2},
    "repetition penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="Transformers offloads caches from GPUs only")


@families
@recipes
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
@pytest.mark.parametrize("samples", [ONE, RAGGED], ids=["one", "ragged"])
def test_strategy_gives_the_masked_sequences(family, recipe, strategy, samples):
    """Red: expansion, reordering or re-feeding of a pruned cache goes wrong in this strategy."""
    check_strategy(family, "sdpa", recipe, strategy, samples)


@pytest.mark.parametrize(("family", "attn"), [*((family, "eager") for family in FAMILIES), ("llava", FLEX)])
@pytest.mark.parametrize("strategy", ["beam", "no cache"])
def test_strategy_in_other_attention(family, attn, strategy):
    """Red: as above, with additive masks, or the block masks of flex attention."""
    check_strategy(family, attn, KINDS["two stages"], STRATEGIES[strategy], RAGGED)


def check_strategy(family, attn, recipe, strategy, samples):
    model = shared(family, attn)
    inputs = make_inputs(family, model, samples)
    untouched = generate(model, inputs, **strategy).sequences
    with vp.wrap(model, recipe) as run:
        output = generate(model, inputs, output_scores=True, **strategy)
        keep = one_row_per_sample(run.last.keep, len(samples))
    with LiveMaskOracle(model, keep):
        expected = generate(model, inputs, output_scores=True, **strategy)
    assert torch.equal(output.sequences, expected.sequences)
    assert not torch.equal(output.sequences, untouched), "the test is blind: pruning does not change these sequences"
    for ours, theirs in zip(output.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2 * TOLERANCE, rtol=0)
    if strategy.get("use_cache", True):
        layer = max(keep)
        steps = output.sequences.shape[1] - inputs["input_ids"].shape[1] - 1
        assert physical_lengths(output.past_key_values)[-1] == int(keep[layer].sum(1).max()) + steps


@families
@recipes
def test_prompt_lookup_equals_greedy(family, recipe):
    """Red: candidate tokens in one forward, or cropping rejected ones, corrupt a pruned cache."""
    model = shared(family)
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    # A prompt and an answer of four words, so that every forward, prefill included, guesses, and some guesses come true
    few = {"suppress_tokens": [token for token in range(VOCAB) if token not in range(20, 24)]}
    early = accepted = rejected = 0
    for seed in range(4):
        inputs = make_inputs(family, model, [["text40", "image", "text30"]], seed)
        ids, prompt = inputs["input_ids"], inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.where(ids < FIRST_WORD, ids, 20 + ids % 4)
        with vp.wrap(model, recipe) as run:
            greedy = generate(model, inputs, 16, **few).sequences
            keep = run.last.keep
            with CountQueries(model) as calls:
                guessed = generate(model, inputs, 16, **few, **lookup).sequences
            kept_by_lookup = run.last.keep
        with LiveMaskOracle(model, keep):
            expected = generate(model, inputs, 16, **few, **lookup).sequences
        assert torch.equal(guessed, greedy)
        assert torch.equal(guessed, expected)
        assert all(torch.equal(kept_by_lookup[layer][:, :prompt], keep[layer]) for layer in keep)
        early += calls.queries[0] > prompt
        accepted += 16 - len(calls.queries)
        rejected += sum(calls.queries) - prompt - 15
    assert early > 0, "the test is blind: no prefill contained candidates"
    assert accepted > 0, "the test is blind: no candidate was ever accepted"
    assert rejected > 0, "the test is blind: no candidate was ever rejected, so nothing was cropped"


@pytest.mark.parametrize("recipe", [KINDS["two stages"]], ids=["two stages"])
def test_assistant_model_equals_greedy(recipe):
    """Red: speculative decoding with a (stock) assistant corrupts a pruned cache."""
    model, assistant = shared("llava"), build("llava")
    warm_up(assistant, "llava")
    inputs = make_inputs("llava", model, ONE)
    with vp.wrap(model, recipe):
        greedy = generate(model, inputs, 12).sequences
        with CountQueries(model) as calls:
            assisted = generate(model, inputs, 12, assistant_model=assistant).sequences
    assert max(calls.queries[1:]) > 1, "the test is blind: the assistant proposed nothing"
    assert torch.equal(assisted, greedy)


@families
@pytest.mark.parametrize("kind", ["static", "dynamic_full", pytest.param("offloaded", marks=needs_cuda)])
@pytest.mark.parametrize("samples", [ONE, RAGGED], ids=["one", "ragged"])
def test_other_caches_are_exact_or_refused(family, kind, samples):
    """Red: a cache whose layers cannot have different lengths is accepted and gives wrong tokens."""
    model = shared(family)
    inputs = make_inputs(family, model, samples)
    with vp.wrap(model, KINDS["two stages"]):
        _, _, expected = generate_logits(model, inputs)
        refusal, logits = None, expected
        try:
            _, _, logits = generate_logits(model, inputs, cache_implementation=kind, disable_compile=True)
        except ValueError as error:
            refusal = str(error)
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        _, _, again = generate_logits(model, inputs)
    assert refusal is None or "cache" in refusal.lower()
    assert torch.equal(again, expected), "a refusal spoils the next call"


@families
@pytest.mark.parametrize("recipe", [KINDS["before the model"], KINDS["two stages"]], ids=["0", "1+3"])
def test_callers_own_cache(family, recipe):
    """Red: an empty cache that the caller made (with layers, or growing them on demand) is not pruned like the default."""
    model = shared(family)
    inputs = make_inputs(family, model, RAGGED)
    with vp.wrap(model, recipe):
        output, _, expected = generate_logits(model, inputs)
        lengths = physical_lengths(output.past_key_values)
        for cache in (DynamicCache(), DynamicCache(config=model.config.get_text_config())):
            _, _, logits = generate_logits(model, inputs, past_key_values=cache)
            assert torch.equal(logits, expected)
            assert physical_lengths(cache) == lengths


@pytest.mark.skipif(not CHUNKS_PICTURES, reason="this transformers forgets pictures in a chunked prefill")
@families
def test_chunked_prefill_is_exact_or_refused(family):
    """Red: a prompt fed in chunks is pruned by a selection that saw only a part of it."""
    model = shared(family)
    inputs = make_inputs(family, model, ONE)
    with vp.wrap(model, KINDS["fastv"]) as run:
        _, _, whole = generate_logits(model, inputs)
        kept = sum(len(image.index) for image in run.last.kept)
        chunked = whole
        with contextlib.suppress(ValueError):
            _, _, chunked = generate_logits(model, inputs, prefill_chunk_size=8)
            assert sum(len(image.index) for image in run.last.kept) == kept
    torch.testing.assert_close(chunked, whole, atol=TOLERANCE, rtol=0)


@families
def test_no_cache_decides_once(family):
    """Red: without a cache every step decides anew, so tokens flicker between steps."""
    model = shared(family)
    inputs = make_inputs(family, model, RAGGED)
    with vp.wrap(model, "fastv:layer=2,fraction=0.4") as run:
        _, cached, cached_logits = generate_logits(model, inputs, 8)
        keep, sets = run.last.keep, kept_sets(run.last)
        _, uncached, logits = generate_logits(model, inputs, 8, use_cache=False)
        assert kept_sets(run.last) == sets
    assert torch.equal(uncached, cached)
    torch.testing.assert_close(logits, cached_logits, atol=TOLERANCE, rtol=0)
    assert_equals_masked(model, inputs, keep, uncached, logits)


FEW_STRATEGIES = {
    "beam": {"num_beams": 2},
    "sampling": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "no cache, beam": {"use_cache": False, "num_beams": 2},
}


def seeded(model, inputs: dict, **strategy):
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, output_scores=True, **strategy)


@over(FEW)
@pytest.mark.parametrize("strategy", FEW_STRATEGIES)
def test_strategies_equal_the_live_oracle(family, recipe, strategy):
    """Red: beams, returned sequences or prompts that run again take other features, positions or masks than their sample."""
    if "no cache" in strategy:
        ((family, recipe),) = without_cache_stage([(family, recipe)])
    model = shared(family)
    inputs = make_inputs(family, model, BATCH)
    with Entering(model) as entering, vp.wrap(model, recipe) as run:
        output = seeded(model, inputs, **FEW_STRATEGIES[strategy])
        effect = effect_of(model, inputs, run, entering.prompts[0]).one_per_sample(len(BATCH))
    with LiveMaskOracle(model, effect):
        expected = seeded(model, inputs, **FEW_STRATEGIES[strategy])
    assert torch.equal(output.sequences, expected.sequences)
    assert not torch.equal(output.sequences, seeded(model, inputs, **FEW_STRATEGIES[strategy]).sequences), "the test is blind"
    for ours, theirs in zip(output.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2 * TOLERANCE, rtol=0)


def few_words(family: str, model, seed: int) -> tuple[dict, dict]:
    """A prompt, and the settings for an answer, of four words: guesses are made at once, and some come true."""
    inputs = make_inputs(family, model, [["text40", "image", "text30"]], seed)
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.where(ids < FIRST_WORD, ids, 20 + ids % 4)
    return inputs, {"suppress_tokens": [token for token in range(VOCAB) if token not in range(20, 24)]}


LOOKUP = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}


@over([*without_cache_stage(FEW), ("llava", "random:layer=0,fraction=0.4")])
def test_prompt_lookup_equals_greedy_for_every_kind_of_method(family, recipe):
    """Red: guessed tokens are taken for prompt by a score, shift positions, or spoil a cropped cache."""
    model = shared(family)
    early = fewer = 0
    for seed in range(2):
        inputs, few = few_words(family, model, seed)
        it = run_on(model, inputs, recipe, 12, **few)
        with vp.wrap(model, recipe) as run, CountQueries(model) as calls:
            guessed = model.generate(**inputs, max_new_tokens=12, **few, **LOOKUP)
            assert decisions(run.last) == decisions(it.last)
        assert torch.equal(guessed[:, -12:], it.generated)
        early += calls.queries[0] > inputs["input_ids"].shape[1]
        fewer += len(calls.queries) < 12
        assert_equals_masked(model, inputs, it.effect, it.generated, it.logits)
    assert early, "the test is blind: no prefill contained guesses"
    assert fewer, "the test is blind: no guess came true"


@pytest.mark.parametrize(
    "strategy",
    [{"use_cache": False}, {"use_cache": False, "num_beams": 2}, LOOKUP, "assistant"],
    ids=["no cache", "no cache, beam", "prompt lookup", "assistant"],
)
@pytest.mark.parametrize("recipe", [MUSTDROP, THRESHOLDS], ids=["target counts", "thresholds"])
def test_a_cache_stage_refuses_what_it_cannot_do(recipe, strategy):
    """Red: a stage that forgets after prefill is left out silently where there is no cache, or guesses came with the prompt."""
    model = shared("llava")
    inputs, few = few_words("llava", model, 0)
    if strategy == "assistant":
        strategy = {"assistant_model": build("llava")}
    with vp.wrap(model, recipe), pytest.raises(vp.UsageError) as refusal:
        model.generate(**inputs, max_new_tokens=4, **few, **strategy)
    one_sentence(refusal.value)
    for word in ("mustdrop", "use_cache=True", "assisted decoding"):
        assert word in str(refusal.value)
    assert_untouched("llava", model)


@pytest.mark.parametrize("recipe", [MUSTDROP, MUSTDROP.replace("cache_layer=1", "cache_layer=0,positions=compact")])
def test_a_cache_stage_goes_on_with_later_guesses(recipe):
    """Red: cropping guesses that were made after prefill reaches into a cache that was cut when prefill was over."""
    model = shared("llava")
    few = {"suppress_tokens": [token for token in range(VOCAB) if token not in range(20, 23)]}
    inputs = make_inputs("llava", model, [["text4", "image", "text5"]])
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.where(ids >= FIRST_WORD, 23 + ids % (VOCAB - 23), ids)  # no word of the answer
    it = run_on(model, inputs, recipe, 14, **few)
    with vp.wrap(model, recipe), CountQueries(model) as calls:
        guessed = model.generate(**inputs, max_new_tokens=14, **few, **LOOKUP)
    assert calls.queries[0] == inputs["input_ids"].shape[1]
    assert max(calls.queries[1:]) > 1, "the test is blind: nothing was guessed"
    assert torch.equal(guessed[:, -14:], it.generated)
    assert_equals_masked(model, inputs, it.effect, it.generated, it.logits)


@over([("llava", MUSTDROP), ("llava_next", THRESHOLDS), ("llava", "pdrop:layer=2|4,fraction=0.5|0.25,positions=compact")])
@pytest.mark.parametrize("row", [None, 1], ids=["batch", "one row"])
def test_plain_forwards_equal_generate(family, recipe, row):
    """Red: only `generate` cuts the cache after prefill, or only it goes on at the right positions."""
    model = shared(family)
    inputs = make_inputs(family, model, BATCH) if row is None else make_single(family, model, BATCH, row)
    it = run_on(model, inputs, recipe)
    rows = len(inputs["input_ids"])
    start = prompt_positions(model, inputs)
    with vp.wrap(model, recipe) as run:
        first = model(**inputs, use_cache=True, **({"position_ids": start} if row is None else {}))
        assert physical_lengths(first.past_key_values) == resident_lengths(it.effect, LAYERS)
        assert run.report().kv_bytes == it.report.kv_bytes
        logits = [first.logits[:, -1:]]
        for step in range(STEPS - 1):
            mask = torch.cat([inputs["attention_mask"], torch.ones(rows, step + 1, dtype=torch.long)], 1)
            given = {} if row is not None else {"attention_mask": mask, "position_ids": start[:, -1:] + step + 1}
            call = {"input_ids": it.generated[:, step : step + 1], "past_key_values": first.past_key_values, "use_cache": True}
            logits.append(model(**call, **given).logits)
    torch.testing.assert_close(torch.cat(logits, 1), it.logits, atol=TOLERANCE, rtol=0)
