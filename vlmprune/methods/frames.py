"""What methods share that compare the frames of a video. A picture is a video of one frame.

All frames of a video have the same number of tokens; earlier stages may have dropped some of them. A separator at the end of
the video (LLaVA-OneVision) is no candidate, and in no view.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmprune.view import View


def cells(see: View) -> tuple[Tensor, Tensor]:
    """Of each token, its frame and its place in that frame, in raster order: `[image, visual]` each."""
    return see.frame, see.position - see.frame * (see.original // see.frames)


def by_frame(see: View, x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of tokens `[image, visual, …]` as `[image, frame, cell, …]`, 0 where a token was dropped; and where one is left,
    `[image, frame, cell]` bool."""
    shape = (see.images, see.frames, see.original // see.frames)
    tokens = shape[1] * shape[2]
    if see.visual == tokens:
        return x.reshape(*shape, *x.shape[2:]), torch.ones(shape, dtype=torch.bool, device=x.device)
    index = see.position.to(x.device)
    there = torch.zeros(see.images, tokens, dtype=torch.bool, device=x.device).scatter(1, index, True)
    wide = index.view(*index.shape, *[1] * (x.ndim - 2)).expand(x.shape)
    grid = x.new_zeros(see.images, tokens, *x.shape[2:]).scatter(1, wide, x)
    return grid.view(*shape, *x.shape[2:]), there.view(shape)


def by_token(see: View, x: Tensor) -> Tensor:
    """`[image, visual]` of the tokens that are left, from `[image, frame, cell]`."""
    return x.flatten(1).gather(1, see.position.to(x.device))


def first_of_each(score: Tensor, count: Tensor, there: Tensor) -> Tensor:
    """`[image, frame, cell]` bool, True for the `count` `[image, frame]` highest scores of every frame; ties go to the lower
    index.

    Args:
        score: `[image, frame, cell]`.
        there: the same, bool, True where a token is left.
    """
    rank = score.float().masked_fill(~there, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < count[..., None]) & there


def exactly(inside: Tensor, score: Tensor, keep: int) -> Tensor:
    """Rising indices `[image, keep]`: the highest scores of the tokens that are `inside`, then the highest of the others.

    Args:
        inside, score: `[image, visual]`, bool and numbers; ties go to the lower index.
    """
    ranked = score.float().argsort(dim=-1, descending=True, stable=True)
    order = inside.gather(1, ranked).to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return ranked.gather(1, order)[:, :keep].sort(dim=-1).values


def running_shares(total: int, weight: Tensor) -> Tensor:
    """`[image, part]` shares of a total in proportion to weights: running sums are rounded down, so that the sum is exact."""
    sums = total * weight.cumsum(dim=-1) // weight.sum(dim=-1, keepdim=True)
    return pad(sums, (1, 0)).diff(dim=-1)
