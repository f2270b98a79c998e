"""VScan (arXiv:2505.22654), loop by loop."""

from __future__ import annotations

import torch
from methods.loops.plain import cosine, floats, mean_of, ranking, top


def vscan(cls_local, cls_global, features, rows: int, columns: int, keep: int) -> tuple[list, torch.Tensor]:
    """VScan's stage before the language model (code): kept ids and their features [keep, d] after merging.

    `cls_local` [n] and `cls_global` [n]: head-mean CLS rows of block 5 and of block -2; `features` [n, d] behind the
    projector.  Code: (keep // 2) // 16 patches per window by `cls_local`, 4 x 4 windows; the rest by `cls_global` among
    the patches not yet taken; every patch not kept is added to the kept one of the highest cosine (of the features before
    merging), which is then divided by 1 + the number added.
    Ours: window = (row * 4 // rows, column * 4 // columns), which is the code's on its 24 x 24 grid; exactly `keep`, so what
    the windows leave of keep // 2 (or lack) goes to the global pick.
    """
    cls_local, cls_global, features = floats(cls_local), floats(cls_global), floats(features)
    n = rows * columns
    kept = []
    for window_row in range(4):
        for window_column in range(4):
            window = [
                row * columns + column
                for row in range(rows)
                for column in range(columns)
                if row * 4 // rows == window_row and column * 4 // columns == window_column
            ]
            kept += [window[i] for i in top([cls_local[j] for j in window], keep // 2 // 16)]
    free = [j for j in range(n) if j not in set(kept)]
    kept += [free[i] for i in top([cls_global[j] for j in free], keep - len(kept))]
    kept = sorted(kept)

    sums, counts = {j: features[j] for j in kept}, dict.fromkeys(kept, 1)
    for j in range(n):
        if j not in counts:
            nearest = kept[ranking([cosine(features[j], features[other]) for other in kept])[0]]
            sums[nearest] = [x + y for x, y in zip(sums[nearest], features[j], strict=True)]
            counts[nearest] += 1
    return kept, torch.tensor([[x / counts[j] for x in sums[j]] for j in kept], dtype=torch.float64)


def vscan_in_the_decoder(attention, keep: int) -> list[int]:
    """Kept ids of the stage inside the language model: the highest means over heads of the attention [head, visual] that the
    coming layer would pay from the last prompt token."""
    return top(mean_of(attention), keep)
