"""Every strategy of ``generate``, conversations, and several callers at once, on a pruned model."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from oracles import (
    TOLERANCE,
    LiveMaskOracle,
    assert_equals_masked,
    decoder_layers,
    generate_logits,
    kept_sets,
    masked_logits,
    physical_lengths,
    prompt_positions,
)
from tiny_models import (
    CHUNKS_PICTURES,
    FAMILIES,
    FIRST_WORD,
    FLEX,
    IMAGE,
    LAYERS,
    VOCAB,
    build,
    implementations_of,
    make_inputs,
    shared,
    warm_up,
)
from transformers import DynamicCache

import vlmprune as vp

ONE = [["text6", "image", "text8"]]
RAGGED = [["text7", "image", "text4"], ["text2", "image", "image", "text3"], ["text3", "image", "text9"]]
RECIPES = {
    "before the model": "random:layer=0,fraction=0.5,seed=0",
    "two stages": "random:layer=1|3,fraction=0.6|0.3,seed=0",
    "fastv": "fastv:layer=2,fraction=0.4",
}
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
families = pytest.mark.parametrize("family", FAMILIES)
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def generate(model, inputs: dict, new_tokens: int = 8, **strategy):
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=new_tokens, return_dict_in_generate=True, **strategy)


def one_row_per_sample(keep: dict, rows: int) -> dict:
    """Beams and returned sequences repeat a sample's row: all must have made the same decision."""
    out = {}
    for layer, mask in keep.items():
        copies = mask.view(rows, -1, mask.shape[1])
        assert (copies == copies[:, :1]).all(), "copies of one sample kept different tokens"
        out[layer] = copies[:, 0]
    return out


# --- strategies ------------------------------------------------------------------------------------------------------
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
    check_strategy(family, attn, RECIPES["two stages"], STRATEGIES[strategy], RAGGED)


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


class CountQueries:
    """Context manager that notes how many tokens every call of the first decoder layer gets."""

    def __init__(self, model):
        self.model, self.queries = model, []

    def __enter__(self):
        def hook(module, args, kwargs):
            self.queries.append(args[0].shape[1])

        layer = decoder_layers(self.model)[0]
        self.handle = layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)  # before any pruning
        return self

    def __exit__(self, *error):
        self.handle.remove()


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


@pytest.mark.parametrize("recipe", [RECIPES["two stages"]], ids=["two stages"])
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
    with vp.wrap(model, RECIPES["two stages"]):
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
@pytest.mark.parametrize("recipe", [RECIPES["before the model"], RECIPES["two stages"]], ids=["0", "1+3"])
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
    with vp.wrap(model, RECIPES["fastv"]) as run:
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


# --- conversations ---------------------------------------------------------------------------------------------------
def words(rows: int, count: int, seed: int) -> torch.Tensor:
    return torch.randint(FIRST_WORD, VOCAB, (rows, count), generator=torch.Generator().manual_seed(seed))


def next_turn(inputs: dict, sequences: torch.Tensor, cache, new_ids: torch.Tensor) -> dict:
    """Inputs of the next turn: everything so far and ``new_ids``; the cache knows all but the last generated token."""
    ids = torch.cat([sequences, new_ids], 1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
    if "mm_token_type_ids" in inputs:
        turn["mm_token_type_ids"] = (ids == IMAGE).long()
    return turn


def interleaved(first: dict, later: dict, rows: int) -> dict:
    """Pictures of two turns, one per row and turn, in the order of the rows of the whole conversation."""
    if "image_grid_thw" not in first:
        return {"pixel_values": torch.stack([first["pixel_values"], later["pixel_values"]], 1).flatten(0, 1)}
    pixels, grids = [], []
    for row in range(rows):
        for turn in (first, later):
            pixels.append(turn["pixel_values"].split(turn["image_grid_thw"].prod(1).tolist())[row])
            grids.append(turn["image_grid_thw"][row])
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.stack(grids)}


@pytest.mark.parametrize(("family", "attn"), implementations_of(FAMILIES))
@recipes
@pytest.mark.parametrize("samples", [ONE, RAGGED], ids=["one", "ragged"])
def test_second_turn_of_text(family, attn, recipe, samples):
    """Red: continuing a pruned cache re-feeds tokens, or shifts positions or masks."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, samples)
    with vp.wrap(model, recipe) as run:
        first, _, _ = generate_logits(model, inputs, 4)
        keep = run.last.keep
        turn = next_turn(inputs, first.sequences, first.past_key_values, words(len(samples), 5, 1))
        second, _, logits = generate_logits(model, turn, 4)
        turn3 = next_turn(turn, second.sequences, second.past_key_values, words(len(samples), 3, 2))
        third, _, logits3 = generate_logits(model, turn3, 4)
    prompt = inputs["input_ids"].shape[1]
    expected = masked_logits(model, inputs, keep, third.sequences[:, prompt:-1])
    start = turn["input_ids"].shape[1] - 1
    torch.testing.assert_close(logits, expected[:, start : start + 4], atol=TOLERANCE, rtol=0)
    start = turn3["input_ids"].shape[1] - 1
    torch.testing.assert_close(logits3, expected[:, start:], atol=TOLERANCE, rtol=0)
    dropped = prompt - int(keep[max(keep)].sum(1).max())
    assert physical_lengths(third.past_key_values)[-1] == third.sequences.shape[1] - 1 - dropped


@pytest.mark.parametrize(("family", "attn"), [*((family, "sdpa") for family in FAMILIES), ("llava", FLEX)])
@recipes
@pytest.mark.parametrize(
    "samples",
    [[["text5", "image", "text4"]], [["text5", "image", "text4"], ["text9", "image", "text1"]]],
    ids=["one", "ragged"],
)
def test_second_turn_with_a_new_image(family, attn, recipe, samples):
    """Red: pruning a later picture onto an already pruned cache drops, masks or addresses the wrong entries."""
    model = shared(family, attn)
    rows = len(samples)
    inputs = make_inputs(family, model, samples)
    later = make_inputs(family, model, [["text3", "image", "text6"]] * rows, seed=5)
    length = int(later["attention_mask"].sum(1).min())  # Qwen's rows have two image sizes: give both the same length
    new_ids = later["input_ids"]
    if not later["attention_mask"].all():
        later = make_inputs(family, model, [["text11", "image", "text6"], ["text3", "image", "text6"]], seed=5)
        new_ids = later["input_ids"]
        length = new_ids.shape[1]
    assert new_ids.shape[1] == length
    pictures = {name: later[name] for name in ("pixel_values", "image_grid_thw") if name in later}
    with vp.wrap(model, recipe) as run:
        first, _, _ = generate_logits(model, inputs, 4)
        keep1 = run.last.keep
        past = first.past_key_values.get_seq_length()
        turn = next_turn(inputs, first.sequences, first.past_key_values, new_ids)
        whole = {"input_ids": turn["input_ids"], "attention_mask": turn["attention_mask"]}
        whole |= interleaved(inputs, later, rows)
        if "mm_token_type_ids" in inputs:
            # Qwen's own continuation wants the grids of all pictures but the pixels of the new one: pass the positions
            whole["mm_token_type_ids"] = turn["mm_token_type_ids"]
            turn["position_ids"] = prompt_positions(model, whole)
        _, generated, logits = generate_logits(model, turn | pictures, 5)
        keep2 = run.last.keep
    prompt = inputs["input_ids"].shape[1]
    assert past == prompt + 3
    assert all(mask.shape[1] == turn["input_ids"].shape[1] - past for mask in keep2.values())
    between = torch.ones(rows, past - prompt, dtype=torch.bool)
    keep = {layer: torch.cat([keep1[layer], between, keep2[layer]], 1) for layer in keep1}
    assert_equals_masked(model, whole, keep, generated, logits)
    only_first = {layer: torch.cat([keep1[layer], torch.ones_like(keep[layer][:, prompt:])], 1) for layer in keep1}
    start = whole["input_ids"].shape[1] - 1
    assert (masked_logits(model, whole, only_first, generated[:, :-1])[:, start:] - logits).abs().max() > 0.1
    assert int(keep2[max(keep2)].sum()) < keep2[max(keep2)].numel()


@families
def test_two_interleaved_conversations(family):
    """Red: the state of a pruned conversation lives on the model, so that a second one overwrites it."""
    model = shared(family)
    talks = []
    for number, samples in enumerate(([["text5", "image", "text4"]], [["text3", "image", "image", "text12"]])):
        talks.append({"inputs": make_inputs(family, model, samples, seed=number), "seed": number})
    with vp.wrap(model, RECIPES["two stages"]) as run:
        for talk in talks:
            talk["first"], _, _ = generate_logits(model, talk["inputs"], 4)
            talk["keep"] = run.last.keep
        for talk in talks:
            output = talk["first"]
            turn = next_turn(talk["inputs"], output.sequences, output.past_key_values, words(1, 5, talk["seed"]))
            # Transformers keeps Qwen's position offset on the model, where conversations overwrite it: pass positions
            start = prompt_positions(model, talk["inputs"])
            steps = torch.arange(1, turn["input_ids"].shape[1] - start.shape[-1] + 1)
            turn["position_ids"] = torch.cat([start, start[..., -1:] + steps], -1)
            talk["length"] = turn["input_ids"].shape[1]
            talk["second"], _, talk["logits"] = generate_logits(model, turn, 5)
    for talk in talks:
        prompt = talk["inputs"]["input_ids"].shape[1]
        extra = talk["second"].sequences[:, prompt:-1]
        expected = masked_logits(model, talk["inputs"], talk["keep"], extra)[:, talk["length"] - 1 :]
        torch.testing.assert_close(talk["logits"], expected, atol=TOLERANCE, rtol=0)


@families
@recipes
def test_pruned_conversation_goes_on_while_disabled(family, recipe):
    """Red: ``enabled = False`` forgets that the cache of an earlier turn has gaps."""
    model = shared(family)
    inputs = make_inputs(family, model, RAGGED)
    with vp.wrap(model, recipe) as run:
        first, _, _ = generate_logits(model, inputs, 4)
        keep = run.last.keep
        run.enabled = False
        turn = next_turn(inputs, first.sequences, first.past_key_values, words(len(RAGGED), 5, 1))
        second, _, logits = generate_logits(model, turn, 4)
    expected = masked_logits(model, inputs, keep, second.sequences[:, inputs["input_ids"].shape[1] : -1])
    torch.testing.assert_close(logits, expected[:, turn["input_ids"].shape[1] - 1 :], atol=TOLERANCE, rtol=0)


@families
@recipes
def test_conversation_begun_without_pruning(family, recipe):
    """Red: a cache filled before the model was wrapped is dropped, masked or addressed wrongly."""
    model = shared(family)
    inputs = make_inputs(family, model, RAGGED)
    first, _, _ = generate_logits(model, inputs, 4)
    turn = next_turn(inputs, first.sequences, copy.deepcopy(first.past_key_values), words(len(RAGGED), 5, 1))
    _, sequence, logits = generate_logits(model, turn, 4)
    turn["past_key_values"] = first.past_key_values
    with vp.wrap(model, recipe):
        _, ours, our_logits = generate_logits(model, turn, 4)
    assert torch.equal(ours, sequence)
    assert torch.equal(our_logits, logits)


@recipes
def test_picture_after_an_unpruned_turn(recipe):
    """Red: cutting at the first picture of a conversation treats the padding or text already in the cache wrongly."""
    model = shared("llava")
    opening = [["text9"], ["text4"]]
    inputs = make_inputs("llava", model, opening)
    later = make_inputs("llava", model, [["text3", "image", "text6"]] * 2, seed=5)
    with vp.wrap(model, recipe) as run:
        run.enabled = False
        first, _, _ = generate_logits(model, inputs, 4)
        run.enabled = True
        past = first.past_key_values.get_seq_length()
        turn = next_turn(inputs, first.sequences, first.past_key_values, later["input_ids"])
        _, generated, logits = generate_logits(model, turn | {"pixel_values": later["pixel_values"]}, 5)
        keep = {layer: torch.cat([torch.ones(2, past).bool(), mask], 1) for layer, mask in run.last.keep.items()}
    whole = {"input_ids": turn["input_ids"], "attention_mask": turn["attention_mask"]}
    assert_equals_masked(model, whole | {"pixel_values": later["pixel_values"]}, keep, generated, logits)


def test_cache_outlives_the_wrap():
    """Red: a conversation begun under pruning gives wrong tokens after ``remove()``: it must be right, or raise."""
    model = shared("llava")
    inputs = make_inputs("llava", model, ONE)
    with vp.wrap(model, RECIPES["before the model"]) as run:
        first, _, _ = generate_logits(model, inputs, 4)
        keep = run.last.keep
    turn = next_turn(inputs, first.sequences, first.past_key_values, words(1, 5, 1))
    try:
        second, _, logits = generate_logits(model, turn, 4)
    except (ValueError, RuntimeError):
        return  # refused: fine
    prompt = inputs["input_ids"].shape[1]
    expected = masked_logits(model, inputs, keep, second.sequences[:, prompt:-1])
    torch.testing.assert_close(logits, expected[:, turn["input_ids"].shape[1] - 1 :], atol=TOLERANCE, rtol=0)


# --- threads ---------------------------------------------------------------------------------------------------------
def in_threads(*jobs, meet_in=()):
    """Results of the jobs, run at the same time; the first exception is raised here.

    In every forward of the modules ``meet_in``, the threads wait for each other, so that they are surely inside the same
    model at once: all jobs must then call these modules equally often.
    """
    results: list = [None] * len(jobs)
    errors: list[BaseException] = []
    meeting = threading.Barrier(len(jobs), timeout=60)

    def work(index):
        try:
            meeting.wait()
            results[index] = jobs[index]()
        except BaseException as error:
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]

    def meet(module, args, output):
        meeting.wait()

    handles = [module.register_forward_hook(meet) for module in meet_in]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    if errors:
        raise errors[0]
    return results


def several_generations(family, model, seeds, **strategy):
    out = []
    for seed in seeds:
        inputs = make_inputs(family, model, RAGGED if seed % 2 else ONE, seed)
        out.append(model.generate(**inputs, max_new_tokens=6, **strategy))
    return out


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("others", FAMILIES)
def test_two_models_in_two_threads(others):
    """Red: a call's context is global, so that two models disturb each other."""
    jobs = []
    for family, recipe, seed in (("llava", "fastv:layer=2,fraction=0.4", 0), (others, RECIPES["two stages"], 10)):
        model = build(family, seed=seed)
        warm_up(model, family)

        def job(family=family, recipe=recipe, seed=seed, model=model):
            out = []
            for _ in range(2):
                with vp.wrap(model, recipe):
                    out += several_generations(family, model, range(seed, seed + 3))
                out += several_generations(family, model, [seed])
            return out

        jobs.append(job)
    expected = [job() for job in jobs]
    for ours, theirs in zip(in_threads(*jobs), expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llava", "fastv:layer=2,fraction=0.4"),
        ("llava", "cls:layer=0,fraction=0.4"),
        ("llava", RECIPES["two stages"]),
        ("qwen2_5_vl", "fastv:layer=2,fraction=0.4"),
        ("qwen2_5_vl", RECIPES["two stages"]),
    ],
)
def test_one_model_in_two_threads(family, recipe, use_cache):
    """Red: the state of a call lives on the run or on the model, so that two callers mix their prompts."""
    model = shared(family)
    layers = decoder_layers(model)
    meet_in = [layers[0], layers[2]]
    if family == "llava":
        meet_in.append(model.model.vision_tower.encoder.layers[-1])
    with vp.wrap(model, recipe):
        jobs = [
            lambda seed=seed: several_generations(family, model, range(seed, seed + 2), use_cache=use_cache)
            for seed in (0, 100)
        ]
        expected = [job() for job in jobs]
        got = in_threads(*jobs, meet_in=meet_in)
    for ours, theirs in zip(got, expected, strict=True):
        assert_same(ours, theirs)


def test_layers_of_the_tests():
    """Red: the schedules above are not inside the models."""
    for family in FAMILIES:
        assert len(decoder_layers(shared(family))) == LAYERS


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
