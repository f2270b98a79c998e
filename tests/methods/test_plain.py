"""The arithmetic that all loops share."""

from __future__ import annotations

import torch
from methods.comparing import close
from methods.loops import plain

from vlmprune.live.rows import Reduction
from vlmprune.methods import merging
from vlmprune.methods.base import alive_top
from vlmprune.methods.base import top as best


def test_ties_go_to_the_lower_index():
    assert plain.ranking([1.0, 3.0, 3.0, 2.0]) == [1, 2, 3, 0]
    assert plain.top([1.0, 3.0, 2.0, 3.0, 3.0], 2) == [1, 3]


def test_lists_keep_their_precision():
    assert plain.floats([[0.1], [0.2]]) == [[0.1], [0.2]]


def test_small_helpers():
    """`top`, `alive_top`, and the pieces of merging, each by a loop."""
    draw = torch.Generator().manual_seed(4)
    score = (torch.randn(3, 15, generator=draw) * 2).round() / 2
    assert best(score, 6).tolist() == [plain.top(row, 6) for row in score.tolist()]
    assert best(score, 0).shape == (3, 0)
    valid = torch.rand(3, 15, generator=draw) > 0.3
    found = alive_top(score, torch.tensor([1, 4, 9]), valid)
    for row, count, real, stays in zip(score.tolist(), (1, 4, 9), valid.tolist(), found, strict=True):
        there = [j for j in range(15) if real[j]]
        assert stays.nonzero()[:, 0].tolist() == [there[i] for i in plain.top([row[j] for j in there], count)]
    chosen = torch.tensor([[1, 4], [0, 14], [7, 8]])
    assert merging.others(chosen, 15).tolist() == [[j for j in range(15) if j not in row] for row in chosen.tolist()]
    x, centres = torch.randn(3, 15, 4, generator=draw), torch.randn(3, 5, 4, generator=draw)
    home = merging.nearest(x, centres)
    for image in range(3):
        for token in range(15):
            likeness = [plain.cosine(x[image, token].tolist(), c) for c in centres[image].tolist()]
            assert home[image, token] == plain.ranking(likeness)[0]
    total, count = merging.gathered(x, home, 5)
    for image in range(3):
        for centre in range(5):
            members = [x[image, t] for t in range(15) if home[image, t] == centre]
            assert count[image, centre, 0] == len(members)
            close(total[image, centre], sum(members, torch.zeros(4)))


def test_a_reduction_is_its_kernel():
    """The one gather and scatter of the library: rows that are kept go on and come back to their places."""
    alive = torch.tensor([[True, False, True, True], [False, False, True, False]])
    reduction = Reduction.keeping(alive)
    assert not reduction.dense
    assert reduction.valid.tolist() == [[True, True, True], [False, False, True]]
    x = torch.arange(8.0).view(2, 4, 1)
    assert reduction.gather(x)[..., 0].tolist() == [[0.0, 2.0, 3.0], [0.0, 0.0, 6.0]]
    assert reduction.scatter(reduction.gather(x), 4)[..., 0].tolist() == [[0.0, 0.0, 2.0, 3.0], [0.0, 0.0, 6.0, 0.0]]
