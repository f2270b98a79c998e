"""PixelPrune, token by token: what a reader of the kept tokens knows, and what it would guess next."""

from __future__ import annotations

from collections.abc import Sequence

Pixels = Sequence[float]


def differ(a: Pixels, b: Pixels) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def pixelprune(
    rows: int, columns: int, tokens: Sequence[Pixels], tolerance: float, limit: int | None = None
) -> tuple[list[int], list[Pixels]]:
    """Kept ids, and the pixels that a reader has in the end at every place (before the limit drops any).

    Args:
        tokens: the pixels of each, row by row.
        limit: the most that may be kept.
    """
    known: list[Pixels] = []
    kept: list[tuple[float, int]] = []
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        if place == 0:
            off, guess = float("inf"), tokens[0]
        elif row == 0:
            guess = known[place - 1]
        elif column == 0:
            guess = known[place - columns]
        else:
            left, upper, corner = known[place - 1], known[place - columns], known[place - columns - 1]
            edge = differ(corner, left) <= tolerance and differ(corner, upper) > tolerance
            guess = upper if edge else left
        if place:
            off = differ(tokens[place], guess)
        if off > tolerance:
            kept.append((off, place))
            known.append(tokens[place])
        else:
            known.append(guess)
    if limit is not None and len(kept) > limit:
        kept = sorted(kept, key=lambda one: (-one[0], one[1]))[:limit]
    return sorted(place for _, place in kept), known
