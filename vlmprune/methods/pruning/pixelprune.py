"""PixelPrune. Wang et al., arXiv:2604.00886: patches that their neighbours predict are dropped before the vision tower.

A token stands for one patch, or for one square of patches that the tower merges (Qwen-VL: 2 × 2). Row by row, from the top
left, with x the pixels of a token, τ the tolerance, and δ(a, b) = max |a − b| over all values:

    p = the left neighbour's y                 in the first row
        the upper neighbour's y                in the first column
        upper    if δ(corner, left) ≤ τ and δ(corner, upper) > τ        a vertical edge runs through
        left     otherwise                                               (corner: the upper left neighbour's y)

    δ(x, p) ≤ τ    the token is predicted:  dropped, y = p
    otherwise      it is kept,              y = x

The first token is kept. y is what a reader of the kept tokens would put at a place, so that errors do not add up: no pixel that
is dropped differs from its prediction by more than τ. With τ = 0, pixels are duplicates, and nothing of the picture is lost.

This is our reading of the paper's abstract and of the rule that the authors' public code states (the edge rule is LOCO-I's, of
JPEG-LS); the paper's own equations could not be read. The paper has no budget. Here it is an upper limit: where more tokens are
kept, those with the largest δ(x, p) stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.device import on_device, on_host
from vlmprune.methods.base import Choice, Pruner, top
from vlmprune.methods.parameters import number
from vlmprune.schedule import Budget, Schedule, Stage
from vlmprune.view import View


@dataclass(frozen=True, kw_only=True)
class PixelPrune(Pruner):
    """Drop patches whose pixels repeat those of a neighbour.

    Args:
        tolerance: τ, in units of the processor's normalised pixels (Qwen3-VL: −1 to 1). 0 drops exact duplicates only.
    """

    name = "pixelprune"
    paper = "arXiv:2604.00886"
    note = "an upper limit of tokens beside the tolerance is ours"
    needs = frozenset({"pixels"})
    default = Schedule((Stage(0, Budget(fraction=1.0), "pixels"),))
    chooses = "keeps what its neighbours' pixels do not predict"

    tolerance: float = number(0.0, low=0, high=2)

    @property
    def adaptive(self) -> bool:
        return True

    def scores(self, see: View) -> Tensor:
        """`[image, visual]` δ(x, p), infinite for the first token."""
        assert see.grid is not None
        tokens = see.pixels.unflatten(1, see.grid)  # [image, row, column, value]
        error = _of_copies(tokens) if self.tolerance == 0 else _of_predicted(tokens, self.tolerance)
        return error.flatten(1)

    def select(self, see: View, keep: int) -> Choice:
        error = self.scores(see)
        kept = torch.zeros_like(error, dtype=torch.bool).scatter(1, top(error, keep), True) & ~(error <= self.tolerance)
        return Choice([on_device(row.nonzero()[0], error.device) for row in on_host(kept)])


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """δ over the last axis, in fp32."""
    return (a.float() - b.float()).abs().amax(dim=-1)


def _of_copies(x: Tensor) -> Tensor:
    """`[image, row, column]` δ(x, p) for τ = 0, where y = x everywhere: all tokens at once."""
    error = x.new_full(x.shape[:3], torch.inf, dtype=torch.float32)
    error[:, 0, 1:] = _differ(x[:, 0, 1:], x[:, 0, :-1])
    error[:, 1:, 0] = _differ(x[:, 1:, 0], x[:, :-1, 0])
    if min(x.shape[1:3]) > 1:
        to_left, to_upper = _differ(x[:, :, 1:], x[:, :, :-1]), _differ(x[:, 1:], x[:, :-1])
        # δ(corner, left) is the left column's step down, δ(corner, upper) the upper row's step to the right.
        edge = (to_upper[:, :, :-1] == 0) & (to_left[:, :-1] > 0)
        error[:, 1:, 1:] = torch.where(edge, to_upper[:, :, 1:], to_left[:, 1:])
    return error


def _of_predicted(x: Tensor, tolerance: float) -> Tensor:
    """`[image, row, column]` δ(x, p). Tokens of one diagonal do not depend on each other: they are decided at once."""
    images, rows, columns = x.shape[:3]
    image = torch.arange(images, device=x.device)[:, None]
    flat = x.flatten(1, 2)
    source = torch.arange(rows * columns, device=x.device).expand(images, -1).clone()  # the kept token whose pixels are y
    error = x.new_full((images, rows * columns), torch.inf, dtype=torch.float32)
    for diagonal in range(1, rows + columns - 1):
        row = torch.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1), device=x.device)
        column = diagonal - row
        here = row * columns + column
        left = source[:, here - (column > 0).long()]
        upper = source[:, here - columns * (row > 0).long()]
        corner = source[:, (row - 1).clamp_min(0) * columns + (column - 1).clamp_min(0)]
        y = flat[image, corner]
        edge = (_differ(y, flat[image, left]) <= tolerance) & (_differ(y, flat[image, upper]) > tolerance)
        predicted = torch.where((column == 0) | ((row > 0) & edge), upper, left)
        error[:, here] = off = _differ(flat[:, here], flat[image, predicted])
        source[:, here] = torch.where(off <= tolerance, predicted, here)
    return error.view(images, rows, columns)
