"""Every promise for every method on every family it claims.

The oracles (``tests/oracles.py``) play what a run says it did on the un-pruned stock model.  Whether a method chooses and
merges as its paper says is tested in ``tests/methods``; here, that the model computes exactly what was chosen.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from cases import PRUNING, ROWS
from oracles import (
    TOLERANCE,
    Effect,
    Entering,
    LiveMaskOracle,
    assert_equals_masked,
    decisions,
    decoder_layers,
    effect_of,
    generate_logits,
    image_columns,
    keep_from_record,
    masked_logits,
    naively_dropped_logits,
    physical_lengths,
    prompt_positions,
    resident_lengths,
    separators,
)
from test_generation import CountQueries, next_turn, words
from test_reversible import Snapshot
from tiny_models import (
    ALL_FAMILIES,
    FIRST_WORD,
    FLEX,
    FLEX_FAMILIES,
    LAYERS,
    VOCAB,
    build,
    image_lengths,
    make_inputs,
    make_single,
    shared,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmprune as vp

LLAVAS, QWENS = ("llava", "llava_next"), ("qwen2_5_vl", "qwen2_vl")
# Rows of different lengths with different numbers of pictures (of different sizes but for LLaVA-1.5), text between two
# pictures, a picture at the very beginning, and a row without one.
BATCH = [["text7", "image", "text4"], ["text2", "image", "text3", "image", "text5"], ["text11"], ["image", "text9"]]
TEXT_ROW = 2
STEPS = 4

EVERYWHERE = [row.recipe(arguments) for row in PRUNING if not row.cls for arguments in row.tiny]
MUSTDROP, THRESHOLDS = (f"mustdrop:{arguments}" for arguments in ROWS["mustdrop"].tiny)
WITH_CLS = [row.recipe(arguments) for row in PRUNING if row.cls for arguments in row.tiny]
SINGLE = [
    *((family, recipe) for family in ALL_FAMILIES for recipe in EVERYWHERE),
    *((family, recipe) for family in LLAVAS for recipe in WITH_CLS),
    ("qwen2_vl", "flowcut:fraction=0.3,variant_on_units=unit"),
    ("llava_next", "flowcut:fraction=0.2,newlines=drop"),
    *(
        ("llava_next", f"{recipe},newlines=drop")
        for recipe in (
            "cls:layer=0,fraction=0.4",
            "divprune:layer=0,fraction=0.4",
            "fastv:layer=2,fraction=0.4",
            "holov:layer=0,fraction=0.4",
            "visionzip:fraction=0.4",
        )
    ),
]
COMPACT = [(family, f"{recipe},positions=compact") for family, recipe in SINGLE if family in LLAVAS]
COMPOSED = [
    *(
        (family, recipe)
        for family in ALL_FAMILIES
        for recipe in (
            "divprune:fraction=0.6 + random:layer=4,fraction=0.2",
            "dart:layer=2,fraction=0.6 + random:layer=4,fraction=0.2",
            "flowcut:fraction=0.6 + pdrop:layer=4,fraction=0.2",
            "tome:layer=1,fraction=0.5 + random:layer=3,tokens=0",
            "uniform:fraction=0.8 + fastv:layer=3,fraction=0.4,cache_layer=0",
            "divprune:fraction=0.6 + random:layer=4,fraction=0.2,cache_layer=2",
        )
    ),
    *(
        (family, recipe)
        for family in LLAVAS
        for recipe in (
            "visionzip:fraction=0.6 + fastv:layer=3,fraction=0.3",
            "visionzip:fraction=0.6,positions=compact + fastv:layer=3,fraction=0.3",
            "uniform:fraction=0.7 + sparsevlm:layer=2,fraction=0.5,positions=compact + random:layer=4,fraction=0.2",
            "mustdrop:layer=1,fraction=0.6,merge=0.3,cache_layer=0",
            "mustdrop:layer=1,fraction=0.6,merge=0.3,cache_layer=3 + cls:layer=4,fraction=0.3",
        )
    ),
]
CASES = SINGLE + COMPACT + COMPOSED
FEW = [  # one of each kind: merging, tower, cache stage, compact, several stages
    ("llava", "fastv:layer=2,fraction=0.4,positions=compact"),
    ("llava", MUSTDROP),
    ("llava", "visionzip:fraction=0.4"),
    ("llava", "vscan:layer=0|3,fraction=0.5|0.25,positions=compact"),
    ("llava_next", "flowcut:fraction=0.3"),
    ("llava_next", "sparsevlm:layer=2,fraction=0.4,positions=compact"),
    ("qwen2_5_vl", "flowcut:fraction=0.3"),
    ("qwen2_5_vl", "dart:layer=2,fraction=0.4"),
    ("qwen2_vl", "flowcut:fraction=0.3"),
    ("qwen2_vl", "tome:layer=1,fraction=0.4"),
]


def over(cases):
    return pytest.mark.parametrize(("family", "recipe"), cases, ids=[f"{family}-{recipe}" for family, recipe in cases])


def without_cache_stage(cases):
    """The methods as they are where nothing can be forgotten after prefill."""
    return [
        (family, re.sub(r",cache_layer=\d", "", recipe) + ",cache_layer=-1" * ("mustdrop" in recipe))
        for family, recipe in cases
    ]


def one_sentence(refusal: Exception) -> None:
    assert "\n" not in str(refusal)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Ran:
    """One greedy generation of ``BATCH``, which several tests look at."""

    inputs: dict
    effect: Effect
    last: Any
    report: vp.Report
    generated: torch.Tensor
    logits: torch.Tensor
    cache: Any


def run_on(model, inputs: dict, recipe: str, steps: int = STEPS, **strategy) -> Ran:
    with torch.no_grad(), Entering(model) as entering, vp.wrap(model, recipe) as run:
        output, generated, logits = generate_logits(model, inputs, steps, **strategy)
        effect = effect_of(model, inputs, run, entering.prompts[0])
        return Ran(inputs, effect, run.last, run.report(), generated, logits, output.past_key_values)


@functools.cache
def ran(family: str, recipe: str) -> Ran:
    model = shared(family)
    return run_on(model, make_inputs(family, model, BATCH), recipe)


@functools.cache
def untouched(family: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences, logits of each step and logits of a plain forward of the model without us."""
    model = shared(family)
    inputs = make_inputs(family, model, BATCH)
    with torch.no_grad():
        output, _, logits = generate_logits(model, inputs, STEPS)
        return output.sequences, logits, model(**inputs).logits


def assert_untouched(family: str, model) -> None:
    inputs = make_inputs(family, model, BATCH)
    output, _, logits = generate_logits(model, inputs, STEPS)
    real = inputs["attention_mask"].bool()
    for ours, theirs in zip((output.sequences, logits), untouched(family), strict=False):
        assert torch.equal(ours, theirs)
    assert torch.equal(model(**inputs).logits[real], untouched(family)[2][real])


def test_every_method_and_every_pair_with_a_family_is_here():
    """Red: a method was added and nothing here runs it, or a family that it claims is left out."""
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


# --- pruned equals masked --------------------------------------------------------------------------------------------
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
    """Red (G9): scores, masks or features of eager models; or a decoding step after a cut has masks of a wrong size."""
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
    """Red (G13): prefill and cached steps differ from running the sequence again with its rows really cut out."""
    model = shared(family)
    it = run_on(model, make_single(family, model, BATCH, 1), recipe)
    logits, columns = naively_dropped_logits(model, it.inputs, it.effect, it.generated[:, :-1])
    assert len(columns) == resident_lengths(it.effect, LAYERS)[-1] + STEPS - 1
    torch.testing.assert_close(logits[:, -STEPS:], it.logits, atol=TOLERANCE, rtol=0)


@over(SINGLE + COMPACT)
def test_no_mask_and_no_cache_equal_the_mask_of_ones(family, recipe):
    """Red (G8): without mask and cache, gaps in the positions are taken for packed sequences."""
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


@over(CASES)
def test_the_record_is_the_decision(family, recipe):
    """Red: ``keep``, ``kept`` and the row separators contradict each other, or a picture's indices do not rise."""
    model, it = shared(family), ran(family, recipe)
    rebuilt = keep_from_record(model, it.inputs, it.last)
    assert rebuilt.keys() == it.last.keep.keys()
    for layer, mask in rebuilt.items():
        assert torch.equal(mask, it.last.keep[layer])
    assert all(index == sorted(set(index)) for index in decisions(it.last).values())
    assert {image.sample for image in it.last.kept} == {0, 1, 3}


# --- keeping everything, and leaving ---------------------------------------------------------------------------------
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


@over(KEEP_ALL)
def test_keeping_everything_is_bit_identical(family, recipe):
    """Red: the machinery itself (scores, towers, gathers, masks, caches) disturbs a model from which nothing is dropped."""
    model = shared(family)
    with vp.wrap(model, recipe) as run:
        assert_untouched(family, model)
        assert all(len(image.index) == image.original and image.features is None for image in run.last.kept)
        assert run.last.kept


@over(SINGLE)
def test_leaving_restores_the_model(family, recipe):
    """Red: a hook stays, or a disabled run still works inside the tower or the cache."""
    model = shared(family)
    inputs = make_inputs(family, model, BATCH)
    before = Snapshot(model)
    with vp.wrap(model, recipe) as run:
        pruned = model(**inputs).logits
        run.enabled = False
        assert_untouched(family, model)
        run.enabled = True
        assert torch.equal(model(**inputs).logits, pruned)
    assert_untouched(family, model)
    assert Snapshot(model).differences(before) == []
    run = vp.wrap(model, recipe)
    model(**inputs)
    run.remove()
    assert torch.equal(model(**inputs).logits[:, -1], untouched(family)[2][:, -1])


# --- batches and seeds -----------------------------------------------------------------------------------------------
@functools.cache
def text_alone(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of text by the stock model: in a batch, pruning leaves it as it is."""
    return generate_logits(shared(family), make_single(family, shared(family), BATCH, TEXT_ROW), STEPS)[1:]


@over(CASES)
def test_a_batch_equals_its_rows_alone(family, recipe):
    """Red (G14, G15): what a picture keeps, or a row computes, depends on who shares its batch."""
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


# --- budgets, the cache and the report -------------------------------------------------------------------------------
def pictures(family: str, model, inputs: dict) -> list[int]:
    """Visual tokens of every picture, row separators left out."""
    if family == "llava_next":
        return [int((~separator).sum()) for separator in separators(model, inputs)]
    return [n for row in image_lengths(family, BATCH) for n in row]


@over(SINGLE)
def test_budgets_are_exact_for_every_picture(family, recipe):
    """Red: a share is not of the picture's own original tokens, row separators are counted, or rounding differs."""
    it = ran(family, recipe)
    originals = pictures(family, shared(family), it.inputs)
    kept: dict[tuple[str, int], list[int]] = {}
    for image in it.last.kept:
        kept.setdefault((image.site, image.layer), []).append(len(image.index))
    assert [[image.original for image in it.last.kept if (image.site, image.layer) == stage] for stage in kept] == [
        originals
    ] * len(kept)
    left = kept.pop(("vision", 0), originals)
    if recipe == THRESHOLDS:
        assert all(0 < now < before for now, before in zip(kept["llm", 4], originals, strict=True))
        return
    if recipe.startswith("flowcut:fraction"):
        share = 0.2 if "newlines" in recipe else 0.3
        if family in QWENS:  # twice as many reach the language model
            wider = left if left != originals else kept.pop(("llm", 0))
            assert wider == [int(2 * share * n + 0.5) for n in originals]
            assert list(kept) == [("llm", 2)]
        elif family == "llava_next":
            assert list(kept) == [("llm", 2)]
            assert all(now < before for now, before in zip(left, originals, strict=True)), "no view was shortened in the tower"
        (last,) = kept.values() if kept else (left,)
        assert last == [int(share * n + 0.5) for n in originals]
        return
    if recipe == MUSTDROP:
        assert any(now < before for now, before in zip(left, originals, strict=True)), "no window was merged in the tower"
        assert kept.pop(("cache", 1)) == kept["llm", 4]
    arguments = dict(pair.split("=") for pair in recipe.split(":")[1].split(","))
    shares = [float(share) for share in arguments["fraction"].split("|")]
    layers = [int(layer) for layer in arguments.get("layer", "0").split("|")]
    assert kept == {
        ("llm", layer): [min(int(share * n + 0.5), most) for n, most in zip(originals, left, strict=True)]
        for layer, share in zip(layers, shares, strict=True)
    }


LATER_CUTS = [*COMPOSED, ("llava_next", "random:layer=1,fraction=0.4 + cls:layer=3,fraction=0.3")]


@over(LATER_CUTS)
def test_the_last_budget_of_a_composition_is_exact(family, recipe):
    """Red: a later cut keeps another number than it was given, although an earlier one left enough."""
    it = ran(family, recipe)
    method = [part.strip() for part in recipe.split("+")][-1]
    (budget,) = [pair.split("=") for pair in method.split(":")[1].split(",") if pair[:5] in ("fract", "token")]
    layer = max(image.layer for image in it.last.kept if image.site == "llm")
    *_, before, last = [stage.kept for stage in it.report.stages if stage.site != "cache"]
    assert it.report.stages[-1].layer == layer or it.report.stages[-1].site == "cache"
    originals = pictures(family, shared(family), it.inputs)
    wanted = [int(float(budget[1]) * n + 0.5) if budget[0] == "fraction" else int(budget[1]) for n in originals]
    assert list(last) == [min(pair) for pair in zip(wanted, before, strict=True)]


@over(CASES)
def test_the_cache_holds_what_was_kept(family, recipe):
    """Red: a layer's cache has entries of dropped tokens, lacks some, or misreports the length of the conversation."""
    it = ran(family, recipe)
    steps = STEPS - 1
    assert physical_lengths(it.cache) == [n + steps for n in resident_lengths(it.effect, LAYERS)]
    logical = it.inputs["input_ids"].shape[1] + steps
    assert [layer.get_seq_length() for layer in it.cache.layers] == [logical] * LAYERS
    assert it.report.entering[-1] < it.inputs["input_ids"].shape[1]


@over([*SINGLE, *COMPACT[::7], ("llava", MUSTDROP.replace("cache_layer=1", "cache_layer=3"))])
def test_reported_bytes_are_the_caches(family, recipe):
    """Red: the report's KV bytes are not those of the cache that generation goes on with; a cache stage frees nothing."""
    model = shared(family)
    it = run_on(model, make_inputs(family, model, BATCH), recipe, 1)
    assert it.report.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in it.cache.layers)
    assert it.report.kv_bytes < it.report.kv_bytes_unpruned
    without = resident_lengths(replace(it.effect, keep_cache={}), LAYERS)
    assert it.last.stored == without
    first = min(it.effect.keep_cache, default=LAYERS)
    later = max(it.effect.keep)  # from here on prefill has dropped all that the cache forgets
    freed = [now < before for now, before in zip(it.last.resident, without, strict=True)]
    assert freed == [first <= layer < later for layer in range(LAYERS)]


@over([("llava", MUSTDROP), ("llava_next", THRESHOLDS), ("llava", "pdrop:layer=2|4,fraction=0.5|0.25,positions=compact")])
@pytest.mark.parametrize("row", [None, 1], ids=["batch", "one row"])
def test_plain_forwards_equal_generate(family, recipe, row):
    """Red: only ``generate`` cuts the cache after prefill, or only it goes on at the right positions."""
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


NAMES = {
    "cdpruner": "cdpruner (embedding)",
    "flowcut:layer": "flowcut (decoder only)",
    "llava flowcut:fraction": "flowcut",
    "llava_next flowcut:fraction": "flowcut (per view)",
    "qwen2_5_vl flowcut:fraction": "flowcut (unit)",
    "qwen2_vl flowcut:fraction=0.3": "flowcut (official)",
    "qwen2_vl flowcut:fraction=0.3,variant": "flowcut (unit)",
    "mustdrop": "mustdrop (target counts)",
    "mustdrop:global": "mustdrop (thresholds)",
}


@over(SINGLE)
def test_report_names_variant_site_and_separators(family, recipe):
    """Red: a reader cannot tell which form of a method ran, where it cut, or what happened to the row separators."""
    it = ran(family, recipe)
    name = recipe.split(":")[0]
    for start, named in NAMES.items():  # the last that fits
        name = named if f"{family} {recipe}".startswith(start) or recipe.startswith(start) else name
    assert {stage.method for stage in it.report.stages} == {name}

    fields_ = dict(pair.split("=") for pair in recipe.split(":")[1].split(","))
    places = [("llm", int(layer)) for layer in fields_.get("layer", "0").split("|")]
    if recipe == MUSTDROP:
        places = [("vision", 0), *places, ("cache", 1)]
    elif recipe == THRESHOLDS:
        places = [*places, ("cache", 2)]
    elif recipe.startswith("flowcut:fraction"):
        places = [("llm", 0) if "unit" in name else ("vision", 0), ("llm", 2)][: 1 if family == "llava" else 2]
    assert [(stage.site, stage.layer) for stage in it.report.stages] == places

    text = str(it.report)
    words_for = {"vision": "the vision tower", "llm": "layer {}", "cache": "the cache from layer {} on"}
    for site, layer in places:
        assert f"kept at {words_for[site].format(layer)} ({name})" in text
    if family == "llava_next":
        count = sum(int(separator.sum()) for separator in separators(shared(family), it.inputs))
        policy = "dropped" if "newlines=drop" in recipe else "kept"
        assert (it.report.newlines, it.report.newline_policy) == (count, policy)
        assert f"{count}, counted as text, {policy}" in text
        columns = image_columns(shared(family), it.inputs["input_ids"])
        visible = int((it.effect.keep[max(it.effect.keep)] & columns).sum())
        assert visible == sum(it.report.stages[-1].kept) + count * (policy == "kept")
    else:
        assert it.report.newlines == 0
        assert "row separators" not in text


@over(
    [
        ("llava", "flowcut:fraction=0.5"),
        ("llava", "mustdrop:layer=2,fraction=0.5,merge=0.3"),
        ("llava_next", "visionzip:fraction=0.5"),
    ]
)
def test_override_reaches_every_site(family, recipe):
    """Red: another budget for one call does not reach the tower, or leaks into the next call."""
    model = shared(family)
    inputs = make_inputs(family, model, BATCH)
    with vp.wrap(model, recipe) as run, Entering(model) as entering:
        model(**inputs)
        before = decisions(run.last)
        with run.override(tokens=3):
            _, generated, logits = generate_logits(model, inputs, 2)
            assert run.report().stages[-1].kept == (3, 3, 3, 3)
            effect = effect_of(model, inputs, run, entering.prompts[1])
        model(**inputs)
        assert decisions(run.last) == before
    assert_equals_masked(model, inputs, effect, generated, logits)


# --- strategies ------------------------------------------------------------------------------------------------------
STRATEGIES = {
    "beam": {"num_beams": 2},
    "sampling": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "no cache, beam": {"use_cache": False, "num_beams": 2},
}


def seeded(model, inputs: dict, **strategy):
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, output_scores=True, **strategy)


@over(FEW)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_equal_the_live_oracle(family, recipe, strategy):
    """Red: beams, returned sequences or prompts that run again take other features, positions or masks than their sample."""
    if "no cache" in strategy:
        ((family, recipe),) = without_cache_stage([(family, recipe)])
    model = shared(family)
    inputs = make_inputs(family, model, BATCH)
    with Entering(model) as entering, vp.wrap(model, recipe) as run:
        output = seeded(model, inputs, **STRATEGIES[strategy])
        effect = effect_of(model, inputs, run, entering.prompts[0]).one_per_sample(len(BATCH))
    with LiveMaskOracle(model, effect):
        expected = seeded(model, inputs, **STRATEGIES[strategy])
    assert torch.equal(output.sequences, expected.sequences)
    assert not torch.equal(output.sequences, seeded(model, inputs, **STRATEGIES[strategy]).sequences), "the test is blind"
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
def test_prompt_lookup_equals_greedy(family, recipe):
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


# --- conversations ---------------------------------------------------------------------------------------------------
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


# --- refusals --------------------------------------------------------------------------------------------------------
ON_QWEN = [(family, recipe.split(",positions")[0]) for family in QWENS for recipe in WITH_CLS]


@over(ON_QWEN)
def test_methods_of_the_cls_token_are_refused_on_qwen(family, recipe):
    """Red: attention of a token that is not there is replaced by something else."""
    refused(family, recipe, "needs the attention of the vision tower's CLS token, but its vision tower has no CLS token")


CONTRADICTIONS = [
    ("llava", "cls:fraction=0.2 + fastv:layer=2,fraction=0.5", "a later stage cannot keep more"),
    ("llava", "flowcut:fraction=0.2 + pdrop:layer=3,fraction=0.5", "a later stage cannot keep more"),
    ("llava_next", "visionzip:tokens=8 + dart:layer=3,tokens=9", "a later stage cannot keep more"),
    ("llava", "tome:layer=2,fraction=0.5 + dart:layer=2,fraction=0.2", "tome and dart both prune at layer 2"),
    ("llava", "visionzip:fraction=0.5 + divprune:fraction=0.2", "both prune at layer 0"),
    ("qwen2_vl", "flowcut:fraction=0.3 + fastv:layer=2,fraction=0.2", "both prune at layer 2"),
    ("llava", "flowcut:fraction=0.5 + mustdrop:layer=3,fraction=0.3", "both prune at the vision tower"),
    ("llava_next", "mustdrop:layer=3,fraction=0.3 + flowcut:fraction=0.5", "cut"),
    ("llava", "fastv:layer=6", "the model has layers 0 to 5"),
    ("qwen2_5_vl", "dart:layer=7,fraction=0.2", "the model has layers 0 to 5"),
    ("llava", "vscan", "the model has layers 0 to 5"),
    ("qwen2_vl", "flowcut:fraction=0.3,decoder_layer=6", "the model has layers 0 to 5"),
    ("llava", "mustdrop:layer=2,fraction=0.3,cache_layer=6", "the model has layers 0 to 5"),
    ("llava", "visionzip:layer=3,fraction=0.3", "its only place is layer=0, found 3"),
    ("llava", "flowcut:layer=0,fraction=0.3", "flowcut cannot prune before layer 1"),
    ("qwen2_5_vl", "flowcut:fraction=0.3,variant_on_units=official", "breaks the windows"),
    ("llava", "flowcut:tokens=0", "keep at least tokens=1"),
    ("llava", "mustdrop:layer=2,fraction=0.3,global_threshold=0.1", "give both or neither"),
    ("llava", "random:layer=0|3,fraction=0.5|0.2,site=vision|llm", "random"),  # works nowhere inside a tower
    ("llava", "flowcut:layer=1|2,fraction=0.5|0.2,site=vision|llm", "layer"),  # the tower's place is layer 0
    *((family, "random:fraction=0.5,positions=compact", "has no meaning for the M-RoPE") for family in QWENS),
]


def refused(family: str, recipe: str, sentence: str) -> None:
    model = shared(family)
    with pytest.raises(vp.UsageError) as refusal:
        vp.wrap(model, recipe).remove()
    assert sentence in str(refusal.value)
    one_sentence(refusal.value)
    assert_untouched(family, model)


@pytest.mark.parametrize(("family", "recipe", "sentence"), CONTRADICTIONS, ids=[f"{f}-{r}" for f, r, _ in CONTRADICTIONS])
def test_contradictions_are_refused(family, recipe, sentence):
    """Red: a recipe that cannot work is accepted, and prunes nothing or something else."""
    refused(family, recipe, sentence)


@pytest.mark.parametrize("name", sorted({recipe.split(":")[0] for recipe in EVERYWHERE}))
@pytest.mark.parametrize("family", QWENS)
def test_renumbering_is_refused_on_qwen(family, name):
    """Red: places in the picture are shifted as if they were one number."""
    refused(family, f"{name}:layer=2,fraction=0.4,positions=compact", 'use positions="original"')


# --- recipes ---------------------------------------------------------------------------------------------------------
FORMS = [row.recipe(arguments) for row in PRUNING for arguments in row.written]
FORMS = [form if "cache_layer" in form else f"{form},cache_layer=1" for form in FORMS]


@pytest.mark.parametrize(
    "text",
    [
        *FORMS,
        *vp.METHODS,
        "divprune:fraction=0.6 + dart:layer=2,fraction=0.5,positions=compact + random:layer=4,tokens=3,seed=9",
    ],
)
def test_recipes_come_back_from_strings_and_files(text, tmp_path):
    """Red: a parameter, a site or a digit is lost on the way through a string or a file."""
    recipe = vp.Recipe.parse(text)
    assert vp.Recipe.parse(str(recipe)) == recipe
    assert vp.Recipe.from_dict(recipe.to_dict()) == recipe
    recipe.save_pretrained(tmp_path)
    assert vp.Recipe.from_pretrained(tmp_path) == recipe
    assert str(vp.Recipe.from_pretrained(tmp_path)) == str(recipe)


PLACES = [
    "flowcut:layer=0,tokens=5,site=vision",
    "flowcut:layer=1,tokens=5,site=vision",
    "random:layer=3|1,fraction=0.4|0.4,site=llm|cache",
    "random:layer=3,fraction=0.4,site=cache",
    "random:layer=0,fraction=0.4,site=vision",
]


@pytest.mark.parametrize("text", PLACES)
def test_places_come_back_or_are_refused(text):
    """Red: written down, a stage moves to another place."""
    try:
        recipe = vp.Recipe.parse(text)
    except vp.UsageError as refusal:
        return one_sentence(refusal)
    assert vp.Recipe.parse(str(recipe)) == recipe
    assert vp.Recipe.from_dict(recipe.to_dict()) == recipe


def test_code_cannot_be_written_down():
    """Red: a file is written that cannot be read again."""
    recipe = vp.Recipe.of(vp.CDPruner(tokens=5, relevance=lambda features, ids, valid: features.sum(-1)))
    with pytest.raises(vp.UsageError, match="cannot hold relevance"):
        recipe.to_dict()


def test_every_parameter_goes_through_a_string():
    """Red: a parameter was added that no form above carries. `relevance` is code, which no string can hold."""
    given: dict[str, set[str]] = {name: set() for name in vp.METHODS}
    for form in FORMS:
        name, _, arguments = form.partition(":")
        given[name] |= {pair.split("=")[0] for pair in arguments.split(",")}
        method, default = vp.Recipe.parse(form).methods[0], vp.METHODS[name]()
        for pair in arguments.split(","):
            key = pair.split("=")[0]
            if key not in ("layer", "tokens", "fraction", "preset", "site"):
                given[name] -= {key} if getattr(method, key) == getattr(default, key) else set()
    for name, method in vp.METHODS.items():
        own = {field.name for field in fields(method)} - {"schedule", "relevance"}
        drops = vp.Recipe.of(method(newlines="drop"))  # every method has it, and no form above is about it
        assert "newlines=drop" in str(drops)
        assert vp.Recipe.parse(str(drops)) == drops
        given[name] |= {"newlines"}
        if name == "sparsevlm":
            given[name] |= {"version"}
        assert own - given[name] == set(), name


# --- memory and speed: nothing n×n, nothing eager --------------------------------------------------------------------
SIDE = 64
TOKENS = SIDE**2


@functools.cache
def large_model() -> tuple[Any, dict]:
    """Two thin decoder layers and a thin tower, but a picture of 4096 tokens."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=1,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8192,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=1, image_seq_length=TOKENS)
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
        pixels = torch.randn(1, 3, SIDE, SIDE)
    ids = torch.tensor([[9, 10, 11, *[1] * TOKENS, 12, 13, 14, 15, 16]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class Sizes(TorchDispatchMode):
    """Largest tensor that any operation made, and the attention kernels that ran."""

    def __init__(self):
        super().__init__()
        self.largest, self.by, self.attention = 0, "", []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if "scaled_dot_product" in name:
            self.attention.append((name, args[0].shape[2]))
        else:
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > 0 and tensor.numel() > self.largest:
                    self.largest, self.by = tensor.numel(), name
        return out


def measured(recipe: str | None) -> Sizes:
    model, inputs = large_model()
    if recipe is None:
        with Sizes() as sizes:
            model(**inputs, use_cache=True)
        return sizes
    with vp.wrap(model, recipe) as run, Sizes() as sizes:
        model(**inputs, use_cache=True)
    assert len(run.last.kept[-1].index) < TOKENS, "nothing was pruned"
    return sizes


STRICT, MERGING = TOKENS**2 // 8, TOKENS**2 // 2
"""Elements: an eighth of one n×n map; and half of one where a method's own file says what it compares."""
MEMORY = {
    "adaptinfer:layer=1,fraction=0.25": STRICT,
    "cdpruner:tokens=64": STRICT,
    "cls:fraction=0.25": STRICT,
    "dart:layer=1,fraction=0.25": STRICT,
    "divprune:tokens=64": TOKENS**2 + 1,  # all pairs at once where they fit into 64 MB, as they just do here
    "fastv:layer=1,fraction=0.25": STRICT,
    "flowcut:fraction=0.25": STRICT,
    "flowcut:layer=1,fraction=0.25": STRICT,
    "mustdrop:layer=1,fraction=0.25,merge=0.5,cache_layer=0": STRICT,
    "mustdrop:layer=1,fraction=1.0,global_threshold=0.001,individual_threshold=0.001,cache_layer=0": STRICT,
    "pdrop:layer=1,fraction=0.25": STRICT,
    "random:layer=1,fraction=0.25": STRICT,
    "sparsevlm:layer=1,fraction=0.95": STRICT,
    "sparsevlm:layer=1,fraction=0.25,version=2": STRICT,
    "uniform:layer=1,fraction=0.25": STRICT,
    "holov:fraction=0.25": STRICT,
    "sparsevlm:layer=1,fraction=0.25": STRICT,  # distances among 30 % of the dropped
    "tome:fraction=0.5": MERGING,  # one half against the other
    "visionzip:fraction=0.25": STRICT,  # the rest against its few targets
    "vscan:layer=0|1,fraction=0.25|0.1": MERGING,  # the dropped against the kept
}


@pytest.mark.parametrize("recipe", MEMORY)
def test_nothing_is_n_by_n(recipe):
    """Red: scores build an attention or similarity map of all tokens, or a layer falls back to eager attention."""
    sizes = measured(recipe)
    assert sizes.largest < MEMORY[recipe], f"{sizes.by} made {sizes.largest} numbers, n² is {TOKENS**2}"
    assert len(sizes.attention) == 4 + 2, "not one attention kernel for each block of the tower and each decoder layer"
    assert all("flash" in name for name, _ in sizes.attention)
    assert sizes.attention[4][1] == TOKENS + 8 or "layer=1" not in recipe


def test_the_measure_sees_n_by_n():
    """Red: the test above is blind."""
    model, _ = large_model()
    stock = measured(None)
    assert stock.largest < STRICT
    assert len(stock.attention) == 4 + 2
    with Sizes() as sizes:
        torch.nn.functional.normalize(torch.ones(TOKENS, 4)) @ torch.ones(4, TOKENS)
    assert sizes.largest == TOKENS**2
    assert len(decoder_layers(model)) == 2


def test_methods_of_the_memory_test():
    """Red: a method is missing there."""
    assert {recipe.split(":")[0] for recipe in MEMORY} == set(vp.METHODS)
