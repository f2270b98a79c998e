"""Several turns of a conversation on one pruned cache."""

from __future__ import annotations

import copy

import pytest
import torch
from callers import (
    ONE,
    RAGGED,
    interleaved,
    next_turn,
    words,
)
from oracles import (
    TOLERANCE,
    Entering,
    assert_equals_masked,
    effect_of,
    generate_logits,
    masked_logits,
    physical_lengths,
    prompt_positions,
    resident_lengths,
)
from promises.runs import (
    BATCH,
    CASES,
    KINDS,
    MUSTDROP,
    over,
    recipes,
)
from promises.stages import families
from tiny_models import (
    FAMILIES,
    FLEX,
    LAYERS,
    implementations_of,
    make_inputs,
    shared,
)

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")


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
    with vp.wrap(model, KINDS["two stages"]) as run:
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
    """Red: `enabled = False` forgets that the cache of an earlier turn has gaps."""
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
    """Red: a conversation begun under pruning gives wrong tokens after `remove()`: it must be right, or raise."""
    model = shared("llava")
    inputs = make_inputs("llava", model, ONE)
    with vp.wrap(model, KINDS["before the model"]) as run:
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


@over(CASES)
def test_a_second_turn_equals_one_forward(family, recipe):
    """Red: a later turn forgets moved positions, gaps, padding, or what the cache stage forgot."""
    model = shared(family)
    inputs = make_inputs(family, model, BATCH)
    with Entering(model) as entering, vp.wrap(model, recipe) as run:
        first, _, _ = generate_logits(model, inputs, 3)
        effect = effect_of(model, inputs, run, entering.prompts[0])
        turn = next_turn(inputs, first.sequences, first.past_key_values, words(len(BATCH), 5, 1))
        second, _, logits = generate_logits(model, turn, 3)
    prompt, start = inputs["input_ids"].shape[1], turn["input_ids"].shape[1] - 1
    expected = masked_logits(model, inputs, effect, second.sequences[:, prompt:-1])
    torch.testing.assert_close(logits, expected[:, start:], atol=TOLERANCE, rtol=0)
    unpruned = masked_logits(model, inputs, {}, second.sequences[:, prompt:-1])
    assert (logits[1] - unpruned[1, start:]).abs().max() > 0.1
    steps = second.sequences.shape[1] - 1 - prompt
    assert physical_lengths(second.past_key_values) == [n + steps for n in resident_lengths(effect, LAYERS)]
    assert {layer.get_seq_length() for layer in second.past_key_values.layers} == {prompt + steps}


TWO_PICTURES = [
    "dart:layer=2,fraction=0.4",
    "flowcut:fraction=0.3",
    "sparsevlm:layer=2,fraction=0.4",
    "tome:layer=1,fraction=0.4",
]
TWO_PICTURES += ["visionzip:fraction=0.4", "vscan:layer=0|3,fraction=0.5|0.25", "pdrop:layer=2|4,fraction=0.5|0.25"]


@pytest.mark.parametrize("recipe", [MUSTDROP, *(recipe + end for recipe in TWO_PICTURES for end in ("", ",positions=compact"))])
def test_a_second_turn_with_a_picture_equals_one_forward(recipe):
    """Red: pruning a later picture addresses, moves or forgets entries of the earlier turn."""
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text7", "image", "text4"], ["image", "text3"]])
    later = make_inputs("llava", model, [["text3", "image", "text6"]] * 2, seed=5)
    with Entering(model) as entering, vp.wrap(model, recipe) as run:
        first, _, _ = generate_logits(model, inputs, 3)
        effects = [effect_of(model, inputs, run, entering.prompts[0])]
        past = first.past_key_values.get_seq_length()
        turn = next_turn(inputs, first.sequences, first.past_key_values, later["input_ids"])
        second, generated, logits = generate_logits(model, turn | {"pixel_values": later["pixel_values"]}, 3)
        call = {name: turn[name][:, past:] for name in ("input_ids", "attention_mask")}
        effects.append(effect_of(model, call, run, entering.prompts[-1], start=past))
    whole = {"input_ids": turn["input_ids"], "attention_mask": turn["attention_mask"]}
    whole["pixel_values"] = torch.stack([inputs["pixel_values"], later["pixel_values"]], 1).flatten(0, 1)
    assert_equals_masked(model, whole, effects, generated, logits)
    only_first = masked_logits(model, whole, effects[:1], generated[:, :-1])[:, whole["input_ids"].shape[1] - 1 :]
    assert (logits - only_first).abs().amax((1, 2)).min() > 0.1
    lengths = [sum(lengths) for lengths in zip(*(resident_lengths(effect, LAYERS) for effect in effects), strict=True)]
    between = past - effects[0].end
    upper = [n + between + 2 for n in lengths]
    assert all(have <= most for have, most in zip(physical_lengths(second.past_key_values), upper, strict=True))
    assert {layer.get_seq_length() for layer in second.past_key_values.layers} == {second.sequences.shape[1] - 1}
