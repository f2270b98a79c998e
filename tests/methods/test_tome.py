"""ToMe: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import torch
from methods.comparing import close, hots, pictures, random, select, sizes, unit_vectors
from methods.loops.tome import tome
from methods.views import random_view, replaced

import vlmprune as vp


def test_tome_by_hand():
    # A: 0 (0 deg), 2 (90), 4 (40); B: 1 (5), 3 (80).  Edges: 0-1 at 5, 2-3 at 10, 4-1 at 35
    features = unit_vectors(0, 5, 90, 80, 40)
    kept, tokens = tome(features, 4)
    assert kept == [1, 2, 3, 4]
    torch.testing.assert_close(tokens, torch.stack([features[:2].mean(0), features[2], features[3], features[4]]))
    kept, tokens = tome(features, 3)
    assert kept == [1, 3, 4]
    torch.testing.assert_close(tokens, torch.stack([features[:2].mean(0), features[2:4].mean(0), features[4]]))
    # Next round: A = 1 (0 and 5), 4 (40); B = 3 (90 and 80); 40 is nearer to 85 than 2.5 is; weights 1 and 2
    kept, tokens = tome(features, 2)
    assert kept == [1, 3]
    torch.testing.assert_close(tokens, torch.stack([features[:2].mean(0), features[2:].mean(0)]))
    kept, tokens = tome(features, 1)
    assert kept == [3]
    torch.testing.assert_close(tokens, features.mean(0)[None])


def test_tome_keeps_the_weighted_mean():
    features = random(17, 4)
    for keep in range(1, 18):
        kept, tokens = tome(features, keep)
        assert len(kept) == len(tokens) == keep
        assert kept == sorted(set(kept))
    assert torch.equal(tome(features, 17)[1], features)


@sizes
def test_tome(seed, visual, keep, text):
    see = random_view(seed, visual=visual, text=text, layer=0)
    index, features = select(vp.ToMe(), see, keep)
    for own, kept, merged in zip(pictures(see), index, features, strict=True):
        expected, tokens = tome(own.features, keep)
        assert kept == expected
        close(merged, tokens)


def test_tome_with_ties():
    see = replaced(random_view(visual=21, layer=0), features=hots(3, 21))
    for keep in (20, 15, 11):  # one round: afterwards cosines of means are no longer exact
        index, features = select(vp.ToMe(), see, keep)
        for own, kept, merged in zip(pictures(see), index, features, strict=True):
            expected, tokens = tome(own.features, keep)
            assert kept == expected
            close(merged, tokens)
