"""EVS: the loops of its formula by hand, what vLLM keeps, and the method against them."""

from __future__ import annotations

import pytest
import torch
from methods.comparing import hots, random, select
from methods.loops.evs import evs, vllm_count
from methods.loops.uniform import uniform
from methods.views import alone, random_view, replaced

import vlmprune as vp

VIDEOS = [(0, 4, 9, 0, 14), (1, 12, 16, 40, 33), (2, 2, 20, 3, 21), (3, 30, 4, 50, 8)]
"""Seed, frames, tokens of a frame, tokens that were dropped before, tokens to keep."""
videos = pytest.mark.parametrize(("seed", "frames", "cells", "gone", "keep"), VIDEOS)


def view(seed, frames, cells, gone, **more):
    return random_view(seed, visual=frames * cells - gone, gone=gone, in_tower=0, frames=frames, layer=0, **more)


def test_evs_by_hand():
    # Three frames of two cells, as directions. Cell 0: →, ↑, ↑; cell 1: →, →, ↗. Differences: ∞ ∞ | 1 0 | 0 0.29
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    places = list(range(6))
    assert evs(x, places, 3, 2, 2) == [0, 1]
    assert evs(x, places, 3, 2, 3) == [0, 1, 2]
    assert evs(x, places, 3, 2, 4) == [0, 1, 2, 5]
    assert evs(x, places, 3, 2, 5) == [0, 1, 2, 3, 5]  # of equal ones the earlier
    # Without token 3 its cell is compared with frame 0; without 0 and 2 nothing is before token 4
    assert evs(x[[0, 1, 2, 4, 5]], [0, 1, 2, 4, 5], 3, 2, 4) == [0, 1, 2, 4]
    assert evs(x[[1, 3, 4, 5]], [1, 3, 4, 5], 3, 2, 2) == [0, 2]


@videos
def test_evs(seed, frames, cells, gone, keep):
    see = view(seed, frames, cells, gone)
    expected = [evs(see.features[i], see.position[i].tolist(), frames, cells, keep) for i in range(see.images)]
    assert select(vp.EVS(), see, keep)[0] == expected


def test_evs_with_ties():
    """Features along a few axes: differences are 0 or 1, and equal ones stay in the order of the video."""
    see = view(0, 6, 8, 0)
    see = replaced(see, features=hots(3, 48))
    for keep in (8, 9, 20, 47):
        expected = [evs(see.features[i], range(48), 6, 8, keep) for i in range(3)]
        assert select(vp.EVS(), see, keep)[0] == expected


def test_evs_as_vllm():
    """What `compute_retention_mask` of `vllm/multimodal/video_prune/evs.py` keeps of these features: its formula, run once."""
    for (frames, cells, rate), kept in VLLM.items():
        see = view(0, frames, cells, 0, images=1)
        see = replaced(see, features=random(frames * cells, 6, seed=frames)[None].float())
        assert len(kept) == vllm_count(cells, frames, rate)
        assert select(vp.EVS(), see, len(kept))[0] == [kept]


VLLM = {
    (4, 6, 0.5): [0, 1, 2, 3, 4, 5, 6, 8, 14, 16, 17, 20],
    (5, 4, 0.25): [0, 1, 2, 3, 4, 6, 7, 8, 9, 12, 13, 14, 16, 17, 19],
    (3, 10, 0.9): [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    (8, 5, 0.7): [0, 1, 2, 3, 4, 6, 10, 17, 20, 27, 29, 32],
}
"""Kept tokens by frames, tokens of a frame, and pruning rate."""


def test_counts_as_vllm():
    """A share of the video that is whole: the same count. Red: another rounding, or another floor."""
    for frames, cells, rate in [(8, 196, 0.75), (16, 64, 0.5), (4, 25, 0.25), (10, 10, 0.3)]:
        assert vp.Budget(fraction=1 - rate).resolve(frames * cells) == vllm_count(cells, frames, rate)
    assert vp.Budget(fraction=0.25).resolve(7 * 9) == 16  # vLLM rounds down: 15
    assert vllm_count(9, 7, 0.75) == 15
    assert vllm_count(100, 32, 0.9) == 319  # 1 − 0.9 is a little less than 0.1 in floating point; here it is 320
    assert vp.Budget(fraction=0.1).resolve(3200) == 320
    assert vllm_count(49, 8, 0.95) == 49  # a whole frame, where the share is smaller


def test_a_budget_below_one_frame_is_refused():
    see = view(0, 8, 10, 0)
    with pytest.raises(
        vp.UsageError, match=r"10 tokens of 80 here, found a budget of 9: give at least tokens=10 or fraction=0.125"
    ):
        vp.EVS().select(see, 9)
    assert select(vp.EVS(), see, 10)[0] == [list(range(10))] * 3
    assert vp.Budget(fraction=0.3334).resolve(3 * 5461) >= 5461  # the advice for three large frames is enough
    with pytest.raises(vp.UsageError, match=r"fraction=0.3334"):
        vp.EVS().select(view(0, 3, 10, 0), 9)


def test_of_a_picture_evenly_spaced_tokens_stay():
    see = view(0, 1, 30, 4)
    assert select(vp.EVS(), see, 7)[0] == [uniform(26, 7)] * 3
    assert vp.EVS().scores(see) is None


@videos
def test_videos_do_not_meet(seed, frames, cells, gone, keep):
    see = view(seed, frames, cells, gone)
    together = select(vp.EVS(), see, keep)[0]
    assert together == [select(vp.EVS(), alone(see, i), keep)[0][0] for i in range(see.images)]


def test_scores_are_the_differences():
    see = view(3, 5, 6, 0)
    scores = vp.EVS().scores(see)
    assert scores[:, :6].isinf().all()
    likeness = torch.cosine_similarity(see.features[:, 6:], see.features[:, :-6], dim=-1)
    torch.testing.assert_close(scores[:, 6:], 1 - likeness)


@pytest.mark.parametrize("method", [vp.EVS, vp.VidCom2, vp.FastVID])
def test_frames_that_are_compared_cannot_be_apart(method):
    with pytest.raises(vp.UsageError, match=f'{method.name} compares the frames of a video.* leave out per="frame"'):
        method(per="frame")
