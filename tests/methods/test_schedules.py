"""What the papers' own schedules come to: layers, budgets, averages over layers."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import make_inputs, shared

import vlmprune as vp
from vlmprune.cost import DecoderShape
from vlmprune.live.record import Clock, Kept, Prefill
from vlmprune.live.report import Report
from vlmprune.view import TowerFacts

CLIP = TowerFacts(cls=True)


LLAVA_7B = DecoderShape(layers=32, dim=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008)

QWEN2_2B = DecoderShape(layers=28, dim=1536, heads=12, kv_heads=2, head_dim=128, mlp=8960)


def reported(recipe: str | vp.Pruner, shape: DecoderShape = LLAVA_7B, visual: int = 576) -> Report:
    """The report of one picture under a recipe, as a run writes it."""
    prompt = visual + 64
    record = Prefill(batch=1, sequence=prompt, past=0, visual=visual, shape=shape, itemsize=2)
    left = [visual] * shape.layers
    for stage, method in vp.Recipe.of(recipe).cuts(CLIP):
        if stage.site == "llm":
            count = stage.budget.resolve(visual)
            record.kept.append(Kept(stage.layer, method.name, "llm", 0, 0, visual, torch.arange(count)))
            left[stage.layer :] = [count] * (shape.layers - stage.layer)
    record.entering = [count + 64 for count in left]
    record.stored = record.resident = record.entering
    record.prefill = Clock(0.0, 0.0)
    return Report.of(record, str(recipe))


TABLE = [
    (vp.AdaptInfer(preset="llava-128"), 128.8, 146.3),
    (vp.AdaptInfer(preset="llava-64"), 65.0, 82.9),
    (vp.AdaptInfer(preset="llava-48"), 48.8, 66.7),
    (vp.AdaptInfer(preset="llava-32"), 33.0, 51.0),
    (vp.SparseVLM(preset="v1.5-192"), 192.0, 206.5),
    (vp.SparseVLM(preset="v1.5-128"), 128.6, 145.4),
    (vp.SparseVLM(preset="v1.5-96"), 96.9, 114.1),
    (vp.SparseVLM(preset="v1.5-64"), 64.8, 82.3),
    (vp.SparseVLM(version=2, preset="v2-192"), 192.4, 206.8),
    (vp.SparseVLM(version=2, preset="v2-128"), 128.0, 144.1),
    (vp.SparseVLM(version=2, preset="v2-96"), 96.8, 113.9),
    (vp.SparseVLM(version=2, preset="v2-64"), 64.4, 81.8),
    (vp.PDrop(), None, 270),
    (vp.FastV(), None, 306),
    (vp.FastV(layer=2, fraction=0.25), None, 171),
    (vp.VScan(), None, 64),
    ("divprune:tokens=284 + random:layer=20,tokens=38", None, 191.8),
    ("divprune:tokens=96 + random:layer=20,tokens=10", None, 63.8),
    ("dart:layer=2,tokens=252 + random:layer=20,tokens=38", None, 192.0),
    ("dart:layer=1,tokens=60 + random:layer=20,tokens=27", None, 63.8),
    ("divprune:tokens=284 + random:layer=20,tokens=0", None, 177.5),  # whose script calls it 192
    ("divprune:tokens=98 + random:layer=21,tokens=0", None, 64.3),
    ("dart:layer=2,tokens=260 + random:layer=21,tokens=0", None, 190.4),
    ("dart:layer=1,tokens=60 + random:layer=26,tokens=0", None, 64.9),
]


@pytest.mark.parametrize(
    ("recipe", "nominal", "compute"),
    TABLE,
    ids=lambda value: str(vp.Recipe.of(value)) if isinstance(value, vp.Pruner) else str(value),
)
def test_averages(recipe, nominal, compute):
    """Both ways of counting, nominal (what leaves a layer) and compute (what enters it), as papers count either."""
    report = reported(recipe)
    assert report.visual_compute_average == pytest.approx(compute, abs=0.051)
    if nominal is not None:
        assert report.visual_nominal_average == pytest.approx(nominal, abs=0.051)
    line = f"{report.visual_compute_average:.1f} enter a layer on average, {report.visual_nominal_average:.1f} leave it"
    assert re.search(rf"^visual tokens per prompt +{re.escape(line)}$", str(report), re.MULTILINE)


@pytest.mark.parametrize(("preset", "nominal", "compute"), [(10, 10.1, 13.6), (30, 29.7, 32.9), (50, 51.1, 54.0)])
def test_averages_of_adaptinfer_on_qwen2_vl(preset, nominal, compute):
    """28 layers, shares in per cent of 1000 tokens."""
    report = reported(vp.AdaptInfer(preset=f"qwen2-vl-{preset}"), QWEN2_2B, 1000)
    assert report.visual_nominal_average / 10 == pytest.approx(nominal, abs=0.06)
    assert report.visual_compute_average / 10 == pytest.approx(compute, abs=0.06)


def test_averages_of_a_run():
    """The same two numbers from a wrapped model: six layers of 16 tokens, 8 from layer 2 on, 3 from layer 4 on."""
    model = shared("llava")
    with vp.wrap(model, "uniform:layer=2|4,tokens=8|3") as run, torch.no_grad():
        model(**make_inputs("llava", model, [["text2", "image", "text3"], ["image", "text7"]]))
    report = run.report()
    assert report.visual_compute_average == pytest.approx((2 * 16 + 2 * 8 + 2 * 3) / 6)
    assert report.visual_nominal_average == pytest.approx((16 + 2 * 8 + 3 * 3) / 6)


def test_presets_stand_before_the_layer_after_theirs():
    """The papers cut behind layers 1, 10, 20 and 2, 6, 15 and 2, 6, 10, 14: before the next ones here."""
    assert [stage.layer for stage in vp.AdaptInfer(preset="llava-64").stages] == [2, 11, 21]
    assert [stage.layer for stage in vp.AdaptInfer(preset="qwen2-vl-10").stages] == [1, 10, 20]
    assert [stage.layer for stage in vp.SparseVLM(preset="v2-64").stages] == [3, 7, 16]
    assert [stage.layer for stage in vp.MustDrop().stages] == [3, 7, 11, 15]
    assert [stage.layer for stage in vp.PDrop().stages] == [8, 16, 24]


def test_published_defaults():
    """DivPrune's 56 of 576; FlowCut's K of a CLIP tower, K/2 per view of LLaVA-NeXT and 2K of Qwen, then K from layer 2 on."""
    assert vp.DivPrune().stages[0].budget.resolve(576) == 56

    def plan(method, **facts):
        return [(s.site, s.layer, s.budget.tokens, s.budget.fraction) for s in method.plan(TowerFacts(**facts))]

    assert plan(vp.FlowCut(tokens=64), cls=True) == [("vision", 0, 64, None)]
    assert plan(vp.FlowCut(tokens=321), cls=True, crops=True) == [("vision", 0, 160, None), ("llm", 2, 321, None)]
    assert plan(vp.FlowCut(tokens=64), patches_per_token=4) == [("vision", 0, 128, None), ("llm", 2, 64, None)]
    assert plan(vp.FlowCut(tokens=64), patches_per_token=4, windows=True) == [("llm", 0, 128, None), ("llm", 2, 64, None)]
    assert plan(vp.FlowCut(fraction=0.1), patches_per_token=4) == [("vision", 0, None, 0.2), ("llm", 2, None, 0.1)]
    assert plan(vp.FlowCut(fraction=0.1), cls=True, crops=True) == [("vision", 0, None, 0.25), ("llm", 2, None, 0.1)]
    assert plan(vp.FlowCut(tokens=64, decoder_layer=1), patches_per_token=4)[1][:2] == ("llm", 1)
