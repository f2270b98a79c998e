"""Budgets, the record of a run, its report, and the cache agree with each other and with what was asked for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from oracles import (
    Entering,
    assert_equals_masked,
    decisions,
    effect_of,
    expected_counts,
    generate_logits,
    image_columns,
    keep_from_record,
    physical_lengths,
    resident_lengths,
    separators,
)
from promises.runs import (
    BATCH,
    CASES,
    COMPACT,
    COMPOSED,
    MUSTDROP,
    QWENS,
    SINGLE,
    STAGED,
    STEPS,
    THRESHOLDS,
    over,
    pictures,
    ran,
    run_on,
)
from promises.stages import BATCHES, families
from tiny_models import (
    LAYERS,
    image_lengths,
    make_inputs,
    shared,
)

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")


@over(CASES)
def test_the_record_is_the_decision(family, recipe):
    """Red: `keep`, `kept` and the row separators contradict each other, or a picture's indices do not rise."""
    model, it = shared(family), ran(family, recipe)
    rebuilt = keep_from_record(model, it.inputs, it.last)
    assert rebuilt.keys() == it.last.keep.keys()
    for layer, mask in rebuilt.items():
        assert torch.equal(mask, it.last.keep[layer])
    assert all(index == sorted(set(index)) for index in decisions(it.last).values())
    assert {image.sample for image in it.last.kept} == {0, 1, 3}
    stages = [it.last.keep[layer] for layer in sorted(it.last.keep)]
    assert all(not (later & ~earlier).any() for earlier, later in itertools.pairwise(stages)), "a dropped token came back"


@over([*SINGLE, *(case for case in STAGED if "+" not in case[1])])
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
    if recipe.startswith("evit") and family == "llava":
        assert left == [int(0.4 * n + 0.5) for n in originals]
        assert not kept
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
    (unit,) = {"fraction", "tokens"} & arguments.keys()
    shares = [float(share) for share in arguments[unit].split("|")]
    layers = [int(layer) for layer in arguments.get("layer", "0").split("|")]
    site = "pixels" if recipe.startswith("pixelprune") else "llm"
    if site == "pixels" and family == "llava_next":  # of every crop, padding included
        assert all(0.3 * n < now < 0.5 * n for now, n in zip(kept["pixels", 0], originals, strict=True))
        return
    assert kept == {
        (site, layer): [
            min(int(share * n + 0.5) if unit == "fraction" else int(share), most)
            for n, most in zip(originals, left, strict=True)
        ]
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


NAMES = {
    "cdpruner": "cdpruner (embedding)",
    "llava_next evit": "evit (per crop)",
    "flowcut:layer": "flowcut (decoder only)",
    "llava flowcut:fraction": "flowcut",
    "llava_next flowcut:fraction": "flowcut (per crop)",
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
    elif recipe.startswith("pixelprune"):
        places = [("pixels", 0)]
    elif recipe.startswith("evit"):
        places = [("vision", 0), ("llm", 0)][: 1 if family == "llava" else 2]
    elif recipe.startswith("flowcut:fraction"):
        places = [("llm", 0) if "unit" in name else ("vision", 0), ("llm", 2)][: 1 if family == "llava" else 2]
    assert [(stage.site, stage.layer) for stage in it.report.stages] == places

    text = str(it.report)
    words_for = {"vision": "inside the vision tower", "llm": "before layer {}", "cache": "in the KV cache from layer {} on"}
    words_for |= {("llm", 0): "before the language model", "pixels": "before the vision tower"}
    for site, layer in places:
        assert f"kept {words_for.get((site, layer), words_for[site]).format(layer)} ({name})" in text
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
