"""AdaptInfer: the loops of its paper by hand, and the method against them."""

from __future__ import annotations

import pytest
import torch
from methods.comparing import pictures, quantised, select, sizes
from methods.loops.adaptinfer import adaptinfer, change_point
from methods.views import random_view

import vlmprune as vp
from vlmprune.view import View


def test_change_point():
    assert change_point([0.0, 0.0, 0.0, 5.0, 5.0]) == 2
    assert change_point([9.0, 0.0, 0.0, 0.0]) == 0
    assert change_point([1.0, 1.0, 1.0]) == 0  # all splits are alike
    assert change_point(torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])) == 1


@sizes
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_adaptinfer(ties, seed, visual, keep, text):
    see = random_view(seed, visual=visual, text=text)
    see = quantised(see, 2) if ties else see
    expected = [adaptinfer(own.attention_among_text, own.attention_from_text, keep) for own in pictures(see)]
    assert select(vp.AdaptInfer(), see, keep)[0] == expected


ATTENTION = [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0.2, 0.3, 0.5, 0, 0], [0.1, 0.4, 0.1, 0.4, 0], [0.1, 0.1, 0.3, 0.2, 0.3]]


def test_adaptinfer_scores_by_hand():
    """One head, rows of system, two visual and two text tokens: w = [.6, .5], s = [.29, .21]."""
    attention = torch.tensor(ATTENTION)[None, None]
    among = attention[..., 3:, 3:]
    see = View(2, 2, torch.tensor([[0, 1]]), {"attention_from_text": attention[..., 3:, 1:3], "attention_among_text": among})
    assert torch.allclose(vp.AdaptInfer().score(see), torch.tensor([[0.29, 0.21]]))
    see.probes["attention_from_text"] = torch.eye(2)[None, None]  # each visual token seen by one word only: its weight
    assert torch.allclose(vp.AdaptInfer().score(see), torch.tensor([[0.6, 0.5]]))


def test_other_presets_are_refused():
    with pytest.raises(vp.UsageError, match="unknown preset of adaptinfer 'llava-65': did you mean 'llava-64'"):
        vp.AdaptInfer(preset="llava-65")
