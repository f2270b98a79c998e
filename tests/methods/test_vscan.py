"""VScan: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import pytest
import torch
from methods.comparing import close, hots, pictures, quantised, random, select, sizes, unit_vectors
from methods.loops import plain
from methods.loops.vscan import vscan, vscan_in_the_decoder
from methods.views import random_view, replaced

import vlmprune as vp


def test_vscan_takes_local_winners_then_global_ones():
    n, local, whole = 64, random(64).softmax(0), random(64, seed=1).softmax(0)
    kept, _ = vscan(local, whole, random(n, 5, seed=2), 8, 8, 40)  # 20 local: 1 for each of 16 windows, 24 global
    expected = set()
    for row in range(0, 8, 2):
        for column in range(0, 8, 2):
            window = [row * 8 + column, row * 8 + column + 1, row * 8 + 8 + column, row * 8 + 9 + column]
            expected.add(max(window, key=lambda j: local[j]))
    rest = sorted(set(range(n)) - expected, key=lambda j: -whole[j])[:24]
    assert kept == sorted(expected | set(rest))
    assert vscan(local, whole, random(n, 5), 8, 8, 31)[0] == plain.top(whole.tolist(), 31)  # 15 // 16 = 0 local


def test_vscan_merges_into_the_nearest():
    # Windows of a 1 x 5 grid: columns 0 and 1 share one; nothing local at keep 2
    features = unit_vectors(0, 10, 90, 80, 95)
    kept, tokens = vscan(torch.zeros(5), torch.tensor([0.5, 0.0, 0.4, 0.0, 0.0]), features, 1, 5, 2)
    assert kept == [0, 2]
    torch.testing.assert_close(tokens, torch.stack([features[[0, 1]].mean(0), features[[2, 3, 4]].mean(0)]))


def test_vscan_on_grids_that_do_not_divide():
    for rows, columns in ((5, 7), (3, 3), (1, 40)):
        n = rows * columns
        for keep in (1, n // 2, n):
            kept, tokens = vscan(random(n), random(n, seed=1), random(n, 4, seed=2), rows, columns, keep)
            assert len(kept) == len(tokens) == keep
            assert kept == sorted(set(kept))


@pytest.mark.parametrize(("side", "keep"), [(5, 9), (6, 33), (7, 48), (8, 40), (3, 1), (12, 100)])
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_vscan(ties, side, keep):
    """Windows, the global scan, and merging, on grids that four does not divide too."""
    visual = side**2
    see = random_view(side, images=2, visual=visual, text=(2, 3), layer=0, gone=0, in_tower=0)
    see = replaced(see, cell=torch.arange(visual).expand(2, visual), side=side)
    if ties:
        see = replaced(quantised(see), features=hots(2, visual, seed=1))
    index, features = select(vp.VScan(), see, keep)
    for own, kept, merged in zip(pictures(see), index, features, strict=True):
        expected, tokens = vscan(
            own.attention_from_cls_early.mean(0), own.attention_from_cls.mean(0), own.features, side, side, keep
        )
        assert kept == expected
        close(merged, tokens)


def test_vscan_on_part_of_a_view():
    """Un-padded crops lack rows or columns: a token's window is that of its place in the whole view."""
    side, rows = 8, 5
    see = random_view(images=2, visual=side * rows, text=(2, 3), layer=0, gone=0, in_tower=0)
    cells = torch.arange(side, side * (rows + 1))  # rows 1 to 5 of 8
    see = replaced(see, cell=cells.expand(2, -1), side=side)
    for keep in (10, 32, 39):
        index, _ = select(vp.VScan(), see, keep)
        for own, kept in zip(pictures(see), index, strict=True):
            early, late = (plain.mean_of(a.tolist()) for a in (own.attention_from_cls_early, own.attention_from_cls))
            local = set()
            for window in {(cell // side // 2, cell % side // 2) for cell in cells.tolist()}:
                inside = [j for j, cell in enumerate(cells.tolist()) if (cell // side // 2, cell % side // 2) == window]
                local |= {inside[i] for i in plain.top([early[j] for j in inside], keep // 2 // 16)}
            rest = [j for j in plain.ranking(late) if j not in local]
            assert kept == sorted([*local, *rest[: keep - len(local)]])


@sizes
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_vscan_in_the_decoder(ties, seed, visual, keep, text):
    """The mean over heads of one row of attention; ties go to the lower index."""
    see = random_view(seed, visual=visual, text=text, layer=16)
    see = quantised(see) if ties else see
    expected = [vscan_in_the_decoder(heads.tolist(), keep) for heads in see.probes["attention_of_layer"]]
    assert select(vp.VScan(), see, keep)[0] == expected
