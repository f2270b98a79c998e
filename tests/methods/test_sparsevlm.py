"""SparseVLM: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from methods.comparing import close, hots, pictures, random, select, sizes
from methods.loops import plain
from methods.loops.sparsevlm import (
    sparsevlm_cluster,
    sparsevlm_raters,
    sparsevlm_recycle,
    sparsevlm_recycle_count,
    sparsevlm_recycled_tokens,
    sparsevlm_rope_bias,
    sparsevlm_scores,
    sparsevlm_v2_correct,
    sparsevlm_v2_scores,
)
from methods.views import random_view

import vlmprune as vp
from vlmprune.methods import merging
from vlmprune.methods.pruning.sparsevlm import recycled


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
        count = k + sparsevlm_recycle_count(count, k)
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
    assert sparsevlm_recycled_tokens(576, 300) == 83
    assert sparsevlm_recycle_count(576, 300) == 9
    assert sparsevlm_recycle_count(20, 19) == 1
    assert sparsevlm_recycle_count(20, 20) == 0


def test_sparsevlm_raters():
    visual = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert sparsevlm_raters(visual, torch.tensor([[3.0, 0.0], [0.0, 9.0], [2.9, 0.0]])) == [0, 2]
    assert sparsevlm_raters(visual, torch.tensor([[3.0, 1.0]])) == [0]  # the only one
    assert sparsevlm_raters(visual, torch.zeros(3, 2)) == [0, 1, 2]


def test_sparsevlm_scores():
    attention = torch.tensor([[[0.1, 0.2], [0.3, 0.4], [9.0, 9.0]], [[0.3, 0.0], [0.1, 0.0], [9.0, 9.0]]], dtype=torch.float64)
    assert sparsevlm_scores(attention, [0, 1]) == pytest.approx([0.2, 0.15])
    assert sparsevlm_scores(attention, [1]) == pytest.approx([0.2, 0.2])


def test_sparsevlm_v2_takes_the_heads_that_look_most():
    attention = torch.tensor(
        [[[0.1, 0.2], [5.0, 5.0]], [[0.3, 0.4], [0.0, 0.0]], [[0.2, 0.2], [0.0, 0.0]]], dtype=torch.float64
    )
    assert sparsevlm_v2_scores(attention, [0], heads=1) == pytest.approx([0.3, 0.4])  # row 1 does not rate
    assert sparsevlm_v2_scores(attention, [0], heads=2) == pytest.approx([0.25, 0.3])
    assert sparsevlm_v2_scores(attention, [0]) == pytest.approx(sparsevlm_scores(attention, [0]))


def test_sparsevlm_rope_bias_is_the_sum_of_cosines():
    dim, base = 8, 10000.0
    frequencies = [base ** (-2 * m / dim) for m in range(dim // 2)]

    def tables(positions):
        angles = torch.tensor([[p * w for w in frequencies] * 2 for p in positions], dtype=torch.float64)
        return angles.cos(), angles.sin()

    text, visual = [9, 12], [0, 3, 7]
    bias = sparsevlm_rope_bias(*tables(text), *tables(visual))
    for row, p in zip(bias, text, strict=True):
        for entry, r in zip(row, visual, strict=True):
            assert entry == pytest.approx(2 / math.sqrt(dim) * sum(math.cos((p - r) * w) for w in frequencies))
    assert sparsevlm_v2_correct([[[0.4, 0.3]], [[0.2, 0.1]]], [[2.0, 0.5]]) == [[[0.2, 0.6]], [[0.1, 0.2]]]


def test_sparsevlm_cluster_by_hand():
    # Two groups on a line: 1 is the heart of the first, 4 of the second; d = 1, so distances are plain
    centres, assignment = sparsevlm_cluster(torch.tensor([[0.0], [1.0], [2.0], [20.0], [21.5], [23.0]]), 2)
    # density: 1 and 2 tokens have a neighbour at 1 (1/2 mean of squares), the second group at 1.5
    assert centres == [0, 3]  # 0, 1 and 2 are equally dense, likewise 3, 4 and 5: the lower index is the peak
    assert assignment == [0, 0, 0, 1, 1, 1]
    centres, assignment = sparsevlm_cluster(torch.tensor([[0.0], [1.0], [1.9], [20.0], [21.5], [22.0]]), 2)
    assert centres == [4, 1]  # the tighter pairs, 4 before its twin 5 and 1 before its twin 2
    assert assignment == [1, 1, 1, 0, 0, 0]
    assert sparsevlm_cluster(torch.ones(3, 2), 1) == ([0], [0, 0, 0])
    assert sparsevlm_cluster(torch.ones(3, 2), 2) == ([0, 1], [0, 1, 0])  # a centre stays in its own cluster


def test_sparsevlm_distances_are_scaled_by_the_root_of_the_width():
    """exp(-x^2) against exp(-x^2 / 4): unscaled, the far pair's density would be too low to make it a centre."""
    x = torch.zeros(4, 4)
    x[1, 0], x[2, 1], x[3, 1] = 0.5, 3.0, 6.0
    density = [math.exp(-((x[0] - x[1]).norm().item() ** 2 / 4 + 0) / 2), math.exp(-(3.0**2 / 4) / 2)]
    largest = math.sqrt(0.25 + 36) / 2
    scores = [density[0] * largest, density[0] * 0.25, density[1] * 1.5, density[1] * 1.5]
    centres, assignment = sparsevlm_cluster(x, 2)
    assert centres == plain.ranking(scores)[:2] == [0, 2]
    assert assignment == [0, 0, 1, 1]


def test_sparsevlm_recycle():
    features = random(40, 3)
    scores = [float(j) for j in range(40)]
    kept = list(range(10, 40))
    recycled, tokens = sparsevlm_recycle(features, scores, kept)
    assert recycled == [9, 8, 7, 6]  # int(0.3 * 10) + 1 of the pruned 0..9
    torch.testing.assert_close(tokens, features[6:10].mean(0)[None])
    assert sparsevlm_recycle(features, scores, list(range(40)))[0] == []
    recycled, tokens = sparsevlm_recycle(features, scores, [39])
    assert len(recycled) == 12
    assert tokens.shape == (2, 3)


def rating_words(own: SimpleNamespace) -> list[int]:
    """Raters of one picture; what the tower dropped never entered the language model."""
    entered = [row for row in own.embeddings.tolist() if not math.isnan(row[0])]
    return sparsevlm_raters(entered, own.text_embeddings)


def test_sparsevlm_raters_are_some_words_only():
    """The views of these tests tell raters from others, and leave out what the tower dropped."""
    found = [len(rating_words(own)) for own in pictures(random_view(1, text=(9, 2, 4)))]
    assert found[0] < 9
    assert found[2] < 4
    assert random_view(1).embeddings.isnan().any()


@sizes
def test_sparsevlm_1_5(seed, visual, keep, text):
    """Exactly K: the most plain tokens such that they and their clusters make K; the clusters stand at their centres."""
    see = random_view(seed, visual=visual, text=text)
    index, features = select(vp.SparseVLM(), see, keep)
    splits = [(count, sparsevlm_recycle_count(visual, count)) for count in range(keep, 0, -1)]
    unmerged, clusters = next(((p, c) for p, c in splits if p + c == keep), (keep, 0))
    for image, own in enumerate(pictures(see)):
        scores = sparsevlm_scores(own.attention_from_text, rating_words(own))
        kept = plain.top(scores, unmerged)
        if not clusters:
            assert index[image] == kept
            assert features is None
            continue
        joined, tokens = sparsevlm_recycle(own.features, scores, kept)
        centres = [joined[i] for i in sparsevlm_cluster([own.features[j].tolist() for j in joined], clusters)[0]]
        assert index[image] == sorted(kept + centres)
        places = {j: own.features[j].double() for j in kept} | dict(zip(centres, tokens, strict=True))
        close(features[image], torch.stack([places[j] for j in sorted(places)]))


@pytest.mark.parametrize("heads", [4, 14, 17])
@sizes
def test_sparsevlm_2(heads, seed, visual, keep, text):
    """Attention over what rotary positions alone would give, in the heads that look at the picture most."""
    see = random_view(seed, visual=visual, text=text, heads=heads)
    index, features = select(vp.SparseVLM(version=2), see, keep)
    assert features is None
    for image, own in enumerate(pictures(see)):
        bias = sparsevlm_rope_bias(*own.text_rotary.unbind(1), *own.rotary.unbind(1))
        corrected = sparsevlm_v2_correct(own.attention_from_text, bias)
        assert index[image] == plain.top(sparsevlm_v2_scores(corrected, rating_words(own)), keep)


def test_sparsevlm_counts():
    """How many tokens are recycled, into how many clusters, for every number that can be dropped of 576."""
    for dropped in range(576):
        tokens, clusters = recycled(dropped)
        assert tokens == sparsevlm_recycled_tokens(576, 576 - dropped)
        assert clusters == sparsevlm_recycle_count(576, 576 - dropped)


@pytest.mark.parametrize(("tokens", "clusters"), [(30, 4), (7, 7), (50, 1), (9, 3), (1, 1)])
def test_density_peaks(tokens, clusters):
    x = random_view(tokens, images=3, visual=tokens).features
    centres, home = merging.density_peaks(x, clusters)
    for image in range(3):
        assert (centres[image].tolist(), home[image].tolist()) == sparsevlm_cluster(x[image], clusters)


def test_density_peaks_with_ties():
    """Duplicates: equal densities go to the lower index, and a centre stays in its own cluster."""
    x = hots(3, 20, width=8)
    for clusters in (1, 3, 6):
        centres, home = merging.density_peaks(x, clusters)
        for image in range(3):
            assert (centres[image].tolist(), home[image].tolist()) == sparsevlm_cluster(x[image], clusters)


def test_recycled_clusters_are_counted():
    """SparseVLM's presets are its published counts plus the clusters that the dropped ones become."""
    for budget, published in ((192, (300, 200, 110)), (128, (303, 110, 36)), (96, (238, 48, 26)), (64, (66, 30, 17))):
        count = 576
        for stage, kept in zip(vp.SparseVLM(preset=f"v1.5-{budget}").stages, published, strict=True):
            count = kept + sparsevlm_recycle_count(count, kept)
            assert stage.budget.tokens == count
