"""MustDrop (arXiv:2411.10803), loop by loop."""

from __future__ import annotations

import math

from methods.loops.plain import cosine, floats, mean, mean_of, ranking, top


def mustdrop_windows(rows: int, columns: int) -> list:
    """The raster ids of every 3x3 window's nine patches, windows in raster order (code: asserts divisibility)."""
    if rows % 3 or columns % 3:
        raise ValueError(f"a grid of {rows} x {columns} does not divide into 3 x 3 windows")
    windows = []
    for top_row in range(0, rows, 3):
        for left in range(0, columns, 3):
            windows.append([(top_row + y) * columns + left + x for y in range(3) for x in range(3)])
    return windows


def mustdrop_window_scores(hidden, rows: int, columns: int) -> list:
    """Mean of the 72 off-diagonal pairwise cosines of each window (paper and code)."""
    hidden = floats(hidden)
    scores = []
    for window in mustdrop_windows(rows, columns):
        scores.append(mean([cosine(hidden[i], hidden[j]) for i in window for j in window if i != j]))
    return scores


def mustdrop_merged(hidden, rows: int, columns: int, merged: list) -> tuple[list, dict]:
    hidden, windows = floats(hidden), mustdrop_windows(rows, columns)
    return merged, {window: mean_of([hidden[patch] for patch in windows[window]]) for window in merged}


def mustdrop_merge(hidden, rows: int, columns: int, threshold: float = 0.8) -> tuple[list, dict]:
    """Windows to merge and the tokens they become (MustDrop stage 1): ids in raster order, {id: mean}.

    `hidden` [patches, dim] leaves the tower's first block.  Paper and code: windows with a score >= threshold, each replaced
    by the plain mean of its nine patches.  Ours: this picture's own number of windows (the code takes the batch's minimum),
    listed in raster order (the code lists them by score).
    """
    scores = mustdrop_window_scores(hidden, rows, columns)
    return mustdrop_merged(hidden, rows, columns, [w for w, score in enumerate(scores) if score >= threshold])


def mustdrop_merge_count(hidden, rows: int, columns: int, windows: int) -> tuple[list, dict]:
    """As `mustdrop_merge`, but merging exactly the `windows` most similar windows.

    Ours, after the fixed count (`fix_r`) of LightCompress's re-implementation.
    """
    return mustdrop_merged(hidden, rows, columns, top(mustdrop_window_scores(hidden, rows, columns), windows))


def mustdrop_key_set(cls_attention) -> list:
    """Tokens that the later stages must keep: the top ceil(0.08 P') by CLS attention (code).

    `cls_attention`: mean over heads of the last block's CLS row (block 23 of 24), one number per token left by stage 1.
    """
    cls_attention = floats(cls_attention)
    return top(cls_attention, math.ceil(0.08 * len(cls_attention)))


def mustdrop_filter(attention, key_set: list, g: float, u: float) -> list:
    """Tokens kept by the dual attention filter (code).

    `attention` [text, visual]: mean over heads, all text after the image.  Token j goes iff its column sum is < g times the
    sum of all columns AND its largest entry is < u; the key set stays in any case.
    """
    attention = floats(attention)
    columns = [list(column) for column in zip(*attention, strict=True)]
    everything = sum(sum(column) for column in columns)
    kept = set(key_set)
    for j, column in enumerate(columns):
        if not (sum(column) < g * everything and max(column) < u):
            kept.add(j)
    return sorted(kept)


def mustdrop_top(attention, key_set: list, keep: int) -> list:
    """Exactly `keep` tokens: the key set, then the best by column sum (the target-count mode is ours).

    A key set larger than `keep` is itself cut to its best by column sum.
    """
    attention = floats(attention)
    sums = [sum(column) for column in zip(*attention, strict=True)]
    forced = [j for j in ranking(sums) if j in set(key_set)]
    others = [j for j in ranking(sums) if j not in set(key_set)]
    return sorted((forced + others)[:keep])
