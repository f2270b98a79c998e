"""VidCom² (arXiv:2505.14454), loop by loop."""

from __future__ import annotations

import math

from methods.loops.plain import distance, floats, length, mean, mean_of, ranking, softmax


def vidcom2_shares(usual, sizes, base: float) -> list:
    """Tokens of every frame from its mean likeness to the video: formulas (4) and (5), rounded half to even, 1 to all."""
    unusual = softmax([-value / 0.01 for value in usual])
    average = mean(unusual)
    return [
        min(max(round(min(base * (1 + own - average), 1) * size), 1), size) for own, size in zip(unusual, sizes, strict=True)
    ]


def vidcom2(features, position, cells: int, keep: int) -> list:
    """Kept places of one video's tokens `[n, d]`; `position` says which token of the video each is, `cells` to a frame.

    The half of the dimensions with the lowest variance (lower index first among equals), at unit length; Gaussians of five
    widths around the means of the video and of the frame. Code, where the paper is silent: which dimensions, the widths, the
    temperature 0.01, rounding. vLLM: exactly K tokens, by the same likeness over all frames.
    """
    x = floats(features)
    columns = list(zip(*x, strict=True))
    variance = [mean([(value - mean(column)) ** 2 for value in column]) for column in columns]
    calm = sorted(range(len(columns)), key=lambda column: (variance[column], column))[: max(len(columns) // 2, 1)]
    x = [[token[column] for column in calm] for token in x]
    x = [[value / max(length(token), 1e-12) for value in token] for token in x]
    frames = sorted({place // cells for place in position})
    members = {frame: [token for token, place in enumerate(position) if place // cells == frame] for frame in frames}

    def likeness(token, centre) -> float:
        return sum(math.exp(-(distance(token, centre) ** 2) / (2 * alpha)) for alpha in (0.125, 0.25, 0.5, 1.0, 2.0))

    video = mean_of(x)
    to_video = [likeness(token, video) for token in x]
    to_frame = [0.0] * len(x)
    for own in members.values():
        centre = mean_of([x[token] for token in own])
        for token in own:
            to_frame[token] = likeness(x[token], centre)
    unusual = [-(a + b) for a, b in zip(to_video, to_frame, strict=True)]
    usual = [mean([to_video[token] for token in members[frame]]) for frame in frames]
    shares = vidcom2_shares(usual, [len(members[frame]) for frame in frames], keep / len(x))
    inside: list = []
    for frame, share in zip(frames, shares, strict=True):
        own = members[frame]
        inside += [own[i] for i in ranking([unusual[token] for token in own])[:share]]
    order = [token for token in ranking(unusual) if token in inside]
    order += [token for token in ranking(unusual) if token not in inside]
    return sorted(order[:keep])


def vllm_count(cells: int, frames: int, rate: float) -> int:
    """How many tokens vLLM keeps at a pruning rate: at least one of each frame."""
    return max(frames, min(int(cells * frames * (1 - rate)), cells * frames))
