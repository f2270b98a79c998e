"""VidCom²: the loops of its formula by hand, what vLLM keeps, and the method against them."""

from __future__ import annotations

import pytest
import torch
from methods.comparing import hots, random, select
from methods.loops.vidcom2 import vidcom2, vidcom2_shares, vllm_count
from methods.views import alone, random_view, replaced

import vlmprune as vp

VIDEOS = [(0, 4, 9, 0, 14), (1, 12, 16, 40, 33), (2, 2, 20, 3, 21), (3, 30, 4, 50, 8), (4, 6, 10, 0, 3), (5, 1, 30, 4, 7)]
"""Seed, frames, tokens of a frame, tokens that were dropped before, tokens to keep."""
videos = pytest.mark.parametrize(("seed", "frames", "cells", "gone", "keep"), VIDEOS)


def view(seed, frames, cells, gone, **more):
    return random_view(seed, visual=frames * cells - gone, gone=gone, in_tower=0, frames=frames, layer=0, **more)


def test_shares_by_hand():
    """Frames alike: equal shares. One that is unusual by more than the temperature takes all that is to be shared."""
    assert vidcom2_shares([1.0, 1.0, 1.0, 1.0], [16] * 4, 0.25) == [4, 4, 4, 4]
    assert vidcom2_shares([3.0, 3.0, 1.0, 3.0], [16] * 4, 0.25) == [3, 3, 7, 3]  # 0.25 · (1 ∓ …): 3 and 7 of 16
    assert vidcom2_shares([3.0, 1.0], [10, 10], 0.9) == [4, 10]  # 0.45 and at most 1; 4.5 goes to the even number
    assert vidcom2_shares([1.0, 3.0, 3.0], [2, 2, 2], 0.01) == [1, 1, 1]


def test_vidcom2_by_hand():
    # The second dimension varies most and is left out; what is left of the tokens are the numbers 1 and −1.
    x = torch.tensor([[1.0, 9], [1, -9], [1, 9], [1, -9], [1, 9], [-1, -9], [1, 9], [1, -9]], dtype=torch.float64)
    # Two frames of four: the second holds the odd one, and is the more unusual of the two.
    assert vidcom2(x, list(range(8)), 4, 1) == [5]
    # base ½: frame 0 gets round(½ · ½ · 4) = 1, frame 1 round(½ · 1½ · 4) = 3: its odd one and, of equal ones, the first
    assert vidcom2(x, list(range(8)), 4, 4) == [0, 4, 5, 6]
    # All of frame 1 (⅝ · 1½ · 4 = 3.75) and one of frame 0 (⅝ · ½ · 4 = 1.25)
    assert vidcom2(x, list(range(8)), 4, 5) == [0, 4, 5, 6, 7]


@videos
def test_vidcom2(seed, frames, cells, gone, keep):
    see = view(seed, frames, cells, gone)
    expected = [vidcom2(see.features[i], see.position[i].tolist(), cells, keep) for i in range(see.images)]
    assert select(vp.VidCom2(), see, keep)[0] == expected


@pytest.mark.parametrize("keep", [1, 5, 12, 30, 47])
def test_unusual_frames(keep):
    """One frame of another kind among alike ones: it is given more. The loops agree at every count."""
    see = view(1, 6, 8, 0)
    common = random(8, 16, seed=4).float()
    features = common.repeat(6, 1).expand(3, -1, -1) + 0.05 * see.features
    features = features.clone()
    features[:, 16:24] = see.features[:, 16:24]
    see = replaced(see, features=features)
    found = select(vp.VidCom2(), see, keep)[0]
    assert found == [vidcom2(features[i], range(48), 8, keep) for i in range(3)]
    if keep == 12:
        assert sum(16 <= token < 24 for own in found for token in own) > 3 * 12 / 6


def test_vidcom2_with_ties():
    """Two frames repeated: equal likeness goes to the lower index, within frames and over the video."""
    see = view(0, 6, 8, 0)
    see = replaced(see, features=hots(3, 8, width=8).repeat(1, 6, 1))
    for keep in (3, 6, 20):
        found = select(vp.VidCom2(), see, keep)[0]
        assert found == [vidcom2(see.features[i].double(), range(48), 8, keep) for i in range(3)]


def test_vidcom2_as_vllm():
    """What `compute_retention_mask` of `vllm/multimodal/video_prune/vidcom2.py` keeps of these: its formula, run once."""
    for (frames, cells, rate), kept in VLLM.items():
        see = view(0, frames, cells, 0, images=1)
        see = replaced(see, features=random(frames * cells, 6, seed=frames)[None].float())
        assert len(kept) == vllm_count(cells, frames, rate)
        assert select(vp.VidCom2(), see, len(kept))[0] == [kept]


VLLM = {
    (4, 6, 0.5): [0, 2, 3, 5, 8, 10, 12, 15, 16, 17, 18, 22],
    (5, 4, 0.25): [0, 2, 4, 5, 6, 7, 9, 10, 12, 13, 14, 15, 17, 18, 19],
    (3, 10, 0.9): [1, 18, 29],
    (8, 5, 0.7): [3, 4, 5, 12, 19, 24, 26, 29, 30, 32, 37, 38],
}
"""Kept tokens by frames, tokens of a frame, and pruning rate."""


def test_counts_as_vllm():
    for frames, cells, rate in [(8, 196, 0.75), (16, 64, 0.5), (4, 25, 0.25)]:
        assert vp.Budget(fraction=1 - rate).resolve(frames * cells) == vllm_count(cells, frames, rate)
    assert vllm_count(16, 8, 0.97) == 8  # one of each frame; here fewer are possible
    assert len(select(vp.VidCom2(), view(0, 8, 16, 0), 3)[0][0]) == 3


@videos
def test_videos_do_not_meet(seed, frames, cells, gone, keep):
    see = view(seed, frames, cells, gone)
    together = select(vp.VidCom2(), see, keep)[0]
    assert together == [select(vp.VidCom2(), alone(see, i), keep)[0][0] for i in range(see.images)]


def test_scores_rank_within_a_frame():
    """What `explain` prints: in every frame, the tokens that stay have the highest scores."""
    see = view(7, 5, 12, 0)
    scores, kept = vp.VidCom2().scores(see), select(vp.VidCom2(), see, 20)[0]
    for image, own in enumerate(kept):
        for frame in range(5):
            mine = [token for token in own if token // 12 == frame]
            best = scores[image, 12 * frame : 12 * frame + 12].argsort(descending=True)[: len(mine)] + 12 * frame
            assert sorted(best.tolist()) == mine
