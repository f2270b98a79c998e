"""Every method against a loop-by-loop transcription of its paper, and the contract every method keeps."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from tiny_models import IMAGE, build, make_inputs, shared

import vlmprune as vp
from vlmprune.schedule import Budget
from vlmprune.view import PROBES, View

TINY = {  # one cut that fits the tiny models, for every method
    "adaptinfer": "adaptinfer:layer=2,fraction=0.4",
    "cls": "cls:layer=0,fraction=0.4",
    "divprune": "divprune:layer=0,fraction=0.4",
    "fastv": "fastv:layer=2,fraction=0.4",
    "pdrop": "pdrop:layer=2,fraction=0.4",
    "random": "random:layer=0,fraction=0.4",
    "uniform": "uniform:layer=0,fraction=0.4",
}
LLAVA_ONLY = {"cls"}
CASES = [(name, family) for name in TINY for family in ("llava", "qwen2_5_vl") if family == "llava" or name not in LLAVA_ONLY]
RAGGED = [["text5", "image", "text4"], ["text2", "image", "text1", "image", "text3"], ["image", "text9"]]


def random_view(dtype=torch.float32, images=3, visual=20, heads=4, text=5) -> View:
    """A view with every probe, of random numbers."""
    torch.manual_seed(0)

    def attention(*shape):
        return torch.randn(*shape).softmax(-1).to(dtype)

    return View(
        layer=2,
        original=visual,
        position=torch.arange(visual).expand(images, visual),
        probes={
            "features": torch.randn(images, visual, 8).to(dtype),
            "attention_from_last": attention(images, heads, visual),
            "attention_of_layer": attention(images, heads, visual),
            "attention_from_text": attention(images, heads, text, visual),
            "attention_among_text": attention(images, heads, text, text).tril(),
            "attention_from_cls": attention(images, heads, visual),
            "identity": tuple(range(7, 7 + images)),
        },
    )


def test_every_method_is_tested():
    assert set(TINY) == set(vp.METHODS)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep", [1, 7, 19])
def test_contract(name, dtype, keep):
    """Rising, different, in range, exactly as many as asked for, the same again, and nothing undeclared is looked at."""
    method = vp.METHODS[name]()
    whole = random_view(dtype)
    assert method.needs <= set(PROBES)
    see = View(whole.layer, whole.original, whole.position, {need: whole.probes[need] for need in method.needs})
    chosen = method.select(see, keep)
    assert chosen.shape == (3, keep)
    assert chosen.dtype == torch.long
    assert (chosen.diff(dim=1) > 0).all()
    assert chosen.min() >= 0
    assert chosen.max() < whole.visual
    assert torch.equal(method.select(see, keep), chosen)


@pytest.mark.parametrize("name", TINY)
def test_pictures_do_not_meet(name):
    """What a picture keeps does not depend on the pictures decided with it."""
    method, see = vp.METHODS[name](), random_view()
    together = method.select(see, 6)
    for image in range(see.images):
        alone = {k: v[image : image + 1] for k, v in see.probes.items()}
        assert torch.equal(method.select(View(2, 20, see.position[image : image + 1], alone), 6)[0], together[image])


@pytest.mark.parametrize(("name", "family"), CASES)
def test_half_precision(name, family):
    """A bfloat16 model runs and keeps exact counts."""
    model = build(family).to(torch.bfloat16)  # of its own: rounding a shared model would change it for other tests
    inputs = make_inputs(family, model, RAGGED)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with vp.wrap(model, TINY[name]) as run, torch.no_grad():
        model(**inputs)
    for kept in run.last.kept:
        assert len(kept.index) == Budget(fraction=0.4).resolve(kept.original)


def top(scores: list[float], keep: int) -> list[int]:
    """The best, ties to the lower index, in rising order."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:keep])


def test_mean_over_heads_by_loops():
    """FastV, CLS and PyramidDrop: the mean over heads of one row of attention."""
    see = random_view()
    for name, probe in (("fastv", "attention_from_last"), ("cls", "attention_from_cls"), ("pdrop", "attention_of_layer")):
        rows = see.probes[probe].tolist()
        expected = [top([sum(head[j] for head in heads) / len(heads) for j in range(20)], 7) for heads in rows]
        assert vp.METHODS[name]().select(see, 7).tolist() == expected


def test_adaptinfer_by_loops():
    see = random_view()
    among, to_visual = see.attention_among_text.tolist(), see.attention_from_text.tolist()
    expected = []
    for m, a in zip(among, to_visual, strict=True):
        scores = [0.0] * 20
        for h in range(4):
            for t in range(5):
                weight = sum(m[h][u][t] + m[h][t][u] - (m[h][t][t] if u == t else 0.0) for u in range(5))
                for j in range(20):
                    scores[j] += weight * a[h][t][j]
        expected.append(top(scores, 7))
    assert vp.AdaptInfer().select(see, 7).tolist() == expected


def test_adaptinfer_golden_scores():
    """shared/papers/pruning.md, G3: one head, rows of system, two visual and two text tokens."""
    rows = [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0.2, 0.3, 0.5, 0, 0], [0.1, 0.4, 0.1, 0.4, 0], [0.1, 0.1, 0.3, 0.2, 0.3]]
    attention = torch.tensor(rows)[None, None]
    probes = {"attention_from_text": attention[..., 3:, 1:3], "attention_among_text": attention[..., 3:, 3:]}
    scores = vp.AdaptInfer().score(View(2, 2, torch.tensor([[0, 1]]), probes))
    assert torch.allclose(scores, torch.tensor([[0.29, 0.21]]))


def test_published_presets():
    """shared/papers/pruning.md, 1.3 and 4.3: nominal averages of AdaptInfer's schedules on 32 layers of 576 tokens."""
    for budget, nominal, compute in ((128, 128.8, 146.3), (64, 65.0, 82.9), (48, 48.8, 66.7), (32, 33.0, 51.0)):
        cuts = {stage.layer: stage.budget.tokens for stage in vp.AdaptInfer(preset=f"llava-{budget}").cuts}
        entering = [576]
        for layer in range(1, 33):
            entering.append(cuts.get(layer, entering[-1]))
        assert sum(entering[1:33]) / 32 == pytest.approx(nominal, abs=0.06)
        assert sum(entering[:32]) / 32 == pytest.approx(compute, abs=0.06)
    with pytest.raises(vp.UsageError, match="unknown preset of adaptinfer 'llava-65': did you mean 'llava-64'"):
        vp.AdaptInfer(preset="llava-65")


@pytest.mark.parametrize(("visual", "keep"), [(9, 3), (10, 4), (576, 64), (7, 6), (5, 1)])
def test_uniform_by_its_formula(visual, keep):
    see = View(0, visual, torch.arange(visual)[None], {})
    chosen = vp.Uniform().select(see, keep)[0].tolist()
    assert chosen == [math.floor((i + 0.5) * visual / keep) for i in range(keep)]


def eager_attention(model, inputs, layer):
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions[layer]  # [batch, head, query, key]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_text_attention_is_the_models_own(family, attn):
    """AdaptInfer's kept set from the full eager maps of the layer before the cut, sample by sample."""
    eager, model = shared(family, "eager"), shared(family, attn)
    for row, parts in enumerate(RAGGED):
        inputs = make_inputs(family, model, [parts], first=row)
        maps = eager_attention(eager, inputs, 1)[0]
        visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
        text = torch.arange(int(visual[-1]) + 1, maps.shape[-1])
        with vp.wrap(model, "adaptinfer:layer=2,tokens=5") as run, torch.no_grad():
            model(**inputs)
        start = 0
        for kept in run.last.kept:
            mine = visual[start : start + kept.original]
            start += kept.original
            probes = {
                "attention_from_text": maps[None][:, :, text][..., mine],
                "attention_among_text": maps[None][:, :, text][..., text],
            }
            scores = vp.AdaptInfer().score(View(2, kept.original, torch.arange(kept.original)[None], probes))[0]
            assert kept.index.tolist() == top(scores.tolist(), 5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("layer", [0, 3])
def test_attention_of_layer_is_what_the_layer_computes(family, layer):
    """PyramidDrop's look ahead equals the eager attention of the layer of the cut, had nothing been cut."""
    eager, model = shared(family, "eager"), shared(family)
    inputs = make_inputs(family, model, RAGGED)
    maps = eager_attention(eager, inputs, layer)[:, :, -1].mean(dim=1)  # [batch, key]
    with vp.wrap(model, f"pdrop:layer={layer},tokens=5") as run, torch.no_grad():
        model(**inputs)
    for row in range(len(RAGGED)):
        visual = (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0]
        start = 0
        for kept in (kept for kept in run.last.kept if kept.sample == row):
            scores = maps[row, visual[start : start + kept.original]]
            start += kept.original
            assert kept.index.tolist() == top(scores.tolist(), 5)


@pytest.mark.parametrize("before", [None, "random:layer=3,fraction=0.6"], ids=["un-pruned", "pruned"])
def test_attention_of_layer_counts_an_earlier_turn(before):
    """With a cache, the look ahead shares its attention with what earlier turns left: the same as the layer then computes."""
    model = shared("llava", "eager")
    first, second = (make_inputs("llava", model, [parts]) for parts in (["text3", "image", "text4"], ["image", "text2"]))
    with torch.no_grad(), vp.wrap(model, before) if before else contextlib.nullcontext():
        cache = model(**first, use_cache=True).past_key_values
    second["attention_mask"] = torch.ones(1, cache.get_seq_length() + second["input_ids"].shape[1], dtype=torch.long)
    seen = {}

    class Peek(vp.PDrop):
        def select(self, see, keep):
            seen["ahead"] = see.attention_of_layer
            return super().select(see, see.visual - 1)

    with torch.no_grad(), vp.wrap(model, Peek(layer=3, tokens=15)):
        hidden = []
        attention = model.model.language_model.layers[3].self_attn
        handle = attention.register_forward_hook(lambda module, args, output: hidden.append(output[1]))
        try:
            model(**second, past_key_values=cache)
        finally:
            handle.remove()
    ran = hidden[0][0, :, -1, -(second["input_ids"].shape[1] - 1) :]  # [head, key] with one visual token less
    whole = seen["ahead"][0]
    kept = [j for j in range(16) if j not in {min(range(16), key=lambda j: whole.mean(0)[j])}]
    ratio = whole[:, kept].sum(-1) / ran[:, : len(kept)].sum(-1)  # one token less renormalises, head by head
    assert torch.allclose(whole[:, kept] / ratio[:, None], ran[:, : len(kept)], atol=1e-5)
    assert whole.sum() < 0.99 * whole.shape[0], "the earlier turn must take a share"


def test_text_needs_a_question_after_the_picture():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text4", "image"]])
    with (
        vp.wrap(model, "adaptinfer:layer=2,tokens=5"),
        torch.no_grad(),
        pytest.raises(vp.UsageError, match="put the question behind"),
    ):
        model(**inputs)
