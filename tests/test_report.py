"""The report's FLOPs and bytes are those of a hand calculation, and of the cache itself."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import make_inputs, shared

import vlmprune as vp
from vlmprune.cost import DecoderShape
from vlmprune.live.record import Clock, Prefill
from vlmprune.live.report import Report
from vlmprune.show import units


def test_llava_7b_by_hand():
    """LLaVA-1.5-7B, 576 visual and 84 other tokens: d=4096, 32 heads of 128, MLP 11008, 32 layers (FlowCut's 8.82 T)."""
    shape = DecoderShape(layers=32, dim=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008)
    projections = 4 * 2 * 660 * 4096 * 4096  # q, k, v and o
    attention = 2 * 2 * 660 * 660 * 4096  # scores, and their product with the values
    mlp = 3 * 2 * 660 * 4096 * 11008
    assert shape.layer_flops(660, 660) == projections + attention + mlp == 274_272_092_160
    assert 32 * shape.layer_flops(660, 660) == pytest.approx(8.82e12, rel=0.01)
    assert 32 * shape.layer_kv_bytes(660, 2) == 346_030_080  # 2 · 660 · 4096 · 2 bytes · 32 layers


def test_llava_report_by_hand():
    """Tiny LLaVA: 6 layers, d=64, 4 heads of 16, MLP 96. 7 + 16 + 4 tokens; from layer 2 on 7 + 4 + 4."""
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text7", "image", "text4"]])
    with vp.wrap(model, "random:layer=2,fraction=0.25") as run, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        report = run.report()
    full = 4 * 2 * 27 * 64 * 64 + 4 * 27 * 27 * 64 + 6 * 27 * 64 * 96
    short = 4 * 2 * 15 * 64 * 64 + 4 * 15 * 15 * 64 + 6 * 15 * 64 * 96
    assert report.flops == 2 * full + 4 * short
    assert report.flops_unpruned == 6 * full
    assert report.kv_bytes == (2 * 27 + 4 * 15) * 2 * 64 * 4
    assert report.kv_bytes_unpruned == 6 * 27 * 2 * 64 * 4
    assert report.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert report.entering == (27, 27, 15, 15, 15, 15)
    assert report.visual_compute_average == (2 * 16 + 4 * 4) / 6  # what the layers read
    assert report.visual_nominal_average == (16 + 5 * 4) / 6  # what they pass on


def test_qwen_report_by_hand():
    """Tiny Qwen2.5-VL: grouped attention, 4 query and 2 key heads of 16; a ragged batch of two, padding counted as computed."""
    model = shared("qwen2_5_vl")
    # Row 0: 5 + (1 + 16 + 1) + 4 = 27 tokens; row 1: 2 + (1 + 24 + 1) + 1 = 29, so 2 of padding in row 0.
    inputs = make_inputs("qwen2_5_vl", model, [["text5", "image", "text4"], ["text2", "image", "text1"]])
    with vp.wrap(model, "random:layer=0|3,fraction=0.5|0.25") as run, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        report = run.report()
    # Kept: 8 and 12 of 16 and 24, then 4 and 6: rows of 11 + 8 = 19 and 5 + 12 = 17, then 15 and 11; the longer row counts.
    assert [stage.kept for stage in report.stages] == [(8, 12), (4, 6)]
    assert [stage.original for stage in report.stages] == [(16, 24)] * 2

    def layer(n: int) -> int:
        return 2 * n * 64 * (64 + 2 * 32) + 2 * n * 64 * 64 + 4 * n * n * 64 + 6 * n * 64 * 96

    assert report.flops == 2 * (3 * layer(19) + 3 * layer(15))
    assert report.flops_unpruned == 2 * 6 * layer(29)
    assert report.kv_bytes == 2 * (3 * 19 + 3 * 15) * 2 * 32 * 4
    assert report.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_report_is_readable():
    model = shared("llava")
    with vp.wrap(model, "divprune:layer=1,tokens=3") as run, torch.no_grad():
        with pytest.raises(vp.UsageError, match="nothing to report here"):
            run.report()
        model.generate(**make_inputs("llava", model, [["image", "text4"], ["image", "image", "text2"]]), max_new_tokens=3)
        text = str(run.report())
    assert "divprune:layer=1,tokens=3" in text
    assert "3 of 16 in each of 3 pictures" in text
    assert "prefill FLOPs" in text
    assert run.report().selection_ms < run.report().prefill_ms


def test_override_needs_one_stage():
    model = shared("llava")
    several = vp.wrap(model, "random:layer=0|2,fraction=0.5|0.25")
    with several as run, pytest.raises(vp.UsageError, match="recipe with one stage"), run.override(tokens=3):
        pass
    single = vp.wrap(model, "random:layer=0,fraction=0.5")
    with single as run, pytest.raises(vp.UsageError, match="fraction must lie in"), run.override(fraction=3):
        pass


def test_report_as_data():
    """Red: a report cannot be logged: it has no plain form, or one that JSON gives back otherwise."""
    model = shared("llava")
    with vp.wrap(model, "divprune:layer=0,tokens=9 + random:layer=2,tokens=3 + act:layers=1") as run, torch.no_grad():
        model(**make_inputs("llava", model, [["image", "text4"], ["image", "image", "text2"]]))
        report = run.report()
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["flops"] == report.flops
    assert data["stages"][1] == {
        "layer": 2,
        "method": "random",
        "site": "llm",
        "kept": [3] * 3,
        "original": [16] * 3,
        "frames": [[]] * 3,
    }
    assert data["edits"][0]["layers"] == [1]


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (units.size, 0, "0 B"),
        (units.size, 1023, "1023 B"),
        (units.size, 346_030_080, "330 MiB"),
        (units.size, 1.5 * 2**30, "1.5 GiB"),
        (units.size, 1023.96 * 1024, "1024 KiB"),
        (units.operations, 8.82e12, "8.82 TFLOPs"),
        (units.operations, 18.4e6, "18.4 MFLOPs"),
        (units.duration, 0.0123, "12.3 µs"),
        (units.duration, 3.456, "3.46 ms"),
        (units.duration, 75_000, "1.25 min"),
    ],
)
def test_units(form, value, text):
    assert form(value) == text


def test_printed_units():
    """Red: hundreds of MiB are printed in KiB, as 3.379e+05."""
    shape = DecoderShape(layers=32, dim=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008)
    record = Prefill(1, 660, 0, 576, shape, 2, entering=[148] * 32, stored=[148] * 32, resident=[148] * 32)
    record.held.append(record.resident)
    record.prefill = Clock(0.0, 1.5)
    printed = str(Report.of(record, "x"))
    assert "1.93 TFLOPs of 8.78 TFLOPs (22.0%)" in printed
    assert "74 MiB of 330 MiB (22.4%)" in printed
    assert "1.5 s, including 0 µs for choosing and dropping tokens" in printed
