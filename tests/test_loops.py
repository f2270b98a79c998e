"""The oracles of loops.py against hand-made examples and the golden values of the papers."""

from __future__ import annotations

import math

import loops
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel


def unit_vectors(*degrees: float) -> torch.Tensor:
    radians = [math.radians(angle) for angle in degrees]
    return torch.tensor([[math.cos(r), math.sin(r)] for r in radians], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ties_go_to_the_lower_index():
    assert loops.ranking([1.0, 3.0, 3.0, 2.0]) == [1, 2, 3, 0]
    assert loops.top([1.0, 3.0, 2.0, 3.0, 3.0], 2) == [1, 3]


def test_lists_keep_their_precision():
    assert loops.floats([[0.1], [0.2]]) == [[0.1], [0.2]]


# --- FlowCut ----------------------------------------------------------------------------------------------------------
def test_flowcut_terms_by_hand():
    # Two heads, three tokens, dim 1: head 0 looks at ln 2 and ln 1, head 1 at nothing
    keys = torch.tensor([[[math.log(2)], [0.0], [0.0]], [[5.0], [6.0], [7.0]]])
    values = torch.tensor([[[0.0], [math.log(4)], [0.0]], [[2.0], [-3.0], [-4.0]]])
    a, s, d = loops.flowcut_terms(torch.tensor([[1.0], [0.0]]), keys, torch.tensor([[1.0], [0.0]]), values, 1.0, 0.5)
    assert a == pytest.approx([(1 / 2 + 1 / 3) / 2, (1 / 4 + 1 / 3) / 2, (1 / 4 + 1 / 3) / 2], rel=1e-6)
    assert s == pytest.approx([(1 / 4 + 1 / 3) / 2, (1 / 2 + 1 / 3) / 2, (1 / 4 + 1 / 3) / 2], rel=1e-6)
    assert d == pytest.approx([1.0, (3 - math.log(4)) / 2, 2.0], rel=1e-6)
    assert loops.flowcut_score([1, 3], [1, 1], [10, 20]) == pytest.approx([7.5, 25.0])
    assert loops.flowcut_smoothed(None, [1.0, 2.0]) == [1.0, 2.0]
    assert loops.flowcut_smoothed([1.0, 2.0], [3.0, 0.0]) == [2.0, 1.0]


@pytest.mark.parametrize(
    ("target", "counts"),
    [
        (64, [554, 532, 510, 487, 464, 440, 415, 388, 357, 318, 64]),
        (128, [557, 538, 519, 499, 479, 458, 436, 412, 385, 350, 128]),
        (192, [560, 544, 527, 510, 493, 475, 456, 436, 413, 383, 192]),
    ],
)
def test_golden_g4(target, counts):
    assert loops.flowcut_counts(576, target) == counts


@pytest.mark.parametrize("remaining", [2, 8, 20])
def test_golden_g5(remaining):
    one_hot = [0.0] * 575 + [1.0]
    assert loops.entropy_ratio([1 / 576] * 576) == pytest.approx(1.0)
    assert loops.flowcut_prune_count(576, 64, remaining, loops.entropy_ratio([1 / 576] * 576)) == 0
    assert loops.flowcut_prune_count(576, 64, remaining, loops.entropy_ratio(one_hot)) == round(512 / math.sqrt(remaining))
    assert loops.flowcut_prune_count(576, 64, 0, 1.0) == 512
    assert loops.flowcut_prune_count(64, 64, remaining, 0.0) == 0


def test_golden_g6():
    assert loops.entropy_ratio([0.5, 0.5, 0.0, 0.0]) == pytest.approx(0.5)
    assert loops.entropy_ratio([0.0, 7.0]) == 0.0
    assert loops.entropy_ratio([3.0]) == 1.0
    assert loops.entropy_ratio([0.0, 0.0]) == 1.0


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
    ids, features = loops.flowcut_clip(tower, pixels, 16, 4)
    stock = tower(pixels[None], output_hidden_states=True).hidden_states[5][0, 1:]
    assert ids == list(range(16))
    torch.testing.assert_close(features.float(), stock, atol=2e-4, rtol=0)


@pytest.mark.parametrize("scale", ["code", "paper"])
@pytest.mark.parametrize(("feature_block", "keep", "lengths"), [(1, 5, [5]), (3, 4, [14, 4]), (4, 3, [13, 3])])
def test_flowcut_clip_against_the_stock_blocks(tower, scale, feature_block, keep, lengths):
    """The stock layers on the survivors, scored with the attention that they return themselves."""
    pixels = 4 * random(3, 32, 32, seed=1)
    ids, features = loops.flowcut_clip(tower, pixels, keep, feature_block, scale)
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
    ids, features = loops.flowcut_clip(tower, random(3, 32, 32, seed=2), 3, feature_block)
    assert len(ids) == 3
    assert ids == sorted(set(ids))
    assert features.shape == (3, 32)


def test_flowcut_clip_refuses_what_cannot_be(tower):
    with pytest.raises(ValueError, match="no block"):
        loops.flowcut_clip(tower, random(3, 32, 32), 3, 0)


def test_flowcut_llm_repeats_kv_heads():
    query, keys, value, values = random(4, 6), random(2, 9, 6, seed=1), random(2, 6, seed=2), random(2, 9, 6, seed=3)
    full = loops.flowcut_llm(
        query, keys.repeat_interleave(2, 0), value.repeat_interleave(2, 0), values.repeat_interleave(2, 0), 0.4, 4
    )
    assert loops.flowcut_llm(query, keys, value, values, 0.4, 4) == full
    # one head, dim 1, equal values: only the relation tells the tokens apart
    keys = torch.tensor([[[1.0], [4.0], [2.0], [3.0]]])
    assert loops.flowcut_llm(torch.ones(1, 1), keys, torch.ones(1, 1), torch.ones(1, 4, 1), 1.0, 2) == [1, 3]


def test_flowcut_units():
    q, k, v = random(2, 8, 4), random(2, 8, 4, seed=1), random(2, 8, 4, seed=2)
    ones = torch.ones(2, 8, 4, dtype=torch.float64)
    assert loops.flowcut_unit_scores([(q, ones, ones)], 0.5) == pytest.approx([1.0, 1.0])  # (1/8 + 1/8) * 4
    once = loops.flowcut_unit_scores([(q, k, v)], 0.5, unit=1)
    assert loops.flowcut_unit_scores([(q, k, v)] * 3, 0.5, unit=1) == pytest.approx(once)
    flat = loops.flowcut_unit_scores([(q, ones, ones)], 0.5, unit=1)
    both = loops.flowcut_unit_scores([(q, k, v), (q, ones, ones)], 0.5, unit=1)
    assert both == pytest.approx([(x + y) / 2 for x, y in zip(once, flat, strict=True)])
    assert loops.flowcut_unit_scores([(q, k, v)], 0.5) == pytest.approx([sum(once[:4]) / 4, sum(once[4:]) / 4])
    assert loops.flowcut_qwen_official_scores(q, ones, ones, 0.5) == pytest.approx([4 / 8] * 8)


# --- MustDrop ---------------------------------------------------------------------------------------------------------
def test_mustdrop_merges_alike_windows_only():
    assert loops.mustdrop_windows(3, 6)[1] == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    hidden = random(36, 5)
    windows = loops.mustdrop_windows(6, 6)
    for factor, patch in enumerate(windows[2], 1):
        hidden[patch] = factor * torch.tensor([1.0, 2.0, 0.0, 0.0, 1.0])  # one direction: cosine 1
    merged, tokens = loops.mustdrop_merge(hidden, 6, 6, 0.8)
    assert merged == [2]
    assert tokens[2] == pytest.approx([5.0, 10.0, 0.0, 0.0, 5.0])
    assert loops.mustdrop_merge(hidden, 6, 6, 1.1) == ([], {})
    assert loops.mustdrop_merge(hidden, 6, 6, -1.0)[0] == [0, 1, 2, 3]
    assert loops.mustdrop_merge_count(hidden, 6, 6, 1)[0] == [2]
    merged, tokens = loops.mustdrop_merge_count(hidden, 6, 6, 3)
    assert len(merged) == 3
    assert merged == sorted(merged) == sorted(tokens)
    with pytest.raises(ValueError, match="does not divide"):
        loops.mustdrop_merge(hidden, 4, 9)


def test_mustdrop_window_score_leaves_the_diagonal_out():
    hidden = torch.eye(9, dtype=torch.float64)
    assert loops.mustdrop_window_scores(hidden, 3, 3) == [0.0]
    hidden[8] = hidden[7]  # one alike pair of 36, counted twice in 72
    assert loops.mustdrop_window_scores(hidden, 3, 3) == pytest.approx([1 / 36])


def test_mustdrop_key_set():
    assert len(loops.mustdrop_key_set(random(576))) == 47
    assert loops.mustdrop_key_set([0.0] * 13) == [0, 1]
    assert loops.mustdrop_key_set([0.1, 0.9, 0.3]) == [1]


def test_mustdrop_filter_and_golden_g18():
    attention = [[0.1, 0.02, 0.03, 0.2], [0.1, 0.02, 0.3, 0.01]]  # column sums .2 .04 .33 .21, all .78
    assert loops.mustdrop_filter(attention, [], 1.0, 0.0) == [0, 1, 2, 3]  # G18
    assert loops.mustdrop_filter(random(5, 9).softmax(1), [], 1.0, 0.0) == list(range(9))
    assert loops.mustdrop_filter(attention, [], 0.27, 0.15) == [2, 3]  # both conditions: 3 is under g, but not under u
    assert loops.mustdrop_filter(attention, [], 0.25, 0.15) == [0, 2, 3]  # 0 reaches g
    assert loops.mustdrop_filter(attention, [1], 0.27, 0.15) == [1, 2, 3]


def test_mustdrop_top_forces_the_key_set_in():
    attention = [[0.1, 0.02, 0.03, 0.2], [0.1, 0.02, 0.3, 0.01]]
    assert loops.mustdrop_top(attention, [], 2) == [2, 3]
    assert loops.mustdrop_top(attention, [1], 2) == [1, 2]
    assert loops.mustdrop_top(attention, [0, 1, 3], 2) == [0, 3]


# --- VisionZip --------------------------------------------------------------------------------------------------------
def test_visionzip_by_hand():
    attention = torch.tensor([[0.0, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.6]])
    keys = unit_vectors(0, 0, 0, 80, 90, 10, 0).expand(2, 7, 2)
    features = torch.arange(7, dtype=torch.float64)[:, None]
    dominant, targets, tokens = loops.visionzip(attention, keys, features, 4, 2)
    assert dominant == [1, 6]
    assert targets == [0, 3]  # the rest is 0 2 3 4 5, stride 2
    assert tokens.tolist() == [[0 + (2 + 5) / 2], [3 + 4.0]]
    assert loops.visionzip(attention, keys, features, 2, 0)[1] == []
    dominant, targets, tokens = loops.visionzip(attention, keys, features, 7, 5)  # nobody left to join
    assert targets == [0, 2, 3, 4, 5]
    assert tokens.tolist() == [[0.0], [2.0], [3.0], [4.0], [5.0]]


# --- SparseVLM --------------------------------------------------------------------------------------------------------
def nominal_and_compute(start: int, after: list[int]) -> tuple[float, float]:
    """Means over the 32 layers of LLaVA of the counts leaving and entering each, pruned after layers 2, 6 and 15."""
    leaving = [start] * 2 + [after[0]] * 4 + [after[1]] * 9 + [after[2]] * 17
    entering = [start, *leaving[:-1]]
    return sum(leaving) / 32, sum(entering) / 32


@pytest.mark.parametrize(
    ("kept", "nominal", "compute"),
    [
        ([300, 200, 110], 192.0, 206.5),
        ([303, 110, 36], 128.6, 145.4),
        ([238, 48, 26], 96.9, 114.1),
        ([66, 30, 17], 64.8, 82.3),
    ],
)
def test_sparsevlm_averages_include_the_clusters(kept, nominal, compute):
    count, after = 576, []
    for k in kept:
        count = k + loops.sparsevlm_recycle_count(count, k)
        after.append(count)
    assert nominal_and_compute(576, after) == (pytest.approx(nominal, abs=0.051), pytest.approx(compute, abs=0.051))


@pytest.mark.parametrize(
    ("kept", "nominal", "compute"),
    [
        ([300, 200, 118], 192.4, 206.8),
        ([238, 108, 60], 128.0, 144.1),
        ([246, 54, 28], 96.8, 113.9),
        ([66, 34, 20], 64.4, 81.8),
    ],
)
def test_sparsevlm_v2_averages(kept, nominal, compute):
    assert nominal_and_compute(576, kept) == (pytest.approx(nominal, abs=0.051), pytest.approx(compute, abs=0.051))


def test_sparsevlm_recycling_counts():
    assert loops.sparsevlm_recycled_tokens(576, 300) == 83
    assert loops.sparsevlm_recycle_count(576, 300) == 9
    assert loops.sparsevlm_recycle_count(20, 19) == 1
    assert loops.sparsevlm_recycle_count(20, 20) == 0


def test_sparsevlm_raters():
    visual = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert loops.sparsevlm_raters(visual, torch.tensor([[3.0, 0.0], [0.0, 9.0], [2.9, 0.0]])) == [0, 2]
    assert loops.sparsevlm_raters(visual, torch.tensor([[3.0, 1.0]])) == [0]  # the only one
    assert loops.sparsevlm_raters(visual, torch.zeros(3, 2)) == [0, 1, 2]


def test_sparsevlm_scores():
    attention = torch.tensor([[[0.1, 0.2], [0.3, 0.4], [9.0, 9.0]], [[0.3, 0.0], [0.1, 0.0], [9.0, 9.0]]], dtype=torch.float64)
    assert loops.sparsevlm_scores(attention, [0, 1]) == pytest.approx([0.2, 0.15])
    assert loops.sparsevlm_scores(attention, [1]) == pytest.approx([0.2, 0.2])


def test_sparsevlm_v2_takes_the_heads_that_look_most():
    attention = torch.tensor(
        [[[0.1, 0.2], [5.0, 5.0]], [[0.3, 0.4], [0.0, 0.0]], [[0.2, 0.2], [0.0, 0.0]]], dtype=torch.float64
    )
    assert loops.sparsevlm_v2_scores(attention, [0], heads=1) == pytest.approx([0.3, 0.4])  # row 1 does not rate
    assert loops.sparsevlm_v2_scores(attention, [0], heads=2) == pytest.approx([0.25, 0.3])
    assert loops.sparsevlm_v2_scores(attention, [0]) == pytest.approx(loops.sparsevlm_scores(attention, [0]))


def test_sparsevlm_rope_bias_is_the_sum_of_cosines():
    dim, base = 8, 10000.0
    frequencies = [base ** (-2 * m / dim) for m in range(dim // 2)]

    def tables(positions):
        angles = torch.tensor([[p * w for w in frequencies] * 2 for p in positions], dtype=torch.float64)
        return angles.cos(), angles.sin()

    text, visual = [9, 12], [0, 3, 7]
    bias = loops.sparsevlm_rope_bias(*tables(text), *tables(visual))
    for row, p in zip(bias, text, strict=True):
        for entry, r in zip(row, visual, strict=True):
            assert entry == pytest.approx(2 / math.sqrt(dim) * sum(math.cos((p - r) * w) for w in frequencies))
    assert loops.sparsevlm_v2_correct([[[0.4, 0.3]], [[0.2, 0.1]]], [[2.0, 0.5]]) == [[[0.2, 0.6]], [[0.1, 0.2]]]


def test_sparsevlm_cluster_by_hand():
    # Two groups on a line: 1 is the heart of the first, 4 of the second; d = 1, so distances are plain
    centres, assignment = loops.sparsevlm_cluster(torch.tensor([[0.0], [1.0], [2.0], [20.0], [21.5], [23.0]]), 2)
    # density: 1 and 2 tokens have a neighbour at 1 (1/2 mean of squares), the second group at 1.5
    assert centres == [0, 3]  # 0, 1 and 2 are equally dense, likewise 3, 4 and 5: the lower index is the peak
    assert assignment == [0, 0, 0, 1, 1, 1]
    centres, assignment = loops.sparsevlm_cluster(torch.tensor([[0.0], [1.0], [1.9], [20.0], [21.5], [22.0]]), 2)
    assert centres == [4, 1]  # the tighter pairs, 4 before its twin 5 and 1 before its twin 2
    assert assignment == [1, 1, 1, 0, 0, 0]
    assert loops.sparsevlm_cluster(torch.ones(3, 2), 1) == ([0], [0, 0, 0])
    assert loops.sparsevlm_cluster(torch.ones(3, 2), 2) == ([0, 1], [0, 1, 0])  # a centre stays in its own cluster


def test_sparsevlm_distances_are_scaled_by_the_root_of_the_width():
    """exp(-x^2) against exp(-x^2 / 4): unscaled, the far pair's density would be too low to make it a centre."""
    x = torch.zeros(4, 4)
    x[1, 0], x[2, 1], x[3, 1] = 0.5, 3.0, 6.0
    density = [math.exp(-((x[0] - x[1]).norm().item() ** 2 / 4 + 0) / 2), math.exp(-(3.0**2 / 4) / 2)]
    largest = math.sqrt(0.25 + 36) / 2
    scores = [density[0] * largest, density[0] * 0.25, density[1] * 1.5, density[1] * 1.5]
    centres, assignment = loops.sparsevlm_cluster(x, 2)
    assert centres == loops.ranking(scores)[:2] == [0, 2]
    assert assignment == [0, 0, 1, 1]


def test_sparsevlm_recycle():
    features = random(40, 3)
    scores = [float(j) for j in range(40)]
    kept = list(range(10, 40))
    recycled, tokens = loops.sparsevlm_recycle(features, scores, kept)
    assert recycled == [9, 8, 7, 6]  # int(0.3 * 10) + 1 of the pruned 0..9
    torch.testing.assert_close(tokens, features[6:10].mean(0)[None])
    assert loops.sparsevlm_recycle(features, scores, list(range(40)))[0] == []
    recycled, tokens = loops.sparsevlm_recycle(features, scores, [39])
    assert len(recycled) == 12
    assert tokens.shape == (2, 3)


# --- CDPruner ---------------------------------------------------------------------------------------------------------
def test_cdpruner_relevance():
    assert loops.cdpruner_relevance([[0.1, 0.3], [0.0, 0.0], [0.4, 0.4]]) == pytest.approx(
        [0.5 + 2.5e-6, 1 + 2.5e-6, 2.5e-6], abs=1e-12
    )
    assert loops.cdpruner_relevance([[0.1], [0.1]]) == [1.0, 1.0]


def test_cdpruner_by_hand():
    points = unit_vectors(0, 5, 90, 45)
    assert loops.cdpruner(points, [1.0, 1.0, 1.0, 1.0], 2) == [0, 2]  # equal relevance: the orthogonal one
    assert loops.cdpruner(points, [1.0, 0.9, 0.01, 0.9], 2) == [0, 3]  # .9 sin 45 beats .01 sin 90 and .9 sin 5
    assert loops.cdpruner(points, [1.0, 0.1, 0.5, 0.75], 2) == [0, 3]  # squares: .75^2 / 2 beats .5^2, though .75 / 2 < .5
    assert loops.cdpruner(points, [0.5, 0.9, 0.6, 0.2], 1) == [1]


def test_cdpruner_is_the_incremental_form():
    """The determinant divided by the one before is the squared Cholesky pivot that the official code keeps."""
    features, relevance = random(12, 8), random(12, seed=1).abs() + 0.1
    unit = features / features.norm(dim=1, keepdim=True)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    left, rows, chosen = kernel.diagonal().clone(), [], []
    for _ in range(6):
        j = int(left.argmax())
        row = (kernel[j] - sum((r[j] * r for r in rows), torch.zeros(12, dtype=torch.float64))) / left[j].sqrt()
        rows.append(row)
        left = left - row**2
        left[j] = -math.inf
        chosen.append(j)
    assert loops.cdpruner(features, relevance, 6) == sorted(chosen)


# --- DART -------------------------------------------------------------------------------------------------------------
def test_golden_g7():
    assert [loops.dart_official_count(keep) for keep in (64, 128, 192)] == [68, 132, 196]
    assert loops.dart_lightcompress_count(576, 0.778) == 124  # which its script, too, calls 128


def test_dart_by_hand():
    # keep <= 4: the visual pivots alone, and equal norms go to the lower index
    keys = torch.tensor([[[-9.0], [1.0], [1.0], [1.0], [1.0]]])
    angles = unit_vectors(0, 10, 170, 90, 95)
    assert loops.dart(keys, torch.zeros(1, 0, 1), angles, torch.zeros(0, 2), 1) == [0]
    assert loops.dart(keys, torch.zeros(1, 0, 1), angles, torch.zeros(0, 2), 3) == [0, 1, 2]
    assert loops.dart(keys, torch.zeros(1, 0, 1), angles, torch.zeros(0, 2), 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("remainder", [0, 3, 7])
def test_dart_gives_each_pivot_its_share(remainder):
    n, t = 40, 6
    keys, texts, visual, text = random(2, n, 3), random(2, t, 3, seed=1), random(n, 5, seed=2), random(t, 5, seed=3)
    unit = torch.nn.functional.normalize(torch.cat([visual, text]), dim=1)
    first = keys.abs().sum((0, 2)).topk(4).indices.tolist()
    second = [n + j for j in texts.abs().sum((0, 2)).topk(4).indices.tolist()]
    expected = set(first)
    for number, pivot in enumerate(first + second):
        similarity = unit[:n] @ unit[pivot]
        similarity[list(expected)] = math.inf
        expected |= set((-similarity).topk(3 if number < remainder else 2).indices.tolist())
    assert loops.dart(keys, texts, visual, text, 4 + 8 * 2 + remainder) == sorted(expected)


def test_dart_keeps_exactly_what_is_asked_for():
    for n, t in ((40, 6), (40, 2), (5, 9), (2, 1)):
        keys, texts, visual, text = random(2, n, 3), random(2, t, 3, seed=1), random(n, 5, seed=2), random(t, 5, seed=3)
        for keep in range(1, n + 1):
            kept = loops.dart(keys, texts, visual, text, keep)
            assert len(kept) == keep
            assert kept == sorted(set(kept))


# --- HoloV ------------------------------------------------------------------------------------------------------------
def test_holov_follows_attention():
    # Two runs of 4 whose features are all alike within a run: the variances are equal, so the quotas follow attention
    features = torch.ones(8, 3)
    attention = [0.1, 0.4, 0.2, 0.3, 0.02, 0.01, 0.04, 0.03]
    assert loops.holov(attention, features, 3, runs=2) == [1, 2, 3]  # quotas 2.73 and .27: 2 + 1 (remainder) and 0
    assert loops.holov(attention, features, 5, runs=2) == [0, 1, 2, 3, 6]  # 4.5 and .45 of 5: all 4, and the remainder moves on
    assert loops.holov(attention, features, 8, runs=2) == list(range(8))


def test_holov_variance_is_rescaled_away():
    """A run's variances are scaled to its mean attention, so unlike tokens get their run no larger quota (issue 13)."""
    attention = [0.1, 0.2, 0.15, 0.1, 0.05, 0.15, 0.2, 0.05]  # .55 and .45
    for features in (torch.ones(8, 3), torch.cat([torch.ones(4, 3), random(4, 3).float()])):
        assert loops.holov(attention, features, 3, runs=2) == [1, 2, 6]  # 1.65 and 1.35, the remainder to the first
    # but a variance of 0 (orthogonal tokens) stays 0, and that run lacks the 9 percent: .55 against 1.09 * .53
    attention[4:] = [0.05, 0.16, 0.2, 0.12]
    assert loops.holov(attention, torch.cat([torch.eye(4), torch.ones(4, 4)]), 1, runs=2) == [6]
    assert loops.holov(attention, torch.ones(8, 4), 1, runs=2) == [1]


def test_holov_splits_as_evenly_as_it_can():
    # 5 tokens in 3 runs: 2, 2, 1; a single token counts as 1000 times its attention, like every other
    assert loops.holov([0.3, 0.1, 0.1, 0.1, 0.24], random(5, 3), 1, runs=3) == [4]  # means .2, .1 and .24
    assert loops.holov([0.3, 0.2, 0.5], random(3, 3), 2) == [0, 2]  # fewer tokens than runs
    for keep in range(1, 38):
        kept = loops.holov(random(37).softmax(0), random(37, 4, seed=1), keep)
        assert len(kept) == keep
        assert kept == sorted(set(kept))


def test_holov_without_any_attention_still_keeps_the_count():
    assert len(loops.holov([0.0] * 20, random(20, 3), 18)) == 18


# --- VScan ------------------------------------------------------------------------------------------------------------
def test_vscan_takes_local_winners_then_global_ones():
    n, local, whole = 64, random(64).softmax(0), random(64, seed=1).softmax(0)
    kept, _ = loops.vscan(local, whole, random(n, 5, seed=2), 8, 8, 40)  # 20 local: 1 for each of 16 windows, 24 global
    expected = set()
    for row in range(0, 8, 2):
        for column in range(0, 8, 2):
            window = [row * 8 + column, row * 8 + column + 1, row * 8 + 8 + column, row * 8 + 9 + column]
            expected.add(max(window, key=lambda j: local[j]))
    rest = sorted(set(range(n)) - expected, key=lambda j: -whole[j])[:24]
    assert kept == sorted(expected | set(rest))
    assert loops.vscan(local, whole, random(n, 5), 8, 8, 31)[0] == loops.top(whole.tolist(), 31)  # 15 // 16 = 0 local


def test_vscan_merges_into_the_nearest():
    # Windows of a 1 x 5 grid: columns 0 and 1 share one; nothing local at keep 2
    features = unit_vectors(0, 10, 90, 80, 95)
    kept, tokens = loops.vscan(torch.zeros(5), torch.tensor([0.5, 0.0, 0.4, 0.0, 0.0]), features, 1, 5, 2)
    assert kept == [0, 2]
    torch.testing.assert_close(tokens, torch.stack([features[[0, 1]].mean(0), features[[2, 3, 4]].mean(0)]))


def test_vscan_on_grids_that_do_not_divide():
    for rows, columns in ((5, 7), (3, 3), (1, 40)):
        n = rows * columns
        for keep in (1, n // 2, n):
            kept, tokens = loops.vscan(random(n), random(n, seed=1), random(n, 4, seed=2), rows, columns, keep)
            assert len(kept) == len(tokens) == keep
            assert kept == sorted(set(kept))


# --- ToMe -------------------------------------------------------------------------------------------------------------
def test_tome_by_hand():
    # A: 0 (0 deg), 2 (90), 4 (40); B: 1 (5), 3 (80).  Edges: 0-1 at 5, 2-3 at 10, 4-1 at 35
    features = unit_vectors(0, 5, 90, 80, 40)
    kept, tokens = loops.tome(features, 4)
    assert kept == [1, 2, 3, 4]
    torch.testing.assert_close(tokens, torch.stack([features[:2].mean(0), features[2], features[3], features[4]]))
    kept, tokens = loops.tome(features, 3)
    assert kept == [1, 3, 4]
    torch.testing.assert_close(tokens, torch.stack([features[:2].mean(0), features[2:4].mean(0), features[4]]))
    # Next round: A = 1 (0 and 5), 4 (40); B = 3 (90 and 80); 40 is nearer to 85 than 2.5 is; weights 1 and 2
    kept, tokens = loops.tome(features, 2)
    assert kept == [1, 3]
    torch.testing.assert_close(tokens, torch.stack([features[:2].mean(0), features[2:].mean(0)]))
    kept, tokens = loops.tome(features, 1)
    assert kept == [3]
    torch.testing.assert_close(tokens, features.mean(0)[None])


def test_tome_keeps_the_weighted_mean():
    features = random(17, 4)
    for keep in range(1, 18):
        kept, tokens = loops.tome(features, keep)
        assert len(kept) == len(tokens) == keep
        assert kept == sorted(set(kept))
    assert torch.equal(loops.tome(features, 17)[1], features)


# --- change points ----------------------------------------------------------------------------------------------------
def test_change_point():
    assert loops.change_point([0.0, 0.0, 0.0, 5.0, 5.0]) == 2
    assert loops.change_point([9.0, 0.0, 0.0, 0.0]) == 0
    assert loops.change_point([1.0, 1.0, 1.0]) == 0  # all splits are alike
    assert loops.change_point(torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])) == 1
