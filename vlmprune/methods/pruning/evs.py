"""EVS, Efficient Video Sampling. Bagrov et al., 2025, arXiv:2510.14624. What does not change from frame to frame is dropped.

    d(t, i) = 1 − cos( x(t, i), x(t − 1, i) )      token i of frame t, and the token at the same cell of the frame before
    d(0, i) = ∞                                    the first frame stays
    S = the K tokens of the whole video with the highest d; equal ones in the order of the video

The paper compares pixels of patches (L1) and drops a share q of all patches. This is its form on the features that enter the
language model, as in vLLM (`--video-pruning-rate q`) and SGLang: the same set where K = ⌊(1 − q) · n⌋ for n tokens. Differs
from vLLM's code: a share is rounded to the nearest number (vLLM: down); a budget below one frame is refused (vLLM: one frame is
kept); d is fp32 (vLLM: the model's dtype). Where an earlier stage has dropped a token, the frame before is the last one that
still has its cell. A picture is a video of one frame, and repeats nothing: evenly spaced tokens stay, as with `uniform`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from vlmprune.errors import UsageError
from vlmprune.methods.base import Pruner, top
from vlmprune.methods.frames import cells
from vlmprune.methods.merging import rows
from vlmprune.methods.pruning.uniform import evenly
from vlmprune.schedule import at
from vlmprune.view import View


@dataclass(frozen=True, kw_only=True)
class EVS(Pruner):
    """Keep the first frame of a video, and what changes after it."""

    name = "evs"
    paper = "arXiv:2510.14624"
    note = "on features, as in vLLM (paper: pixels); a budget below one frame is refused; of a picture, evenly spaced tokens"
    needs = frozenset({"features", "frame"})
    default = at(layer=0, fraction=0.25)
    chooses = "keeps the first frame, and what differs most from the frame before"
    compares_frames = True

    def scores(self, see: View) -> Tensor | None:
        return _change(see) if see.frames > 1 else None

    def select(self, see: View, keep: int) -> Tensor:
        if see.frames == 1:
            return evenly(see, keep)
        first = see.original // see.frames
        if keep < first:
            raise UsageError(
                f"evs keeps the first frame of a video whole, which is {first} tokens of {see.original} here, found a budget "
                f"of {keep}: give at least tokens={first} or fraction={math.ceil(1e4 / see.frames) / 1e4:g}."
            )
        return top(_change(see), keep)


def _change(see: View) -> Tensor:
    """`[image, visual]` d of every token; ∞ where no earlier frame has its cell."""
    frame, cell = cells(see)
    order = (cell * see.frames + frame).argsort(dim=-1)  # cell by cell, each from its first frame to its last
    x, cell = rows(see.features, order).float(), cell.gather(1, order)
    change = 1 - cosine_similarity(x[:, 1:], x[:, :-1], dim=-1)
    change = pad(change.masked_fill(cell[:, 1:] != cell[:, :-1], torch.inf), (1, 0), value=torch.inf)
    return torch.empty_like(change).scatter(1, order, change)
