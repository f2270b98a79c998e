"""Several samples packed into one row (position ids that start anew): each is computed, and pruned, as if it were alone.

Red before: position ids were dropped with the first cut, so that samples saw each other (logits off by 2 to 8), and methods
weighed the words of the last sample for the pictures of all.
"""

from __future__ import annotations

import pytest
import torch
from oracles import TOLERANCE, LiveMaskOracle
from promises.few import RECIPES
from tiny_models import FLEX, make_inputs, shared

import vlmprune as vp

ROWS = {
    "two": [["text3", "image", "text4"], ["text5", "image", "text6"]],
    "three, one without a picture": [["text5"], ["text3", "image", "text2", "image", "text4"], ["text4", "image", "text6"]],
}
ADDED = ["fastv:layer=1,tokens=8 + random:layer=3,tokens=3", "random:layer=0|2,fraction=0.5|0.2,positions=compact"]
ALL = [*(f"{name}:{budget}" for name, budget in RECIPES.items()), *ADDED]


def alone_and_packed(family, rows):
    """Every sample by itself, and all of them in one row without a mask."""
    model = shared(family)
    alone = [make_inputs(family, model, rows[number : number + 1], first=number) for number in range(len(rows))]
    together = {"input_ids": torch.cat([one["input_ids"] for one in alone], dim=1)}
    for name in ("pixel_values", "image_grid_thw"):
        if found := [one[name] for one in alone if name in one]:
            together[name] = torch.cat(found)
    positions = [position(model, one) for one in alone]
    together["position_ids"] = torch.cat(positions, dim=-1)
    for one in alone:
        del one["attention_mask"]
    return alone, together


def position(model, one):
    length = torch.arange(one["input_ids"].shape[1])
    if "mm_token_type_ids" not in one:
        return length[None]
    if "pixel_values" not in one:
        return length.expand(4, 1, -1)
    given = {name: one[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
    return torch.cat((length.expand(1, 1, -1), model.model.get_rope_index(**given)[0]))


def pieces(values, alone):
    return values.split([one["input_ids"].shape[1] for one in alone], dim=1)


@torch.no_grad()
def compare(model, recipe, alone, together):
    """Logits and choices of the packed samples are those of each alone, where it was computed."""
    with vp.wrap(model, recipe) as run:
        packed = model(**together, use_cache=False).logits
        record = run.last
        places = pieces(next(reversed(record.keep.values())), alone)
        kept, expected = [k.index.tolist() for k in record.kept], {}
        for number, (one, logits) in enumerate(zip(alone, pieces(packed, alone), strict=True)):
            if "pixel_values" not in one:
                run.enabled = False
                judge, alive = model(**one, use_cache=False).logits, torch.ones(1, logits.shape[1], dtype=torch.bool)
                run.enabled = True
            else:
                judge, alive = model(**one, use_cache=False).logits, next(reversed(run.last.keep.values()))
                assert torch.equal(alive, places[number])
                for chosen in run.last.kept:
                    expected.setdefault((chosen.site, chosen.layer), []).append(chosen.index.tolist())
            assert (logits - judge)[alive].abs().max() < TOLERANCE
        assert kept == [index for stage in expected.values() for index in stage]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("recipe", ALL)
def test_each_sample_is_as_if_it_were_alone(recipe, rows):
    compare(shared("llava"), recipe, *alone_and_packed("llava", ROWS[rows]))


@pytest.mark.parametrize("attn", ["eager", FLEX])
@pytest.mark.parametrize(
    "recipe", ["divprune:tokens=4", "fastv:layer=2,tokens=4", "pdrop:layer=2,tokens=4", "dart:layer=2,tokens=6"]
)
def test_other_attention(attn, recipe):
    compare(shared("llava", attn), recipe, *alone_and_packed("llava", ROWS["two"]))


@pytest.mark.parametrize("recipe", ["divprune:tokens=4", "fastv:layer=2,tokens=4", "sparsevlm:layer=2,tokens=6"])
def test_qwen_says_it_with_four_rows(recipe):
    compare(shared("qwen2_5_vl"), recipe, *alone_and_packed("qwen2_5_vl", ROWS["three, one without a picture"]))


def test_a_sample_that_ends_with_its_picture():
    """Its last token may be dropped: what is left of it still is another sample's no neighbour."""
    rows = [["text3", "image"], ["text5", "image"]]
    for recipe in ("fastv:layer=2,tokens=4 + fastv:layer=4,tokens=2", "pdrop:layer=2,tokens=4", "random:layer=0,tokens=4"):
        compare(shared("llava"), recipe, *alone_and_packed("llava", rows))


def test_rows_of_a_batch_that_are_packed_differently():
    model = shared("llava")
    _, first = alone_and_packed("llava", [["text3", "image", "text4"], ["text5", "image", "text6"]])
    _, second = alone_and_packed("llava", [["text5", "image", "text6"], ["text3", "image", "text4"]])
    both = {name: torch.cat((first[name], second[name])) for name in first}
    with torch.no_grad(), vp.wrap(model, "fastv:layer=2,tokens=4") as run:
        logits = model(**both, use_cache=False).logits
        alive = run.last.keep[2]
        for row, one in enumerate((first, second)):
            judge = model(**one, use_cache=False).logits
            assert (logits[row] - judge[0])[alive[row]].abs().max() < TOLERANCE


def test_what_the_plain_model_does_not_take_for_packed_is_not():
    """With a cache, or a mask, transformers takes position ids as they are: rows shifted, with gaps, or starting anew."""
    model = shared("llava")
    _, together = alone_and_packed("llava", ROWS["two"])
    length = together["input_ids"].shape[1]
    for positions in (together["position_ids"], torch.arange(length)[None] + 7, torch.arange(length)[None] * 2):
        given = {**together, "position_ids": positions}
        for more in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones(1, length, dtype=torch.long)}):
            with torch.no_grad():
                with vp.wrap(model, "divprune:layer=3,tokens=4") as run:
                    logits = model(**given, **more).logits
                keep = run.last.keep[3]
                with LiveMaskOracle(model, {3: keep}):
                    judge = model(**given, **more).logits
            assert (logits - judge)[keep].abs().max() < TOLERANCE


def test_positions_that_are_shifted_choose_the_same():
    model = shared("llava")
    inputs = make_inputs("llava", model, ROWS["two"][:1])
    for name in ("dart:layer=2,tokens=6", "fastv:layer=2,tokens=4", "flowcut:tokens=8", "sparsevlm:layer=2,tokens=6"):
        kept = []
        for start in (0, 9):
            position_ids = torch.arange(start, start + inputs["input_ids"].shape[1])[None]
            with vp.wrap(model, name) as run, torch.no_grad():
                model(**inputs, position_ids=position_ids)
            kept.append([k.index.tolist() for k in run.last.kept])
        assert kept[0] == kept[1], name


def test_a_gap_inside_a_picture_is_refused():
    model = shared("llava")
    (one, _), _ = alone_and_packed("llava", ROWS["two"])
    position_ids = torch.arange(one["input_ids"].shape[1])[None].clone()
    position_ids[:, 10:] += 5
    with vp.wrap(model, "divprune:tokens=4"), pytest.raises(vp.UsageError, match="lie in two packed samples of row"):
        model(**one, position_ids=position_ids, use_cache=False)


STEERED = [
    "zerotuning:gain=2",
    "pai:layers=1:4",
    "var:sink_dims=5|40,layers=1:4",
    "act:layers=1:4",
    "paint:layers=1:4",
    "vhr:layers=2:4",
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("method", STEERED)
@pytest.mark.parametrize("cut", ["", "divprune:layer=2,tokens=4 + ", "fastv:layer=1,tokens=8 + random:layer=3,tokens=3 + "])
def test_redistribution_of_each_sample_is_as_if_it_were_alone(method, cut, rows):
    if not cut:
        cut = "random:layer=0,fraction=1.0 + "
    compare(shared("llava"), cut + method, *alone_and_packed("llava", ROWS[rows]))


@pytest.mark.parametrize("method", ["zerotuning:gain=2", "vhr:layers=2:4"])
def test_redistribution_of_packed_rows_of_qwen(method):
    compare(shared("qwen2_5_vl"), "divprune:layer=2,tokens=4 + " + method, *alone_and_packed("qwen2_5_vl", ROWS["two"]))


@pytest.mark.parametrize("recipe", ["random:layer=0,fraction=1.0", "adaptinfer:layer=2,tokens=16", "zerotuning:gain=1"])
def test_where_nothing_is_dropped_nothing_is_refused(recipe):
    model = shared("llava")
    for rows in (*ROWS.values(), [["text3", "image"], ["image", "text3"]]):
        _, together = alone_and_packed("llava", rows)
        with torch.no_grad():
            expected = model(**together, use_cache=False).logits
            with vp.wrap(model, recipe):
                assert torch.equal(model(**together, use_cache=False).logits, expected)


def test_gradients():
    """Of the packed row: the sum of what each sample gives alone."""
    model = shared("llava")
    alone, together = alone_and_packed("llava", ROWS["two"])
    weight = model.model.language_model.layers[4].self_attn.q_proj.weight
    with vp.wrap(model, "divprune:layer=2,tokens=4"):
        model(**together, use_cache=False).logits[:, [-1, alone[0]["input_ids"].shape[1] - 1]].square().sum().backward()
        packed, weight.grad = weight.grad, None
        for one in alone:
            model(**one, use_cache=False).logits[:, -1].square().sum().backward()
    single, weight.grad = weight.grad, None
    model.zero_grad()
    assert ((packed - single).abs().max() / single.abs().max()) < 1e-4
