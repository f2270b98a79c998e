"""HoloV (arXiv:2510.02912), loop by loop."""

from __future__ import annotations

import math

from methods.loops.plain import dot, floats, length, mean, ranking, top


def holov(cls_attention_mean, features, keep: int, runs: int = 16) -> list:
    """HoloV (code obananas/HoloV llava/model/utils.py): quotas per run of the flat sequence, then attention.

    `cls_attention_mean` [n]: head mean of the CLS row of block -2; `features` [n, d] behind the projector.
    Code: the first n % runs runs are one token longer, empty ones vanish.  In a run, cosines of x / (|x| + 1e-6) with the
    diagonal counted as 0; their variance around sum / (m - 1), also over m - 1; rescaled to the mean of 1000 |attention| over
    (mean variance + 1e-6); a run's score is the mean of 1000 attention + 0.09 rescaled variance.  Quota = floor(keep score /
    (sum of scores + 1e-6)), the remainder one each to the best runs; inside a run the highest attention alone decides.
    Ours: a run of one token has variance 0 and 1000 times its attention as score (the code leaves out the 1000 there, which
    starves it next to longer runs); a quota above the run's size is cut to it and what is missing goes, like the remainder,
    one each to the best runs with room, round after round (the code pads with zeros); sorted output.
    """
    attention, features = floats(cls_attention_mean), floats(features)
    n = len(attention)
    members, start = [], 0
    for run in range(runs):
        size = n // runs + (run < n % runs)
        if size > 0:
            members.append(list(range(start, start + size)))
        start += size

    scores = []
    for run in members:
        unit = [[x / (length(features[i]) + 1e-6) for x in features[i]] for i in run]
        variances = []
        for i in range(len(run)):
            similarity = [0.0 if i == j else dot(unit[i], unit[j]) for j in range(len(run))]
            others = max(1, len(run) - 1)
            centre = sum(similarity) / others
            variances.append(sum((x - centre) ** 2 for x in similarity) / others)
        scaled = [1000 * attention[i] for i in run]
        rescale = mean([abs(x) for x in scaled]) / (mean([abs(x) for x in variances]) + 1e-6)
        scores.append(mean([x + 0.09 * y * rescale for x, y in zip(scaled, variances, strict=True)]))

    total = sum(scores) + 1e-6
    quotas = [min(math.floor(score / total * keep), len(run)) for score, run in zip(scores, members, strict=True)]
    while sum(quotas) < min(keep, n):
        for run in ranking(scores):
            if quotas[run] < len(members[run]) and sum(quotas) < keep:
                quotas[run] += 1

    kept = []
    for run, quota in zip(members, quotas, strict=True):
        kept += [run[i] for i in top([attention[i] for i in run], quota)]
    return sorted(kept)
