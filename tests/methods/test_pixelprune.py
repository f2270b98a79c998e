"""PixelPrune: the loops of its rule by hand, and the method against them; what is lost of a picture, and what is not."""

from __future__ import annotations

import pytest
import torch
from methods.comparing import select
from methods.loops.pixelprune import differ, pixelprune
from methods.views import blurred

import vlmprune as vp
from vlmprune.methods.pruning import pixelprune as module
from vlmprune.view import View


def view(pixels: torch.Tensor, rows: int, columns: int) -> View:
    images, visual = pixels.shape[:2]
    return View(0, visual, torch.arange(visual).expand(images, -1), {"pixels": pixels}, entered=visual, grid=(rows, columns))


def by_hand(pixels: torch.Tensor, rows: int, columns: int, tolerance: float, limit: int) -> list[list[int]]:
    return [pixelprune(rows, columns, tokens.tolist(), tolerance, limit)[0] for tokens in pixels.double()]


def whole(rows: int, columns: int, cells: str) -> torch.Tensor:
    """One picture of one value per token, from its digits."""
    return torch.tensor([float(cell) for cell in cells.replace(" ", "")]).view(1, rows * columns, 1).expand(-1, -1, 3)


@pytest.mark.parametrize(
    ("rows", "columns", "cells", "kept"),
    [
        (2, 3, "000 000", [0]),  # a flat picture
        (2, 3, "012 345", [0, 1, 2, 3, 4, 5]),  # nothing repeats
        (1, 5, "00110", [0, 2, 4]),  # one row: the left neighbour
        (4, 1, "0 1 1 0", [0, 1, 3]),  # one column: the upper neighbour
        (3, 4, "0011 0011 0011", [0, 2]),  # a vertical edge costs one token, in its first row
        (3, 3, "000 111 111", [0, 3]),  # a horizontal edge likewise
        (3, 4, "0000 0110 0000", [0, 5, 7, 9]),  # a box: where it begins, what is behind it, and what is below it
    ],
)
def test_pictures_by_hand(rows, columns, cells, kept):
    """Red: the edge rule, or which neighbour predicts in the first row and column."""
    pixels = whole(rows, columns, cells)
    for tolerance in (0.0, 0.25):
        assert by_hand(pixels, rows, columns, tolerance, rows * columns) == [kept]
        assert select(vp.PixelPrune(tolerance=tolerance), view(pixels, rows, columns), rows * columns)[0] == [kept]


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.5, 0.75, 2.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 7), (6, 1), (4, 5), (7, 3), (9, 9)])
def test_equals_the_loops(rows, columns, tolerance):
    """Red: tokens of a diagonal depend on each other, or values of an earlier prediction are lost."""
    draw = torch.Generator().manual_seed(rows)
    flat = blurred(draw, 3, rows * columns)
    noisy = ((flat + 0.1 * torch.rand(flat.shape, generator=draw)) * 64).round() / 64  # exact in fp32 and in double
    for pixels in (flat, noisy, (noisy * 8).round() / 8):
        see = view(pixels, rows, columns)
        for limit in (1, 4, rows * columns):
            expected = by_hand(pixels, rows, columns, tolerance, limit)
            assert select(vp.PixelPrune(tolerance=tolerance), see, limit)[0] == expected


def test_duplicates_at_once_and_one_after_the_other_are_the_same():
    """With τ = 0 all tokens are compared at once. Red: that short way is another rule."""
    pixels = blurred(torch.Generator().manual_seed(3), 4, 56).unflatten(1, (7, 8))
    assert torch.equal(module._of_copies(pixels), module._of_predicted(pixels, 0.0))


@pytest.mark.parametrize("tolerance", [0.0, 0.3])
def test_a_reader_of_the_kept_tokens_knows_the_picture(tolerance):
    """Red: errors add up from token to token, or something is dropped that cannot be told from what is kept."""
    draw = torch.Generator().manual_seed(5)
    pixels = blurred(draw, 1, 48) + 0.05 * torch.randn(1, 48, 12, generator=draw) * (tolerance > 0)
    chosen = select(vp.PixelPrune(tolerance=tolerance), view(pixels, 6, 8), 48)[0][0]
    kept, known = pixelprune(6, 8, pixels[0].tolist(), tolerance)
    assert chosen == kept
    assert 0 < len(kept) < 48
    assert all(differ(one, guess) <= tolerance for one, guess in zip(pixels[0].tolist(), known, strict=True))


def test_a_limit_keeps_what_is_predicted_worst():
    pixels = whole(1, 5, "01 7 3 3")
    see = view(pixels, 1, 5)
    assert select(vp.PixelPrune(), see, 5)[0] == [[0, 1, 2, 3]]
    assert select(vp.PixelPrune(), see, 3)[0] == [[0, 2, 3]]
    assert select(vp.PixelPrune(), see, 1)[0] == [[0]]


@pytest.mark.parametrize("tolerance", [-0.1, 2.5, float("nan"), "much", True])
def test_a_tolerance_out_of_range_is_refused(tolerance):
    with pytest.raises(vp.UsageError, match=r"pixelprune: tolerance must be a number in \[0, 2\]"):
        vp.PixelPrune(tolerance=tolerance)
