"""HoloV: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import pytest
import torch
from methods.comparing import pictures, quantised, random, select, sizes
from methods.loops.holov import holov
from methods.views import random_view, replaced

import vlmprune as vp


def test_holov_follows_attention():
    # Two runs of 4 whose features are all alike within a run: the variances are equal, so the quotas follow attention
    features = torch.ones(8, 3)
    attention = [0.1, 0.4, 0.2, 0.3, 0.02, 0.01, 0.04, 0.03]
    assert holov(attention, features, 3, runs=2) == [1, 2, 3]  # quotas 2.73 and .27: 2 + 1 (remainder) and 0
    assert holov(attention, features, 5, runs=2) == [0, 1, 2, 3, 6]  # 4.5 and .45 of 5: all 4, and the remainder moves on
    assert holov(attention, features, 8, runs=2) == list(range(8))


def test_holov_variance_is_rescaled_away():
    """A run's variances are scaled to its mean attention, so unlike tokens get their run no larger quota."""
    attention = [0.1, 0.2, 0.15, 0.1, 0.05, 0.15, 0.2, 0.05]  # .55 and .45
    for features in (torch.ones(8, 3), torch.cat([torch.ones(4, 3), random(4, 3).float()])):
        assert holov(attention, features, 3, runs=2) == [1, 2, 6]  # 1.65 and 1.35, the remainder to the first
    # but a variance of 0 (orthogonal tokens) stays 0, and that run lacks the 9 percent: .55 against 1.09 * .53
    attention[4:] = [0.05, 0.16, 0.2, 0.12]
    assert holov(attention, torch.cat([torch.eye(4), torch.ones(4, 4)]), 1, runs=2) == [6]
    assert holov(attention, torch.ones(8, 4), 1, runs=2) == [1]


def test_holov_splits_as_evenly_as_it_can():
    # 5 tokens in 3 runs: 2, 2, 1; a single token counts as 1000 times its attention, like every other
    assert holov([0.3, 0.1, 0.1, 0.1, 0.24], random(5, 3), 1, runs=3) == [4]  # means .2, .1 and .24
    assert holov([0.3, 0.2, 0.5], random(3, 3), 2) == [0, 2]  # fewer tokens than runs
    for keep in range(1, 38):
        kept = holov(random(37).softmax(0), random(37, 4, seed=1), keep)
        assert len(kept) == keep
        assert kept == sorted(set(kept))


def test_holov_without_any_attention_still_keeps_the_count():
    assert len(holov([0.0] * 20, random(20, 3), 18)) == 18


@sizes
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_holov(ties, seed, visual, keep, text):
    see = random_view(seed, visual=visual, text=text)
    see = quantised(see) if ties else see
    expected = [holov(own.attention_from_cls.mean(0), own.features, keep) for own in pictures(see)]
    assert select(vp.HoloV(), see, keep)[0] == expected


def test_holov_one_run_takes_all_it_can():
    """A run with nearly all the attention: its quota is cut to its length, the rest goes on round after round."""
    attention = torch.full((1, 2, 40), 1e-4)
    attention[..., 3:6] = 0.3
    see = replaced(random_view(images=1, visual=40), attention_from_cls=attention)
    (own,) = pictures(see)
    for keep in (3, 11, 30, 39):
        assert select(vp.HoloV(), see, keep)[0] == [holov(own.attention_from_cls.mean(0), own.features, keep)]
