"""DART: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from methods.comparing import hots, pictures, random, select, sizes, unit_vectors
from methods.loops.dart import dart, dart_lightcompress_count, dart_official_count
from methods.views import random_view, replaced

import vlmprune as vp


def test_dart_counts_of_other_codes():
    assert [dart_official_count(keep) for keep in (64, 128, 192)] == [68, 132, 196]
    assert dart_lightcompress_count(576, 0.778) == 124  # which its script, too, calls 128


def test_dart_by_hand():
    # keep <= 4: the visual pivots alone, and equal norms go to the lower index
    keys = torch.tensor([[[-9.0], [1.0], [1.0], [1.0], [1.0]]])
    angles = unit_vectors(0, 10, 170, 90, 95)
    assert dart(keys, torch.zeros(1, 0, 1), angles, torch.zeros(0, 2), 1) == [0]
    assert dart(keys, torch.zeros(1, 0, 1), angles, torch.zeros(0, 2), 3) == [0, 1, 2]
    assert dart(keys, torch.zeros(1, 0, 1), angles, torch.zeros(0, 2), 5) == [0, 1, 2, 3, 4]


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
    assert dart(keys, texts, visual, text, 4 + 8 * 2 + remainder) == sorted(expected)


def test_dart_keeps_exactly_what_is_asked_for():
    for n, t in ((40, 6), (40, 2), (5, 9), (2, 1)):
        keys, texts, visual, text = random(2, n, 3), random(2, t, 3, seed=1), random(n, 5, seed=2), random(t, 5, seed=3)
        for keep in range(1, n + 1):
            kept = dart(keys, texts, visual, text, keep)
            assert len(kept) == keep
            assert kept == sorted(set(kept))


@sizes
def test_dart(seed, visual, keep, text):
    see = random_view(seed, visual=visual, text=text)
    expected = [dart(own.keys, own.text_keys, own.normed_features, own.normed_text_features, keep) for own in pictures(see)]
    assert select(vp.DART(), see, keep)[0] == expected


def test_dart_with_ties():
    """Equal norms and equal cosines: the lower index."""
    see = random_view(visual=24, text=(6, 3, 2))
    whole = {name: see.probes[name].round().clamp(-1, 1) for name in ("keys", "text_keys")}
    valid = see.text_valid[..., None]
    see = replaced(see, **whole, normed_features=hots(3, 24), normed_text_features=hots(3, 6, seed=1) * valid)
    for keep in (2, 9, 17):
        expected = [dart(own.keys, own.text_keys, own.normed_features, own.normed_text_features, keep) for own in pictures(see)]
        assert select(vp.DART(), see, keep)[0] == expected


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (64, dart_official_count(64)),
        (128, dart_official_count(128)),
        (192, dart_official_count(192)),
        (128, dart_lightcompress_count(576, 0.778)),
    ],
    ids=["official-64", "official-128", "official-192", "lightcompress-128"],
)
def test_dart_keeps_what_it_says(asked, kept):
    """The official code keeps 4 + 8·⌊K / 8⌋, so 68, 132 and 196 for 64, 128 and 192; LightCompress's port keeps, for 128,
    4 + 8·⌊576 · 0.222 / 8⌋ = 124. Here it is exactly K; where K is what they keep, all agree, and every pivot adds as many."""
    assert (asked, kept) in [(64, 68), (128, 132), (192, 196), (128, 124)]
    assert vp.DART().stages[0].budget.resolve(576) == 128
    see = random_view(images=1, visual=576, text=(9,))
    assert vp.DART().select(see, asked).shape == (1, asked)
    own = {name: see.probes[name][0] for name in vp.DART.needs}
    same = dart(own["keys"], own["text_keys"], own["normed_features"], own["normed_text_features"], kept)
    assert vp.DART().select(see, kept).tolist() == [same]


def test_dart_docstring_gives_the_counts():
    """The counts of the two codes stand in the docstring as they are."""
    text = " ".join(inspect.getmodule(vp.DART).__doc__.split())
    official = ", ".join(f"{dart_official_count(keep)} for {keep}" for keep in (64, 128, 192))
    assert f"4 + 8·⌊K / 8⌋: {official}" in text
    assert f"{dart_lightcompress_count(576, 0.778)} of 576 at 0.222" in text
