"""Golden values: section 11 of the papers file, and what the papers' own schedules come to."""

from __future__ import annotations

import inspect
import math

import loops
import pytest
import torch
from methods.views import random_view
from tiny_models import make_inputs, shared
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

import vlmprune as vp
from vlmprune.cli import method_rows
from vlmprune.cost import DecoderShape
from vlmprune.kernels.flow_score import entropy_ratio
from vlmprune.kernels.select_diverse import greedy_order
from vlmprune.live.record import Clock, Kept, Prefill
from vlmprune.live.report import Report
from vlmprune.live.tower import TowerPass
from vlmprune.methods.pruning import flowcut
from vlmprune.methods.tower import TowerState
from vlmprune.schedule import Budget
from vlmprune.view import TowerFacts, View

CLIP = TowerFacts(cls=True)


# --- G1, G2: DivPrune -------------------------------------------------------------------------------------------------
def test_g1_divprune_on_the_unit_circle():
    angles = torch.tensor([0.0, 10, 25, 90, 104, 180, 263, 300]).deg2rad()
    points = torch.stack((angles.cos(), angles.sin()), dim=-1)[None]
    assert greedy_order(points, 5).tolist() == [[5, 0, 3, 6, 7]]
    see = View(0, 8, torch.arange(8)[None], {"features": points})
    assert vp.DivPrune().select(see, 5).tolist() == [[0, 3, 5, 6, 7]]


def test_g2_divprune_takes_no_token_twice():
    """20 vectors, each twice, 30 to keep: 30 different ones, where the official code gives 20."""
    vectors = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1)[None]
    see = View(0, 40, torch.arange(40)[None], {"features": vectors})
    chosen = vp.DivPrune().select(see, 30)[0].tolist()
    assert len(set(chosen)) == 30
    assert {index % 20 for index in chosen} == set(range(20))


# --- G3: AdaptInfer ---------------------------------------------------------------------------------------------------
G3 = [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0.2, 0.3, 0.5, 0, 0], [0.1, 0.4, 0.1, 0.4, 0], [0.1, 0.1, 0.3, 0.2, 0.3]]


def test_g3_adaptinfer_scores():
    """One head, rows of system, two visual and two text tokens: w = [.6, .5], s = [.29, .21]."""
    attention = torch.tensor(G3)[None, None]
    among = attention[..., 3:, 3:]
    see = View(2, 2, torch.tensor([[0, 1]]), {"attention_from_text": attention[..., 3:, 1:3], "attention_among_text": among})
    assert torch.allclose(vp.AdaptInfer().score(see), torch.tensor([[0.29, 0.21]]))
    see.probes["attention_from_text"] = torch.eye(2)[None, None]  # each visual token seen by one word only: its weight
    assert torch.allclose(vp.AdaptInfer().score(see), torch.tensor([[0.6, 0.5]]))


# --- G4, G5, G6: FlowCut ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("target", "counts"),
    [
        (64, [554, 532, 510, 487, 464, 440, 415, 388, 357, 318, 64]),
        (128, [557, 538, 519, 499, 479, 458, 436, 412, 385, 350, 128]),
        (192, [560, 544, 527, 510, 493, 475, 456, 436, 413, 383, 192]),
    ],
)
def test_g4_flowcut_counts(monkeypatch, target, counts):
    """LLaVA-1.5's tower, 24 blocks and 576 patches, as the library walks through it, with r_H = 0.9 throughout."""
    monkeypatch.setattr(flowcut, "entropy_ratio", lambda relation, present: torch.full(present.shape, 0.9))
    tower = TowerPass(
        plan=None,
        facts=CLIP,
        last=22,
        wanted=frozenset(),
        pruner=vp.FlowCut(tokens=target),
        budget=Budget(tokens=target),
        drops=True,
    )
    tower.begin([576], crops=2, device=torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    hidden, left = torch.randn(2, 577, 2, generator=draw), []
    for index in range(23):
        before = hidden.shape[1]
        if index < 22:
            tower.watch(index, *(torch.randn(2, 2, before, 4, generator=draw) for _ in range(3)), 0.5)
        hidden = tower.shorten_crops(index + 1, hidden)
        if hidden.shape[1] != before:
            assert index % 2 == 1
            left.append(hidden.shape[1] - 1)
    assert left == counts
    assert tower.states[0].cells.shape == (2, target)


def dropped(relation: torch.Tensor, target: int, remaining: int) -> int:
    """Patches that the library drops of one view with `remaining` blocks to come."""
    patches = len(relation)
    state = TowerState(CLIP, target, torch.arange(patches)[None], 24)
    state.carried = {"flow": torch.rand(1, patches), "relation": relation[None]}
    stays, _ = vp.FlowCut().drop(22 - remaining - 1, 22, torch.zeros(1, patches, 2), state)
    return patches - int(stays.sum())


@pytest.mark.parametrize("remaining", [2, 8, 20])
def test_g5_flowcut_extremes(remaining):
    """Uniform attention drops nothing; all attention on one patch drops (N − T) / √R; with no block to come, all but T."""
    assert dropped(torch.full((576,), 1 / 576), 64, remaining) == 0
    assert dropped(torch.eye(576)[7], 64, remaining) == round(512 / math.sqrt(remaining))
    assert dropped(torch.full((576,), 1 / 576), 64, 0) == 512


def test_g6_flowcut_entropy_of_a_zero():
    """A probability that underflowed has no entropy, where the official code gives NaN."""
    relation = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1e-45, 1.0, 0.0, 0.0]])
    ratio = entropy_ratio(relation, torch.tensor([4, 4, 4]))
    assert ratio.isfinite().all()
    assert ratio.tolist() == pytest.approx([0.5, 0.0, 0.0])


# --- G7: DART ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (64, loops.dart_official_count(64)),
        (128, loops.dart_official_count(128)),
        (192, loops.dart_official_count(192)),
        (128, loops.dart_lightcompress_count(576, 0.778)),
    ],
    ids=["official-64", "official-128", "official-192", "lightcompress-128"],
)
def test_g7_dart_keeps_what_it_says(asked, kept):
    """The official code keeps 4 + 8·⌊K / 8⌋, so 68, 132 and 196 for 64, 128 and 192; LightCompress's port keeps, for 128,
    4 + 8·⌊576 · 0.222 / 8⌋ = 124. Here it is exactly K; where K is what they keep, all agree, and every pivot adds as many."""
    assert (asked, kept) in [(64, 68), (128, 132), (192, 196), (128, 124)]
    assert vp.DART().stages[0].budget.resolve(576) == 128
    see = random_view(images=1, visual=576, text=(9,))
    assert vp.DART().select(see, asked).shape == (1, asked)
    own = {name: see.probes[name][0] for name in vp.DART.needs}
    same = loops.dart(own["keys"], own["text_keys"], own["normed_features"], own["normed_text_features"], kept)
    assert vp.DART().select(see, kept).tolist() == [same]


def test_g7_the_docstring_says_it():
    """The counts of the two codes stand in the docstring as they are."""
    text = " ".join(inspect.getmodule(vp.DART).__doc__.split())
    official = ", ".join(f"{loops.dart_official_count(keep)} for {keep}" for keep in (64, 128, 192))
    assert f"4 + 8·⌊K / 8⌋: {official}" in text
    assert f"{loops.dart_lightcompress_count(576, 0.778)} of 576 at 0.222" in text


# --- G17: averages over layers ----------------------------------------------------------------------------------------
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
def test_g17_averages(recipe, nominal, compute):
    """Both ways of counting, nominal (what leaves a layer) and compute (what enters it), as sections 1.3 and 5.4 have them."""
    report = reported(recipe)
    assert report.visual_compute_average == pytest.approx(compute, abs=0.051)
    if nominal is not None:
        assert report.visual_nominal_average == pytest.approx(nominal, abs=0.051)
    assert f"{report.visual_compute_average:.1f} entering on average" in str(report)


@pytest.mark.parametrize(("preset", "nominal", "compute"), [(10, 10.1, 13.6), (30, 29.7, 32.9), (50, 51.1, 54.0)])
def test_g17_adaptinfer_on_qwen2_vl(preset, nominal, compute):
    """28 layers, shares in per cent of 1000 tokens (section 4.3)."""
    report = reported(vp.AdaptInfer(preset=f"qwen2-vl-{preset}"), QWEN2_2B, 1000)
    assert report.visual_nominal_average / 10 == pytest.approx(nominal, abs=0.06)
    assert report.visual_compute_average / 10 == pytest.approx(compute, abs=0.06)


def test_g17_in_a_real_run():
    """The same two numbers from a wrapped model: six layers of 16 tokens, 8 from layer 2 on, 3 from layer 4 on."""
    model = shared("llava")
    with vp.wrap(model, "uniform:layer=2|4,tokens=8|3") as run, torch.no_grad():
        model(**make_inputs("llava", model, [["text2", "image", "text3"], ["image", "text7"]]))
    report = run.report()
    assert report.visual_compute_average == pytest.approx((2 * 16 + 2 * 8 + 2 * 3) / 6)
    assert report.visual_nominal_average == pytest.approx((16 + 2 * 8 + 3 * 3) / 6)


def test_recycled_clusters_are_counted():
    """SparseVLM's presets are its published counts plus the clusters that the dropped ones become."""
    for budget, published in ((192, (300, 200, 110)), (128, (303, 110, 36)), (96, (238, 48, 26)), (64, (66, 30, 17))):
        count = 576
        for stage, plain in zip(vp.SparseVLM(preset=f"v1.5-{budget}").stages, published, strict=True):
            count = plain + loops.sparsevlm_recycle_count(count, plain)
            assert stage.budget.tokens == count


def test_presets_stand_before_the_layer_after_theirs():
    """The papers cut behind layers 1, 10, 20 and 2, 6, 15 and 2, 6, 10, 14: before the next ones here."""
    assert [stage.layer for stage in vp.AdaptInfer(preset="llava-64").stages] == [2, 11, 21]
    assert [stage.layer for stage in vp.AdaptInfer(preset="qwen2-vl-10").stages] == [1, 10, 20]
    assert [stage.layer for stage in vp.SparseVLM(preset="v2-64").stages] == [3, 7, 16]
    assert [stage.layer for stage in vp.MustDrop().stages] == [3, 7, 11, 15]
    assert [stage.layer for stage in vp.PDrop().stages] == [8, 16, 24]


def test_positions_in_the_papers_codes():
    """Section 1.5, which tells versions and model families apart, as the README's column has it."""
    compact, both = "compact", "compact (LLaVA), original (Qwen)"
    assert {row["method"]: row["positions"] for row in method_rows()} == {
        "adaptinfer": both,
        "cdpruner": compact,
        "cls": compact,
        "dart": "original",
        "divprune": compact,
        "fastv": "original",
        "flowcut": both,
        "holov": both,
        "mustdrop": compact,
        "pdrop": compact,
        "random": compact,
        "sparsevlm": "compact (1.5), original (2)",
        "tome": "original",
        "uniform": "original",
        "visionzip": compact,
        "vscan": both,
    }


def test_other_presets_are_refused():
    with pytest.raises(vp.UsageError, match="unknown preset of adaptinfer 'llava-65': did you mean 'llava-64'"):
        vp.AdaptInfer(preset="llava-65")


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


@pytest.mark.parametrize(
    ("preset", "g", "u"),
    [("textvqa-192", 0.001, 0.001), ("textvqa-128", 0.0012, 0.001), ("textvqa-64", 0.011, 0.01), ("vizwiz-64", 0.005, 0.001)],
)
def test_mustdrop_presets(preset, g, u):
    """Section 7.2: the published pairs of thresholds, at four cuts that set no count."""
    method = vp.MustDrop(preset=preset)
    assert (method.global_threshold, method.individual_threshold) == (g, u)
    assert [(stage.layer, stage.budget.fraction) for stage in method.stages] == [(3, 1.0), (7, 1.0), (11, 1.0), (15, 1.0)]
    assert method.adaptive


# --- G18: MustDrop ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_g18_default_thresholds_drop_nothing(seed):
    see = random_view(seed, visual=50)
    chosen = vp.MustDrop(global_threshold=1.0, individual_threshold=0.0).select(see, 50)
    assert [row.tolist() for row in chosen.index] == [list(range(50))] * 3


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_g18_in_a_model(family):
    """Nothing merged, nothing filtered, nothing forgotten: bit for bit the stock model."""
    model = shared(family)
    inputs = make_inputs(family, model, [["text2", "image", "text5"], ["image", "text1"]])
    recipe = "mustdrop:layer=3,fraction=1.0,global_threshold=1.0,individual_threshold=0.0,merge=2,cache_layer=-1"
    with torch.no_grad():
        stock = model(**inputs).logits
        with vp.wrap(model, recipe) as run:
            assert torch.equal(model(**inputs).logits, stock)
    assert all(len(kept.index) == kept.original for kept in run.last.kept)
    assert {kept.method for kept in run.last.kept} == {"mustdrop (thresholds)"}


# --- CDPruner on LLaVA-NeXT: five views of 576 patches, 64 of each ---------------------------------------------------
@torch.no_grad()
def test_cdpruner_at_the_size_of_the_paper():
    """A square picture of 2 × 2 crops without padding, K = 320, so 64 of each view as the official code keeps: the same
    tokens as the determinants of every view's kernel give, its relevance scaled over all five. Scaled within each view, a
    third of them are others."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=336, patch_size=14
    )
    text = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    config = LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=5, image_grid_pinpoints=[[672, 672]])
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).eval().double()  # in float32 rounding decides a pick now and then
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.15, generator=draw)
    brightness = torch.tensor([0.0, 1.5, -1.5, 3.0, -3.0])[:, None, None, None] * torch.randn(5, 3, 1, 1, generator=draw)
    pixels = torch.randn(5, 3, 336, 336, generator=draw) + brightness
    ids = torch.tensor([[1, 7, *[5] * (5 * 576 + 48), 11, 12, 13]])
    projection, question, seen = torch.randn(64, 12, generator=draw), torch.randn(12, generator=draw), {}

    def relevance(patches, *_):
        return -torch.cosine_similarity(patches.double() @ projection.double(), question.double(), dim=-1)

    handle = model.model.multi_modal_projector.register_forward_hook(lambda _, args, out: seen.update(x=args[0], features=out))
    try:
        with vp.wrap(model, vp.CDPruner(tokens=320, relevance=relevance)) as run:
            model(input_ids=ids, pixel_values=pixels[None].double(), image_sizes=torch.tensor([[672, 672]]))
    finally:
        handle.remove()

    def expected(raw: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> list[set[int]]:
        unit = torch.nn.functional.normalize(seen["features"].double(), dim=-1)
        weight = (raw - low + 1e-6) / (high - low)
        sets = []
        for kernel in weight[:, :, None] * (unit @ unit.mT) * weight[:, None]:
            left, rows, chosen = kernel.diagonal().clone(), [], []
            for _ in range(64):
                j = int(left.argmax())
                row = (kernel[j] - sum((r[j] * r for r in rows), torch.zeros(576).double())) / left[j].sqrt()
                rows.append(row)
                left = left - row**2
                left[j] = -torch.inf
                chosen.append(j)
            sets.append(set(chosen))
        return sets

    ours: list[set[int]] = [set() for _ in range(5)]
    for j in run.last.kept[0].index.tolist():  # the base view, then the crops' rows of 48
        y, x = divmod(j - 576, 48)
        view, cell = (0, j) if j < 576 else (1 + y // 24 * 2 + x // 24, y % 24 * 24 + x % 24)
        ours[view].add(cell)
    raw = relevance(seen["x"])
    assert ours == expected(raw, raw.min(), raw.max())
    apart = expected(raw, raw.amin(1, keepdim=True), raw.amax(1, keepdim=True))
    assert sum(len(a & b) for a, b in zip(ours, apart, strict=True)) < 0.8 * 320
