"""FastVID (arXiv:2503.11187), loop by loop."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from methods.loops.plain import cosine, distance, floats, mean, mean_of, ranking


def fastvid_segments(frames, least: int, threshold: float) -> list:
    """DySeg: the segment of every frame, from the tokens of each frame."""
    means = [mean_of(tokens) for tokens in frames]
    alike = [cosine(one, other) for one, other in pairwise(means)]
    lowest = sorted(range(len(alike)), key=lambda t: (alike[t], t))[: least - 1]
    segments = [0]
    for t, value in enumerate(alike):
        segments.append(segments[-1] + (t in lowest or value < threshold))
    return segments


def running_shares(total: int, weights) -> list:
    """Ours: a total in whole shares, by rounding running sums down."""
    sums = [total * sum(weights[: i + 1]) // sum(weights) for i in range(len(weights))]
    return [after - before for before, after in pairwise([0, *sums])]


def fastvid_peaks(tokens) -> list:
    """ρ·δ of every token of one frame: DPC-kNN with 4 neighbours, distances over √d; the lower index is denser among equals."""
    root = math.sqrt(len(tokens[0])) if tokens else 1
    away = [[distance(one, other) / root for other in tokens] for one in tokens]
    density = [math.exp(-mean([d**2 for d in sorted(row)[:4]])) for row in away]
    order = ranking(density)
    peaks = []
    for token, row in enumerate(away):
        denser = [row[other] for other in order[: order.index(token)]]
        peaks.append(density[token] * (min(denser) if denser else max(map(max, away))))
    return peaks


def best_first(inside, score, tokens, keep: int) -> list:
    """The best tokens inside, then the best others."""
    order = sorted(tokens, key=lambda token: (token not in inside, -score[token], token))
    return sorted(order[:keep])


def fastvid(
    features, position, cells: int, keep: int, attention=None, least=8, threshold=0.9, context=1.0, every=4, own=0.6
) -> tuple[list, torch.Tensor, list]:
    """Kept places, their features, and for every token the one that it joined (−1: none).

    Shares of frames and segments, and one anchor per token: ours. The last frame of a segment and every p-th before it have
    anchors: code.
    """
    x = floats(features)
    count = max(position) // cells + 1
    members = [[token for token, place in enumerate(position) if place // cells == frame] for frame in range(count)]
    segments = fastvid_segments([[x[token] for token in own] for own in members], least, threshold)
    merged = int(context * keep)
    salient: list = []
    if merged < keep:
        inside: list = []
        for frame, quota in zip(members, running_shares(keep - merged, [1] * count), strict=True):
            inside += [frame[i] for i in ranking([attention[token] for token in frame])[:quota]]
        salient = best_first(inside, attention, range(len(x)), keep - merged)
    rest = [token for token in range(len(x)) if token not in salient]
    peaks = dict.fromkeys(rest, 0.0)
    for frame in members:
        left = [token for token in frame if token in rest]
        peaks |= zip(left, fastvid_peaks([x[token] for token in left]), strict=True)
    step = min(every, len(x) // keep)
    sizes = [segments.count(segment) for segment in range(segments[-1] + 1)]
    inside = []
    for segment, share in enumerate(running_shares(merged, sizes)):
        hosts = [frame for frame in range(count) if segments[frame] == segment][::-1][::step][::-1]
        for number, frame in enumerate(hosts):
            quota = share // len(hosts) + (number < share % len(hosts))
            left = [token for token in members[frame] if token in rest]
            inside += [left[i] for i in ranking([peaks[token] for token in left])[:quota]]
    anchors = best_first(inside, peaks, rest, merged)
    segment_of = {token: segments[frame] for frame, tokens in enumerate(members) for token in tokens}
    joined = {}
    for token in rest:
        mates = [anchor for anchor in anchors if segment_of[anchor] == segment_of[token]]
        joined[token] = mates[ranking([cosine(x[token], x[anchor]) for anchor in mates])[0]] if mates else -1
    rows = {token: x[token] for token in salient}
    for anchor in anchors:
        mine = [x[token] for token in rest if joined[token] == anchor]
        weight = max(own, 1 / (len(mine) + 1)) if mine else 1.0
        middle = mean_of(mine) if mine else x[anchor]
        rows[anchor] = [weight * a + (1 - weight) * m for a, m in zip(x[anchor], middle, strict=True)]
    kept = sorted(rows)
    into = [token if token in rows else joined[token] for token in range(len(x))]
    return kept, torch.tensor([rows[token] for token in kept], dtype=torch.float64), into
