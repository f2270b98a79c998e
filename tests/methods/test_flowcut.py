"""FlowCut: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import math

import pytest
import torch
from methods.comparing import close, pictures, random, select, sizes
from methods.loops import plain
from methods.loops.flowcut import (
    flowcut_clip,
    flowcut_counts,
    flowcut_entropy_ratio,
    flowcut_llm,
    flowcut_prune_count,
    flowcut_qwen_official_scores,
    flowcut_score,
    flowcut_smoothed,
    flowcut_terms,
    flowcut_unit_scores,
)
from methods.views import random_view
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
)

import vlmprune as vp
from vlmprune.kernels import flow_score as flow_kernel
from vlmprune.kernels.flow_score import entropy_ratio
from vlmprune.live.tower import TowerPass
from vlmprune.live.tower_sequence import Form
from vlmprune.methods.pruning import flowcut
from vlmprune.methods.tower import Block, TowerState
from vlmprune.schedule import Budget
from vlmprune.view import TowerFacts


def test_flowcut_terms_by_hand():
    # Two heads, three tokens, dim 1: head 0 looks at ln 2 and ln 1, head 1 at nothing
    keys = torch.tensor([[[math.log(2)], [0.0], [0.0]], [[5.0], [6.0], [7.0]]])
    values = torch.tensor([[[0.0], [math.log(4)], [0.0]], [[2.0], [-3.0], [-4.0]]])
    a, s, d = flowcut_terms(torch.tensor([[1.0], [0.0]]), keys, torch.tensor([[1.0], [0.0]]), values, 1.0, 0.5)
    assert a == pytest.approx([(1 / 2 + 1 / 3) / 2, (1 / 4 + 1 / 3) / 2, (1 / 4 + 1 / 3) / 2], rel=1e-6)
    assert s == pytest.approx([(1 / 4 + 1 / 3) / 2, (1 / 2 + 1 / 3) / 2, (1 / 4 + 1 / 3) / 2], rel=1e-6)
    assert d == pytest.approx([1.0, (3 - math.log(4)) / 2, 2.0], rel=1e-6)
    assert flowcut_score([1, 3], [1, 1], [10, 20]) == pytest.approx([7.5, 25.0])
    assert flowcut_smoothed(None, [1.0, 2.0]) == [1.0, 2.0]
    assert flowcut_smoothed([1.0, 2.0], [3.0, 0.0]) == [2.0, 1.0]


@pytest.mark.parametrize(
    ("target", "counts"),
    [
        (64, [554, 532, 510, 487, 464, 440, 415, 388, 357, 318, 64]),
        (128, [557, 538, 519, 499, 479, 458, 436, 412, 385, 350, 128]),
        (192, [560, 544, 527, 510, 493, 475, 456, 436, 413, 383, 192]),
    ],
)
def test_flowcut_counts_of_the_loops(target, counts):
    assert flowcut_counts(576, target) == counts


@pytest.mark.parametrize("remaining", [2, 8, 20])
def test_flowcut_extremes_of_the_loops(remaining):
    one_hot = [0.0] * 575 + [1.0]
    assert flowcut_entropy_ratio([1 / 576] * 576) == pytest.approx(1.0)
    assert flowcut_prune_count(576, 64, remaining, flowcut_entropy_ratio([1 / 576] * 576)) == 0
    assert flowcut_prune_count(576, 64, remaining, flowcut_entropy_ratio(one_hot)) == round(512 / math.sqrt(remaining))
    assert flowcut_prune_count(576, 64, 0, 1.0) == 512
    assert flowcut_prune_count(64, 64, remaining, 0.0) == 0


def test_flowcut_entropy_of_the_loops():
    assert flowcut_entropy_ratio([0.5, 0.5, 0.0, 0.0]) == pytest.approx(0.5)
    assert flowcut_entropy_ratio([0.0, 7.0]) == 0.0
    assert flowcut_entropy_ratio([3.0]) == 1.0
    assert flowcut_entropy_ratio([0.0, 0.0]) == 1.0


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        attn_implementation="eager",
    )
    model = CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)  # peaked attention: the blocks between drop something too
    return model


def test_flowcut_clip_without_pruning_is_the_stock_tower(tower):
    pixels = random(3, 32, 32).float()
    ids, features = flowcut_clip(tower, pixels, 16, 4)
    stock = tower(pixels[None], output_hidden_states=True).hidden_states[5][0, 1:]
    assert ids == list(range(16))
    torch.testing.assert_close(features.float(), stock, atol=2e-4, rtol=0)


@pytest.mark.parametrize("scale", ["code", "paper"])
@pytest.mark.parametrize(("feature_block", "keep", "lengths"), [(1, 5, [5]), (3, 4, [14, 4]), (4, 3, [13, 3])])
def test_flowcut_clip_against_the_stock_blocks(tower, scale, feature_block, keep, lengths):
    """The stock layers on the survivors, scored with the attention that they return themselves."""
    pixels = 4 * random(3, 32, 32, seed=1)
    ids, features = flowcut_clip(tower, pixels, keep, feature_block, scale)
    double = CLIPVisionModel(tower.config).double().eval()
    double.load_state_dict(tower.state_dict())
    with torch.no_grad():
        hidden = double.pre_layrnorm(double.embeddings(pixels[None]))
        raster, smooth, seen = torch.arange(16), None, []
        for index in range(feature_block + 1):
            layer, n = double.encoder.layers[index], hidden.shape[1]
            normed = layer.layer_norm1(hidden)
            _, attention = layer.self_attn(normed, None)
            values = layer.self_attn.v_proj(normed)[0].view(n, 4, 8).transpose(0, 1)
            semantic = values[:, :1] @ values.transpose(1, 2) / (math.sqrt(8) if scale == "paper" else 1)
            semantic = semantic.softmax(-1).mean(0)[0, 1:]
            relation = attention.mean(1)[0, 0, 1:]
            score = (relation / relation.sum() + semantic / semantic.sum()) * values.mean(0)[1:].abs().sum(1)
            smooth = score if smooth is None else (smooth + score) / 2
            hidden = layer(hidden, None)
            if index < feature_block and (feature_block - index) % 2 == 1:  # 1, 3, 5 ... blocks before the projector's
                p = relation / relation.sum()
                ratio = -(p * p.log()).sum() / math.log(n - 1)
                left = feature_block - index - 1
                drop = n - 1 - keep if left == 0 else int(((n - 1 - keep) / left**0.5 * (1 - ratio**2)).round())
                chosen = smooth.topk(n - 1 - drop).indices.sort().values
                raster, smooth = raster[chosen], smooth[chosen]
                hidden = hidden[:, torch.cat([torch.zeros(1, dtype=torch.long), chosen + 1])]
                seen.append(len(raster))
    assert seen == lengths
    assert ids == raster.tolist()
    torch.testing.assert_close(features, hidden[0, 1:], atol=2e-5, rtol=0)  # Transformers' eager softmax runs in float32


@pytest.mark.parametrize("feature_block", [2, 3, 4, 5])
def test_flowcut_clip_keeps_exactly_what_is_asked_for(tower, feature_block):
    ids, features = flowcut_clip(tower, random(3, 32, 32, seed=2), 3, feature_block)
    assert len(ids) == 3
    assert ids == sorted(set(ids))
    assert features.shape == (3, 32)


def test_flowcut_clip_refuses_what_cannot_be(tower):
    with pytest.raises(ValueError, match="no block"):
        flowcut_clip(tower, random(3, 32, 32), 3, 0)


def test_flowcut_llm_repeats_kv_heads():
    query, keys, value, values = random(4, 6), random(2, 9, 6, seed=1), random(2, 6, seed=2), random(2, 9, 6, seed=3)
    full = flowcut_llm(
        query, keys.repeat_interleave(2, 0), value.repeat_interleave(2, 0), values.repeat_interleave(2, 0), 0.4, 4
    )
    assert flowcut_llm(query, keys, value, values, 0.4, 4) == full
    # one head, dim 1, equal values: only the relation tells the tokens apart
    keys = torch.tensor([[[1.0], [4.0], [2.0], [3.0]]])
    assert flowcut_llm(torch.ones(1, 1), keys, torch.ones(1, 1), torch.ones(1, 4, 1), 1.0, 2) == [1, 3]


def test_flowcut_units():
    q, k, v = random(2, 8, 4), random(2, 8, 4, seed=1), random(2, 8, 4, seed=2)
    ones = torch.ones(2, 8, 4, dtype=torch.float64)
    assert flowcut_unit_scores([(q, ones, ones)], 0.5) == pytest.approx([1.0, 1.0])  # (1/8 + 1/8) * 4
    once = flowcut_unit_scores([(q, k, v)], 0.5, unit=1)
    assert flowcut_unit_scores([(q, k, v)] * 3, 0.5, unit=1) == pytest.approx(once)
    flat = flowcut_unit_scores([(q, ones, ones)], 0.5, unit=1)
    both = flowcut_unit_scores([(q, k, v), (q, ones, ones)], 0.5, unit=1)
    assert both == pytest.approx([(x + y) / 2 for x, y in zip(once, flat, strict=True)])
    assert flowcut_unit_scores([(q, k, v)], 0.5) == pytest.approx([sum(once[:4]) / 4, sum(once[4:]) / 4])
    assert flowcut_qwen_official_scores(q, ones, ones, 0.5) == pytest.approx([4 / 8] * 8)


@sizes
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_flowcut_in_the_decoder(heads, kv_heads, seed, visual, keep, text):
    see = random_view(seed, visual=visual, text=text, heads=heads, kv_heads=kv_heads)
    expected = [flowcut_llm(own.query_of_last, own.keys, own.value_of_last, own.values, 8**-0.5, keep) for own in pictures(see)]
    assert select(vp.FlowCut(layer=2, tokens=5), see, keep)[0] == expected


def test_flowcut_units_by_their_score():
    see = random_view(layer=0)
    assert select(vp.FlowCut(), see, 6)[0] == [plain.top(row, 6) for row in see.flow.tolist()]


def blocks(count: int, views: int, tokens: int, heads: int = 3, dim: int = 4, seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """(query, key, value) `[view, head, token, dim]` of some blocks."""
    draw = torch.Generator().manual_seed(seed)
    return [tuple(1.5 * torch.randn(views, heads, tokens, dim, generator=draw) for _ in range(3)) for _ in range(count)]


@pytest.mark.parametrize("scale", ["code", "paper"])
@pytest.mark.parametrize("patches", [9, 16])
def test_flowcut_watches_cls(scale, patches):
    """The score of every patch over three blocks, and the relation of the last: CLS is inside both softmaxes."""
    method = vp.FlowCut(semantic_scale=scale)
    state = TowerState(TowerFacts(cls=True), 4, torch.arange(patches).expand(2, -1), 4)
    smooth: list = [None, None]
    for index, (q, k, v) in enumerate(blocks(3, 2, 1 + patches)):
        method.watch(Block(index, 9, q, k, v, 0.5, True, None), state)
        for view in range(2):
            semantic_scale = 1.0 if scale == "code" else 0.5  # dim 4
            terms = flowcut_terms(q[view, :, 0], k[view], v[view, :, 0], v[view], 0.5, semantic_scale)
            a, s, d = (term[1:] for term in terms)
            smooth[view] = flowcut_smoothed(smooth[view], flowcut_score(a, s, d))
            close(state.carried["flow"][view], torch.tensor(smooth[view]))
            close(state.carried["relation"][view], torch.tensor(a))


def test_flowcut_watches_around_padding():
    """A view that kept fewer patches than another: its padding takes no part, and it scores as if it were alone."""
    ((q, k, v),) = blocks(1, 2, 10)
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, 1:4] = False  # CLS first, then three of padding, as they stand in a live call
    state = TowerState(TowerFacts(cls=True), 2, torch.arange(9).expand(2, -1), 3, valid[:, 1:])
    vp.FlowCut().watch(Block(0, 9, q, k, v, 0.5, True, valid), state)
    for view in range(2):
        real = valid[view]
        a, s, d = (
            term[1:] for term in flowcut_terms(q[view, :, 0], k[view][:, real], v[view, :, 0], v[view][:, real], 0.5, 1.0)
        )
        close(state.carried["flow"][view][real[1:]], torch.tensor(flowcut_score(a, s, d)))
        ratio = flow_kernel.entropy_ratio(state.carried["relation"], real[1:].sum()[None].expand(2))[view]
        assert ratio == pytest.approx(flowcut_entropy_ratio(a), abs=1e-6)
    assert not state.carried["relation"][1, :3].any()


@pytest.mark.parametrize("variant", ["unit", "official"])
def test_flowcut_watches_units(variant):
    """Towers without CLS: the mean token stands in for it. The official score lacks the semantic term and the sums."""
    method = vp.FlowCut(variant_on_units=variant)
    state = TowerState(TowerFacts(patches_per_token=4), 8, torch.arange(16)[None], 4)
    seen = blocks(3, 1, 16, seed=3)
    smooth = None
    for index, (q, k, v) in enumerate(seen):
        method.watch(Block(index, 9, q, k, v, 0.5, False, None), state)
        smooth = flowcut_smoothed(smooth, flowcut_qwen_official_scores(q[0], k[0], v[0], 0.5))
    flow = state.carried["flow"][0]
    if variant == "official":
        close(flow, torch.tensor(smooth))
    else:
        expected = flowcut_unit_scores([(q[0], k[0], v[0]) for q, k, v in seen], 0.5)
        close(flow.unflatten(0, (-1, 4)).mean(1), torch.tensor(expected))


@pytest.mark.parametrize("target", [1, 5, 20])
@pytest.mark.parametrize("padded", [False, True])
def test_flowcut_stages(target, padded):
    """Behind every second block, each view by its own entropy; behind the last, down to the target; ties to the lower index."""
    draw = torch.Generator().manual_seed(target)
    patches, views, last = 30, 4, 7
    flow = (torch.randn(views, patches, generator=draw).abs() * 4).round() / 4
    relation = (torch.randn(views, patches, generator=draw) * torch.tensor([[0.1], [1.0], [3.0], [9.0]])).softmax(-1)
    valid = None
    if padded:
        valid = torch.arange(patches) >= torch.tensor([0, 4, 8, 29 - target])[:, None]
        relation = relation * valid
        flow = flow * valid
    state = TowerState(TowerFacts(cls=True), target, torch.arange(patches).expand(views, -1), 6, valid)
    state.carried = {"flow": flow, "relation": relation}
    hidden = torch.randn(views, patches, 3, generator=draw)
    for index in range(last + 2):
        remaining = last - index - 1
        cut = vp.FlowCut().drop(index, last, hidden, state)
        if remaining < 0 or remaining % 2:
            assert cut is None
            continue
        stays, same = cut
        assert same is hidden
        for view in range(views):
            real = range(patches) if valid is None else valid[view].nonzero()[:, 0].tolist()
            ratio = flowcut_entropy_ratio([relation[view, j] for j in real])
            count = len(real) - flowcut_prune_count(len(real), target, remaining, ratio)
            expected = [real[i] for i in plain.top([flow[view, j] for j in real], count)]
            assert stays[view].nonzero()[:, 0].tolist() == expected


def test_flowcut_leaves_short_views_alone():
    state = TowerState(TowerFacts(cls=True), 9, torch.arange(9).expand(2, -1), 3)
    assert vp.FlowCut().drop(6, 7, torch.zeros(2, 9, 3), state) is None


CLIP = TowerFacts(cls=True)


@pytest.mark.parametrize(
    ("target", "counts"),
    [
        (64, [554, 532, 510, 487, 464, 440, 415, 388, 357, 318, 64]),
        (128, [557, 538, 519, 499, 479, 458, 436, 412, 385, 350, 128]),
        (192, [560, 544, 527, 510, 493, 475, 456, 436, 413, 383, 192]),
    ],
)
def test_flowcut_counts(monkeypatch, target, counts):
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
        form=Form(),
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
def test_flowcut_extremes(remaining):
    """Uniform attention drops nothing; all attention on one patch drops (N − T) / √R; with no block to come, all but T."""
    assert dropped(torch.full((576,), 1 / 576), 64, remaining) == 0
    assert dropped(torch.eye(576)[7], 64, remaining) == round(512 / math.sqrt(remaining))
    assert dropped(torch.full((576,), 1 / 576), 64, 0) == 512


def test_flowcut_entropy_of_a_zero():
    """A probability that underflowed has no entropy, where the official code gives NaN."""
    relation = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1e-45, 1.0, 0.0, 0.0]])
    ratio = entropy_ratio(relation, torch.tensor([4, 4, 4]))
    assert ratio.isfinite().all()
    assert ratio.tolist() == pytest.approx([0.5, 0.0, 0.0])
