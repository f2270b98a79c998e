"""VisionZip: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import math

import pytest
import torch
from methods.comparing import close, hots, pictures, quantised, select, sizes, unit_vectors
from methods.loops.visionzip import visionzip
from methods.views import random_view, replaced

import vlmprune as vp


def test_visionzip_by_hand():
    attention = torch.tensor([[0.0, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.6]])
    keys = unit_vectors(0, 0, 0, 80, 90, 10, 0).expand(2, 7, 2)
    features = torch.arange(7, dtype=torch.float64)[:, None]
    dominant, targets, tokens = visionzip(attention, keys, features, 4, 2)
    assert dominant == [1, 6]
    assert targets == [0, 3]  # the rest is 0 2 3 4 5, stride 2
    assert tokens.tolist() == [[0 + (2 + 5) / 2], [3 + 4.0]]
    assert visionzip(attention, keys, features, 2, 0)[1] == []
    dominant, targets, tokens = visionzip(attention, keys, features, 7, 5)  # nobody left to join
    assert targets == [0, 2, 3, 4, 5]
    assert tokens.tolist() == [[0.0], [2.0], [3.0], [4.0], [5.0]]


@sizes
@pytest.mark.parametrize("contextual", [None, 0, 1, 3, 99])
def test_visionzip(contextual, seed, visual, keep, text):
    """Dominant and contextual tokens; contextual ones pass the projector after merging and stand at their targets' places."""
    see = random_view(seed, visual=visual, text=text, layer=0)
    merged = min(math.floor(keep * 5 / 32 + 0.5) if contextual is None else contextual, keep)
    index, features = select(vp.VisionZip(contextual=contextual), see, keep)
    for image, own in enumerate(pictures(see)):
        keys = own.tower_keys[None]  # one head: the probe is its mean already
        dominant, targets, tokens = visionzip(own.attention_from_cls, keys, own.tower_features, keep, merged)
        assert index[image] == sorted(dominant + targets)
        if not merged:
            assert features is None
            continue
        places = {j: own.features[j].double() for j in dominant} | dict(zip(targets, own.project(tokens), strict=True))
        close(features[image], torch.stack([places[j] for j in sorted(places)]))


def test_visionzip_shares():
    """10 of 64, 20 of 128, 30 of 192 are contextual, as published."""
    for keep, merged in ((64, 10), (128, 20), (192, 30)):
        see = random_view(images=1, visual=keep + 20, text=(2,), layer=0)
        seen = []
        vp.VisionZip().select(replaced(see, project=lambda x, seen=seen: (seen.append(x.shape[1]), x)[1]), keep)
        assert seen == [merged]


def test_visionzip_with_ties():
    see = quantised(random_view(visual=30, layer=0))
    see = replaced(see, tower_keys=hots(3, 30, width=8))
    index, features = select(vp.VisionZip(contextual=4), see, 13)
    for image, own in enumerate(pictures(see)):
        dominant, targets, tokens = visionzip(own.attention_from_cls, own.tower_keys[None], own.tower_features, 13, 4)
        assert index[image] == sorted(dominant + targets)
        close(features[image][[index[image].index(t) for t in targets]], own.project(tokens))
