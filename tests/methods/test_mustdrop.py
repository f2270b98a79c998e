"""MustDrop: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import math

import pytest
import torch
from methods.comparing import close, pictures, quantised, random, select, sizes
from methods.loops import plain
from methods.loops.mustdrop import (
    mustdrop_filter,
    mustdrop_key_set,
    mustdrop_merge,
    mustdrop_merge_count,
    mustdrop_top,
    mustdrop_window_scores,
    mustdrop_windows,
)
from methods.views import random_view
from tiny_models import make_inputs, shared

import vlmprune as vp
from vlmprune.methods.tower import TowerState
from vlmprune.view import TowerFacts


def test_mustdrop_merges_alike_windows_only():
    assert mustdrop_windows(3, 6)[1] == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    hidden = random(36, 5)
    windows = mustdrop_windows(6, 6)
    for factor, patch in enumerate(windows[2], 1):
        hidden[patch] = factor * torch.tensor([1.0, 2.0, 0.0, 0.0, 1.0])  # one direction: cosine 1
    merged, tokens = mustdrop_merge(hidden, 6, 6, 0.8)
    assert merged == [2]
    assert tokens[2] == pytest.approx([5.0, 10.0, 0.0, 0.0, 5.0])
    assert mustdrop_merge(hidden, 6, 6, 1.1) == ([], {})
    assert mustdrop_merge(hidden, 6, 6, -1.0)[0] == [0, 1, 2, 3]
    assert mustdrop_merge_count(hidden, 6, 6, 1)[0] == [2]
    merged, tokens = mustdrop_merge_count(hidden, 6, 6, 3)
    assert len(merged) == 3
    assert merged == sorted(merged) == sorted(tokens)
    with pytest.raises(ValueError, match="does not divide"):
        mustdrop_merge(hidden, 4, 9)


def test_mustdrop_window_score_leaves_the_diagonal_out():
    hidden = torch.eye(9, dtype=torch.float64)
    assert mustdrop_window_scores(hidden, 3, 3) == [0.0]
    hidden[8] = hidden[7]  # one alike pair of 36, counted twice in 72
    assert mustdrop_window_scores(hidden, 3, 3) == pytest.approx([1 / 36])


def test_mustdrop_key_set():
    assert len(mustdrop_key_set(random(576))) == 47
    assert mustdrop_key_set([0.0] * 13) == [0, 1]
    assert mustdrop_key_set([0.1, 0.9, 0.3]) == [1]


def test_mustdrop_filter():
    attention = [[0.1, 0.02, 0.03, 0.2], [0.1, 0.02, 0.3, 0.01]]  # column sums .2 .04 .33 .21, all .78
    assert mustdrop_filter(attention, [], 1.0, 0.0) == [0, 1, 2, 3]  # G18
    assert mustdrop_filter(random(5, 9).softmax(1), [], 1.0, 0.0) == list(range(9))
    assert mustdrop_filter(attention, [], 0.27, 0.15) == [2, 3]  # both conditions: 3 is under g, but not under u
    assert mustdrop_filter(attention, [], 0.25, 0.15) == [0, 2, 3]  # 0 reaches g
    assert mustdrop_filter(attention, [1], 0.27, 0.15) == [1, 2, 3]


def test_mustdrop_top_forces_the_key_set_in():
    attention = [[0.1, 0.02, 0.03, 0.2], [0.1, 0.02, 0.3, 0.01]]
    assert mustdrop_top(attention, [], 2) == [2, 3]
    assert mustdrop_top(attention, [1], 2) == [1, 2]
    assert mustdrop_top(attention, [0, 1, 3], 2) == [0, 3]


@sizes
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_mustdrop_counts(ties, seed, visual, keep, text):
    """The key set, 8 % of what entered the language model, and then the best by the words' attention."""
    see = random_view(seed, visual=visual, text=text, gone=11, in_tower=3)
    see = quantised(see) if ties else see
    index, features = select(vp.MustDrop(), see, keep)
    assert features is None
    for kept, own in zip(index, pictures(see), strict=True):
        salience = plain.mean_of(own.attention_from_cls_final.tolist())
        entered = [*salience, *[-1.0] * (see.entered - visual)]  # what an earlier stage dropped was no key
        keys = [j for j in mustdrop_key_set(entered) if j < visual]
        assert kept == mustdrop_top(own.attention_from_text.mean(0), keys, keep)


@sizes
@pytest.mark.parametrize(("g", "u"), [(0.05, 0.2), (0.03, 0.05), (1.0, 0.0), (0.0, 1.0), (2.0, 2.0)])
def test_mustdrop_thresholds(g, u, seed, visual, keep, text):
    """The dual filter, as many tokens as pass it; the key set stays whatever it says."""
    see = random_view(seed, visual=visual, text=text, gone=11, in_tower=3)
    index, _ = select(vp.MustDrop(global_threshold=g, individual_threshold=u), see, visual)
    for kept, own in zip(index, pictures(see), strict=True):
        salience = plain.mean_of(own.attention_from_cls_final.tolist())
        keys = plain.top(salience, math.ceil(0.08 * see.entered))
        assert kept == mustdrop_filter(own.attention_from_text.mean(0), keys, g, u)


def grids(side: int, views: int = 3, width: int = 6) -> torch.Tensor:
    """Patches `[view, side², width]` of which some windows are alike."""
    draw = torch.Generator().manual_seed(side)
    hidden = torch.randn(views, side, side, width, generator=draw)
    for view in range(views):
        for row in range(0, side - 2, 3):
            for column in range(0, side - 2, 3):
                common = torch.randn(width, generator=draw)
                hidden[view, row : row + 3, column : column + 3] *= torch.rand((), generator=draw)
                hidden[view, row : row + 3, column : column + 3] += common * (1 + view)
    return hidden.flatten(1, 2)


def expected_merge(patches: torch.Tensor, side: int, threshold: float, windows: int | None) -> dict[int, torch.Tensor]:
    """What is left of a view: raster index -> feature. Rows and columns that fill no window stay as they are."""
    per_side = side // 3
    grid = patches.view(side, side, -1)[: 3 * per_side, : 3 * per_side]
    flat, edge = grid.flatten(0, 1), 3 * per_side
    if windows is None:
        merged, tokens = mustdrop_merge(flat, edge, edge, threshold)
    else:
        merged, tokens = mustdrop_merge_count(flat, edge, edge, windows)
    left = {index: patches[index].double() for index in range(side**2)}
    for number in merged:
        window = [patch // edge * side + patch % edge for patch in mustdrop_windows(edge, edge)[number]]
        for patch in window:
            del left[patch]
        left[window[4]] = torch.tensor(tokens[number], dtype=torch.float64)
    return left


@pytest.mark.parametrize("side", [3, 6, 9, 7, 5])
@pytest.mark.parametrize(("threshold", "windows"), [(0.8, None), (0.5, None), (-1.0, None), (0.8, 1), (0.8, 3)])
def test_mustdrop_merge(side, threshold, windows):
    """Behind the first block: each view merges its own windows, at their middles, and nothing else moves."""
    hidden = grids(side)
    state = TowerState(TowerFacts(cls=True), side**2, torch.arange(side**2).expand(3, -1), side)
    stays, patches = vp.MustDrop(merge=threshold, windows=windows).drop(0, 10, hidden, state)
    numbers = set()
    for view in range(3):
        left = expected_merge(hidden[view], side, threshold, windows)
        assert stays[view].nonzero()[:, 0].tolist() == sorted(left)
        close(patches[view, sorted(left)], torch.stack([left[j] for j in sorted(left)]))
        numbers.add(len(left))
    if threshold == 0.5 and windows is None and side == 9:
        assert len(numbers) > 1, "the views of this test must merge different numbers"


def test_a_window_that_lost_patches_before_the_tower_stays_as_it_is():
    """Red: patches that were dropped before the first block shift the others into another window, or are merged as zeros."""
    hidden, lost = grids(6), [0, 20]  # of the first window, and of the fourth
    cells = torch.tensor([cell for cell in range(36) if cell not in lost]).expand(3, -1)
    method = vp.MustDrop(merge=-1)
    stays, patches = method.drop(0, 10, hidden[:, cells[0]].clone(), TowerState(TowerFacts(cls=True), 36, cells, 6))
    every, merged = method.drop(0, 10, hidden.clone(), TowerState(TowerFacts(cls=True), 36, torch.arange(36).expand(3, -1), 6))
    windows = [cell // 18 * 2 + cell % 6 // 3 for cell in range(36)]
    broken = torch.tensor([window in {windows[cell] for cell in lost} for window in windows])
    assert 0 < broken.sum() < 36
    assert torch.equal(stays, (every | broken)[:, cells[0]])
    assert torch.equal(patches, torch.where(broken[:, None], hidden, merged)[:, cells[0]])


def test_mustdrop_merges_behind_the_first_block_only():
    hidden = grids(6)
    state = TowerState(TowerFacts(cls=True), 36, torch.arange(36).expand(3, -1), 6)
    for index in range(1, 4):
        assert vp.MustDrop(merge=-1).drop(index, 3, hidden, state) is None
    small = TowerState(TowerFacts(cls=True), 4, torch.arange(4).expand(3, -1), 2)
    assert vp.MustDrop(merge=-1).drop(0, 3, hidden[:, :4], small) is None


@pytest.mark.parametrize(
    ("preset", "g", "u"),
    [("textvqa-192", 0.001, 0.001), ("textvqa-128", 0.0012, 0.001), ("textvqa-64", 0.011, 0.01), ("vizwiz-64", 0.005, 0.001)],
)
def test_mustdrop_presets(preset, g, u):
    """The published pairs of thresholds, at four cuts that set no count."""
    method = vp.MustDrop(preset=preset)
    assert (method.global_threshold, method.individual_threshold) == (g, u)
    assert [(stage.layer, stage.budget.fraction) for stage in method.stages] == [(3, 1.0), (7, 1.0), (11, 1.0), (15, 1.0)]
    assert method.adaptive


@pytest.mark.parametrize("seed", range(3))
def test_mustdrop_default_thresholds_drop_nothing(seed):
    see = random_view(seed, visual=50)
    chosen = vp.MustDrop(global_threshold=1.0, individual_threshold=0.0).select(see, 50)
    assert [row.tolist() for row in chosen.index] == [list(range(50))] * 3


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_mustdrop_default_thresholds_in_a_model(family):
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
