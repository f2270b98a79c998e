"""VidCom², Video Compression Commander. Liu et al., EMNLP 2025, arXiv:2505.14454. Unusual frames get more, unusual tokens stay.

    x̂       tokens without the half of their dimensions that varies most over the video, at unit length
    s_v, s_f = Σ_α exp( −‖x̂ − c‖² / 2α ),   α = 1/8, 1/4, 1/2, 1, 2;   c: the mean of x̂ over the video (s_v), its frame (s_f)
    u_t      = − mean of s_v over frame t                              how unusual the frame is
    K_t      = round( n_t · K/n · (1 + σ_t − 1/T) ) ≤ n_t, at least 1;   σ = softmax( u / 0.01 )
    S        = of each of the T frames, the K_t tokens with the lowest s_v + s_f

If that makes more than K tokens, the most usual ones of these go; if fewer, the most unusual others stay. So it is in vLLM,
with the same set where K = (1 − q) · n ≥ T. Differs from vLLM's code: a share is rounded to the nearest number, and K_t are
computed from the result (vLLM: down, after K_t); fewer than T tokens are possible (vLLM: at least T); numbers are fp32 (vLLM:
the model's dtype); ties go to the lower index. Differs from the authors' code: exactly K tokens (theirs: Σ K_t). A picture is a
video of one frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.methods.base import Pruner
from vlmprune.methods.frames import by_frame, by_token, exactly, first_of_each
from vlmprune.schedule import at
from vlmprune.view import View

ALPHAS = tuple(2.0**power for power in range(-3, 2))
TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True)
class VidCom2(Pruner):
    """Keep what differs from the rest of its frame and of the video, more in frames that differ."""

    name = "vidcom2"
    paper = "arXiv:2505.14454 (EMNLP 2025)"
    note = "exactly K tokens, as in vLLM; a picture is a video of one frame"
    needs = frozenset({"features"})
    official_positions = "compact (LLaVA), original (Qwen)"
    default = at(layer=0, fraction=0.25)
    chooses = "gives each frame a share by how unusual it is, and keeps what is most unusual in it"
    compares_frames = True

    def scores(self, see: View) -> Tensor:
        to_video, to_frame, _ = _likeness(see)
        return by_token(see, -(to_video + to_frame))  # within a frame

    def select(self, see: View, keep: int) -> Tensor:
        to_video, to_frame, there = _likeness(see)
        unusual = -(to_video + to_frame)
        inside = first_of_each(unusual, _shares(to_video, there, keep / see.visual), there)
        return exactly(by_token(see, inside), by_token(see, unusual), keep)


def _likeness(see: View) -> tuple[Tensor, Tensor, Tensor]:
    """s_v and s_f, `[image, frame, cell]`, and where tokens are left."""
    x = see.features.float()
    calm = x.var(dim=1, correction=0).argsort(dim=-1, stable=True)[:, : max(x.shape[-1] // 2, 1)]
    x = normalize(x.gather(2, calm[:, None].expand(-1, see.visual, -1)), dim=-1)
    grid, there = by_frame(see, x)
    total, count = grid.sum(dim=2, keepdim=True), there.sum(dim=2)[..., None, None]
    frame = total / count.clamp_min(1)
    video = total.sum(dim=1, keepdim=True) / see.visual
    return _gaussians(grid, video), _gaussians(grid, frame), there


def _gaussians(x: Tensor, centre: Tensor) -> Tensor:
    distance = (x - centre).square().sum(dim=-1)
    return torch.stack([torch.exp(-distance / (2 * alpha)) for alpha in ALPHAS]).sum(dim=0)


def _shares(to_video: Tensor, there: Tensor, base: float) -> Tensor:
    """`[image, frame]` K_t: of frames that have tokens left."""
    size = there.sum(dim=-1)
    usual = to_video.masked_fill(~there, 0).sum(dim=-1) / size.clamp_min(1)
    weight = (-usual.masked_fill(size == 0, torch.inf) / TEMPERATURE).softmax(dim=-1)
    frames = (size > 0).sum(dim=-1, keepdim=True)
    share = (base * (1 + weight - 1 / frames)).clamp_max(1)
    return (share * size).round().long().clamp_min(1).minimum(size)
