"""The selections of `reference.py` on a CPU, where a product of matrices costs far less than as many products with a vector.

Max-min        the first pick compares all pairs. Each pair is computed once and used for both of its tokens, which is half of
               the product of the features with themselves. A matrix that fits into `MOST_BYTES` is kept, and every further
               pick reads its row.
Determinants   need the rows of picks only, and so does max-min where the matrix does not fit. The row of a pick is computed
               together with those of the best candidates after it (`AHEAD`): one read of the features for all of them, and
               most of them are picked soon. The part that earlier picks explain is subtracted from all of these rows at once.

benchmarks/select_diverse.py measures both. Picks can differ from the reference's where two tokens differ by rounding only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.kernels.dispatch import in_fp32, wide
from vlmprune.kernels.select_diverse.reference import RANK

SHORTEST = 1e-12
"""A shorter token counts as one of this length, as in `torch.nn.functional.normalize`."""

MOST_BYTES = 64 << 20
"""Of similarities that are kept: all pairs of 4096 tokens in fp32."""

CHUNK = 256
"""Rows of a block of all pairs."""

AHEAD = 64
"""The most rows that are computed together, for later picks."""


@in_fp32
def greedy_order(features: Tensor, keep: int) -> Tensor:
    """`reference.greedy_order`, a picture at a time."""
    unit = normalize(features.detach().to(wide(features)), dim=-1)
    order = torch.empty(len(unit), keep, dtype=torch.long)
    for picture, own in zip(unit, order if keep else (), strict=False):
        own.copy_(torch.tensor(_greedy(picture, keep)))
    return order


def _greedy(unit: Tensor, keep: int) -> list[int]:
    likeness = _all_pairs(unit) if len(unit) ** 2 * unit.element_size() <= MOST_BYTES else None
    nearest = _nearest_other(unit) if likeness is None else 1.0 - likeness.amax(dim=-1)
    ahead = _Ahead(unit)
    standing = nearest
    apart = torch.full_like(nearest, torch.inf)  # distance to the nearest selected token; −inf once taken
    picks = []
    for left in range(keep, 0, -1):
        pick = int(standing.argmax())
        picks.append(pick)
        row = ahead.row(pick, standing, left) if likeness is None else likeness[pick]
        torch.minimum(apart, 1.0 - row, out=apart)
        apart[pick] = -torch.inf
        standing = apart
    return picks


def _all_pairs(unit: Tensor) -> Tensor:
    """`[visual, visual]` similarities; −inf of a token with itself."""
    likeness = unit.new_empty(len(unit), len(unit))
    for start in range(0, len(unit), CHUNK):
        here, later = slice(start, start + CHUNK), slice(start + CHUNK, None)
        torch.mm(unit[here], unit[start:].t(), out=likeness[here, start:])
        likeness[later, here] = likeness[here, later].t()
    likeness.fill_diagonal_(-torch.inf)
    return likeness


def _nearest_other(unit: Tensor) -> Tensor:
    """`[visual]` distance of every token to the nearest other one."""
    likeness = unit.new_full((len(unit),), -torch.inf)  # the greatest
    for start in range(0, len(unit), CHUNK):
        block = unit[start : start + CHUNK] @ unit[start:].t()
        block.fill_diagonal_(-torch.inf)
        for tokens, greatest in ((likeness[start : start + CHUNK], block.amax(dim=1)), (likeness[start:], block.amax(dim=0))):
            torch.maximum(tokens, greatest, out=tokens)
    return 1.0 - likeness


class _Ahead:
    """Rows of the similarity matrix `[visual, visual]`, computed before they are needed.

    Args:
        unit: `[visual, dim]`.
    """

    def __init__(self, unit: Tensor) -> None:
        self._unit = unit
        self._most = max(MOST_BYTES // (len(unit) * unit.element_size()), AHEAD)
        self._rows: dict[int, Tensor] = {}
        self._computed = 0

    def __contains__(self, token: int) -> bool:
        return token in self._rows

    def row(self, pick: int, standing: Tensor, left: int) -> Tensor:
        """`[visual]` similarities to a pick; each pick is asked for once.

        Args:
            standing: `[visual]` values by which the next picks are chosen, greatest first.
            left: number of picks that are still to be made.
        """
        if pick not in self._rows:
            self.compute(pick, standing, left)
        return self._rows.pop(pick)

    def compute(self, pick: int, standing: Tensor, left: int) -> tuple[list[int], Tensor]:
        """Compute the rows of a pick and of the best candidates after it.

        Returns:
            Their indices, and their rows `[token, visual]`, which the caller may change in place.
        """
        if self._computed + AHEAD > self._most:
            self._rows.clear()
            self._computed = 0
        most = min(AHEAD, left, len(standing))
        next_ones = standing.topk(most).indices.tolist()
        tokens = [pick, *(token for token in next_ones if token != pick and token not in self._rows)][:most]
        rows = self._unit[tokens] @ self._unit.t()
        self._rows.update(zip(tokens, rows, strict=True))
        self._computed += len(tokens)
        return tokens, rows


@in_fp32
def determinant_order(features: Tensor, weight: Tensor, keep: int) -> Tensor:
    """`reference.determinant_order`, a picture at a time."""
    order = torch.empty(len(features), keep, dtype=torch.long)
    for picture, weights, own in zip(features.detach(), weight.detach(), order if keep else (), strict=False):
        own.copy_(torch.tensor(_determinants(picture.to(wide(picture)), weights.to(wide(picture)), keep)))
    return order


def _determinants(features: Tensor, weight: Tensor, keep: int) -> list[int]:
    length = torch.linalg.vector_norm(features, dim=-1)
    scale = weight / length.clamp_min(SHORTEST)
    unit = features * scale[:, None]
    gain = (length * scale).square()  # squared distance of each token to the span of the selected ones; negative once taken
    rounding = RANK * gain  # −∞ once taken
    factor = unit.new_zeros(keep, len(unit))
    ahead, since = _Ahead(unit), {}  # since: how many picks are already subtracted from a row
    picks: list[int] = []
    for step in range(keep):
        pick = int(gain.argmax())
        picks.append(pick)
        new = math.sqrt(max(float(gain[pick]), 0.0))
        if new == 0:  # the token adds nothing
            gain[pick] = -1
            rounding[pick] = -torch.inf
            continue
        if pick not in ahead:
            tokens, rows = ahead.compute(pick, gain, keep - step)
            rows.addmm_(factor[:step, tokens].t(), factor[:step], alpha=-1)
            since.update(dict.fromkeys(tokens, step))
        row, first = ahead.row(pick, gain, keep - step), since[pick]
        if first < step:
            row = torch.addmv(row, factor[first:step].t(), factor[first:step, pick], alpha=-1)
        torch.div(row, new, out=factor[step])
        gain.addcmul_(factor[step], factor[step], value=-1)
        gain = torch.where(gain > rounding, gain, 0)
        gain[pick] = -1
        rounding[pick] = -torch.inf
    return picks
