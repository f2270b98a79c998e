"""FastVID: the loops of its formulas by hand, and the method against them."""

from __future__ import annotations

import pytest
import torch
from methods.comparing import close, hots, unit_vectors
from methods.loops.fastvid import fastvid, fastvid_peaks, fastvid_segments, running_shares
from methods.views import alone, random_view, replaced

import vlmprune as vp
from vlmprune.view import TowerFacts

VIDEOS = [(0, 4, 9, 0, 14), (1, 12, 16, 40, 33), (2, 2, 20, 3, 21), (3, 30, 4, 50, 8), (4, 6, 10, 0, 3), (5, 1, 30, 4, 7)]
"""Seed, frames, tokens of a frame, tokens that were dropped before, tokens to keep."""
videos = pytest.mark.parametrize(("seed", "frames", "cells", "gone", "keep"), VIDEOS)
forms = pytest.mark.parametrize(
    "form",
    [
        {},
        {"segments": 2, "threshold": -1},
        {"segments": 1, "threshold": 0.2, "every": 2},
        {"context": 0.4, "segments": 3, "threshold": -1, "own": 0.1},
        {"context": 0.0},
    ],
    ids=["default", "two segments", "by threshold", "salient", "salient only"],
)


def view(seed, frames, cells, gone, **more):
    return random_view(seed, visual=frames * cells - gone, gone=gone, in_tower=0, frames=frames, layer=0, **more)


def looped(see, image, keep, **form):
    names = {"segments": "least", "threshold": "threshold", "context": "context", "every": "every", "own": "own"}
    attention = see.attention_from_cls[image].double().mean(dim=0).tolist()
    cells = see.original // see.frames
    given = {names[key]: value for key, value in form.items()}
    return fastvid(see.features[image], see.position[image].tolist(), cells, keep, attention, **given)


def test_segments_by_hand():
    frames = [[v] for v in unit_vectors(0, 5, 60, 65, 68, 150).tolist()]
    assert fastvid_segments(frames, 1, 0.9) == [0, 0, 1, 1, 1, 2]
    assert fastvid_segments(frames, 2, -1) == [0, 0, 0, 0, 0, 1]  # the widest step
    assert fastvid_segments(frames, 3, -1) == [0, 0, 1, 1, 1, 2]
    assert fastvid_segments(frames, 9, -1) == [0, 1, 2, 3, 4, 5]
    assert fastvid_segments(frames[:1], 8, 0.9) == [0]


def test_shares_by_hand():
    assert running_shares(10, [1, 1, 1]) == [3, 3, 4]
    assert running_shares(2, [3, 1, 4]) == [0, 1, 1]
    assert running_shares(0, [1, 1]) == [0, 0]


def test_peaks_by_hand():
    """On a line, divided by √1: 0, 1, 2 and 10. Densities exp(−(0 + 1 + 4 + 100) / 4) and so on; the middle is the densest."""
    peaks = fastvid_peaks([[0.0], [1.0], [2.0], [10.0]])
    density = [torch.tensor(-d / 4).exp().item() for d in (105, 83, 69, 245)]
    assert peaks == pytest.approx([density[0] * 1, density[1] * 1, density[2] * 10, density[3] * 8])


def test_fastvid_by_hand():
    """Two frames of two alike tokens, one segment: the anchors are in the last frame, and each becomes 0.6 of itself and 0.4 of
    the mean of itself and its like in the frame before."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    kept, features, into = fastvid(x, range(4), 2, 2, least=1, threshold=-1)
    assert kept == [2, 3]
    close(features, torch.tensor([[0.6 * 3 + 0.4 * 2, 0.0], [0.0, 0.6 * 5 + 0.4 * 3]]))
    assert into == [2, 3, 2, 3]
    kept, features, into = fastvid(x, range(4), 2, 2, least=1, threshold=-1, own=0.0)
    close(features, torch.tensor([[3 / 3 + 2 / 3 * 2, 0.0], [0.0, 5 / 3 + 2 / 3 * 3]]))
    # Each frame a segment with one anchor: nothing is merged over time
    kept, features, into = fastvid(x, range(4), 2, 2)
    assert [token // 2 for token in kept] == [0, 1]
    # Fewer tokens than segments: a segment without an anchor is dropped
    kept, _, into = fastvid(x, range(4), 2, 1)
    assert kept == [2]
    assert into == [-1, -1, 2, 2]
    # One salient token of the two: it is neither merged nor an anchor
    kept, features, into = fastvid(x, range(4), 2, 2, [0.1, 0.1, 0.1, 0.7], least=1, threshold=-1, context=0.5)
    assert kept == [2, 3]
    assert into == [2, 2, 2, 3]
    close(features[1], x[3])


@videos
@forms
def test_fastvid(form, seed, frames, cells, gone, keep):
    see = view(seed, frames, cells, gone)
    choice = vp.FastVID(**form).select(see, keep)
    for image in range(see.images):
        kept, features, into = looped(see, image, keep, **form)
        assert choice.index[image].tolist() == kept
        if form.get("context") == 0:
            assert choice.features is None
            continue
        close(choice.features[image], features)
        assert choice.joined[image].tolist() == into


@pytest.mark.parametrize("keep", [2, 9, 24, 40])
def test_alike_frames_are_merged(keep):
    """Two scenes of four frames each: two segments, whatever the least number; every token joins one of its own scene."""
    see = view(1, 8, 6, 0)
    scenes = torch.randn(3, 2, 1, 6, 16, generator=torch.Generator().manual_seed(2)).expand(-1, -1, 4, -1, -1).flatten(1, 3)
    see = replaced(see, features=scenes + 0.1 * see.features)
    method = vp.FastVID(segments=1)
    choice = method.select(see, keep)
    for image in range(3):
        kept, features, into = looped(see, image, keep, segments=1)
        assert choice.index[image].tolist() == kept
        close(choice.features[image], features)
        assert choice.joined[image].tolist() == into
        assert all(token // 24 == home // 24 for token, home in enumerate(into))


def test_fastvid_with_ties():
    """Features along a few axes, many of them equal: the lower index everywhere."""
    see = replaced(view(0, 6, 8, 0), features=hots(3, 48, width=8))
    for form in ({"segments": 2, "threshold": -1.0}, {"segments": 3, "threshold": -1.0, "context": 0.5}):
        for keep in (5, 12, 30):
            choice = vp.FastVID(**form).select(see, keep)
            for image in range(3):
                kept, features, into = looped(see, image, keep, **form)
                assert choice.index[image].tolist() == kept
                close(choice.features[image], features)
                assert choice.joined[image].tolist() == into


@videos
def test_videos_do_not_meet(seed, frames, cells, gone, keep):
    see = view(seed, frames, cells, gone)
    together = vp.FastVID(segments=2).select(see, keep)
    for image in range(see.images):
        single = vp.FastVID(segments=2).select(alone(see, image), keep)
        assert torch.equal(together.index[image], single.index[0])
        close(together.features[image], single.features[0])


def test_only_before_the_language_model():
    with pytest.raises(
        vp.UsageError, match=r"fastvid merges what enters the language model: its only stage is layer=0, found 3"
    ):
        vp.FastVID(layer=3, fraction=0.2).plan(TowerFacts())
    with pytest.raises(vp.UsageError, match="needs the attention of the vision tower's CLS token"):
        vp.FastVID(context=0.4).plan(TowerFacts())
    assert vp.FastVID().plan(TowerFacts()).stages[0].layer == 0
