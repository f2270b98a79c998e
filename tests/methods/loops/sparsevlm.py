"""SparseVLM (arXiv:2410.04417), loop by loop."""

from __future__ import annotations

import math

import torch
from methods.loops.plain import distance, dot, floats, mean, mean_of, ranking, softmax, top


def sparsevlm_raters(visual, text) -> list:
    """Text tokens that rate the picture (code): those whose mean over visual tokens v of
    softmax over text tokens t of (v . t) lies above the mean of these means.

    `visual` [n, d] and `text` [t, d] enter the first layer; no scale.  Ours: if none lies above (one text token, or all
    alike), all of them rate; the code would average over nothing.
    """
    visual, text = floats(visual), floats(text)
    rows = [softmax([dot(v, t) for t in text]) for v in visual]
    weights = mean_of(rows)
    raters = [index for index, weight in enumerate(weights) if weight > mean(weights)]
    return raters or list(range(len(text)))


def sparsevlm_scores(attention, raters: list) -> list:
    """Mean over heads and raters of the attention [head, text, visual] (v1.5 code)."""
    attention = floats(attention)
    return mean_of([mean_of([head[row] for head in attention]) for row in raters])


def sparsevlm_recycled_tokens(visual: int, kept: int) -> int:
    """How many of the pruned tokens are recycled: the top int(0.3 pruned) + 1 by score (code)."""
    pruned = visual - kept
    return int(pruned * 0.3) + 1 if pruned > 0 else 0


def sparsevlm_recycle_count(visual: int, kept: int) -> int:
    """How many tokens the recycled ones become: int(recycled / 10) + 1 clusters (code); 0 if none was pruned."""
    recycled = sparsevlm_recycled_tokens(visual, kept)
    return int(recycled / 10) + 1 if recycled > 0 else 0


def sparsevlm_cluster(x, clusters: int) -> tuple[list, list]:
    """Density-peaks clustering of `x` [n, d]: centres (indices, best first) and each token's cluster number.

    Constants from the code (Gumpest/SparseVLMs llava/model/language_model/utils.py, cluster_and_merge):
    distance = L2 / sqrt(d); density = exp(-mean of the squared distances to the `clusters` nearest tokens), the token itself
    at distance 0 among them (so k = the number of clusters); peak distance = the distance to the nearest denser token, for the
    densest the largest distance in the whole matrix; centres = the top of density x peak distance; every token joins the
    nearest centre, a centre itself.
    Ours: the code breaks equal densities by adding noise up to 1e-6; here the lower index counts as the denser one.
    """
    x = floats(x)
    n, width = len(x), math.sqrt(len(x[0]))
    distances = [[distance(x[i], x[j]) / width for j in range(n)] for i in range(n)]
    density = [math.exp(-mean([y**2 for y in sorted(row)[:clusters]])) for row in distances]
    largest = max(max(row) for row in distances)
    scores = []
    for i in range(n):
        peak = largest
        for j in range(n):
            if (density[j] > density[i] or (density[j] == density[i] and j < i)) and distances[i][j] < peak:
                peak = distances[i][j]
        scores.append(density[i] * peak)
    centres = ranking(scores)[:clusters]
    assignment = []
    for i in range(n):
        to_centre = [-distances[i][centre] for centre in centres]
        assignment.append(centres.index(i) if i in centres else ranking(to_centre)[0])
    return centres, assignment


def sparsevlm_recycle(features, scores, kept: list) -> tuple[list, torch.Tensor]:
    """The recycled tokens (best first) and the tokens [clusters, d] they become (v1.5 code).

    Clusters come in the order of their centres; a cluster's token is the plain mean of its members (the code divides by the
    number + 1e-6).  The code inserts them right behind the kept visual tokens.
    """
    features, scores = floats(features), floats(scores)
    pruned = [j for j in ranking(scores) if j not in set(kept)]
    recycled = pruned[: sparsevlm_recycled_tokens(len(features), len(kept))]
    if not recycled:
        return [], torch.zeros(0, len(features[0]), dtype=torch.float64)
    clusters = sparsevlm_recycle_count(len(features), len(kept))
    _, assignment = sparsevlm_cluster([features[j] for j in recycled], clusters)
    tokens = []
    for cluster in range(clusters):
        tokens.append(mean_of([features[j] for j, number in zip(recycled, assignment, strict=True) if number == cluster]))
    return recycled, torch.tensor(tokens, dtype=torch.float64)


def sparsevlm_rope_bias(cos_text, sin_text, cos_visual, sin_visual) -> list:
    """What rotary positions alone give a pair of tokens, as [text][visual] (SparseVLM v2, "gravity correction").

    Code (Gumpest/SparseVLMs llava/model/language_model/modelling_sparse_llama.py, the USE_VERSION=2_0 branch): rotate a query
    of ones at the text position p and a key of ones at the visual position r, take their dot product over sqrt(dim).
    `cos_*` and `sin_*` [tokens, dim] are the rotary tables (both halves alike).  With frequencies w_m this is
    B(p, r) = 2 / sqrt(dim) * sum over m of cos((p - r) w_m), so it depends on the distance only; it falls with distance and
    is not positive everywhere (dim 128, base 10000: below 0 first at distance 1707).  Positions are the original ones.
    """

    def rotated_ones(cos, sin):
        half = len(cos) // 2
        return [cos[m] - sin[m] if m < half else cos[m] + sin[m] for m in range(len(cos))]

    queries = [rotated_ones(cos, sin) for cos, sin in zip(floats(cos_text), floats(sin_text), strict=True)]
    keys = [rotated_ones(cos, sin) for cos, sin in zip(floats(cos_visual), floats(sin_visual), strict=True)]
    return [[dot(q, k) / math.sqrt(len(q)) for k in keys] for q in queries]


def sparsevlm_v2_correct(attention, bias: list) -> list:
    """The attention [head, text, visual] over the RoPE bias [text, visual] (v2 code).

    Code: it is the probabilities after the softmax that are divided (the code calls them logits), not renormalised, every
    head by the same bias, and no guard where the bias is small or negative.
    """
    attention, bias = floats(attention), floats(bias)
    return [[[p / b for p, b in zip(row, by, strict=True)] for row, by in zip(head, bias, strict=True)] for head in attention]


def sparsevlm_v2_scores(attention, raters: list, heads: int = 14) -> list:
    """Mean over raters and over the `heads` heads with the largest total rater-to-visual mass (v2 code).

    `attention` [head, text, visual] is already corrected (`sparsevlm_v2_correct`).  Ours: with fewer heads than asked for,
    all of them.
    """
    attention = floats(attention)
    mass = [sum(sum(head[row]) for row in raters) for head in attention]
    return sparsevlm_scores([attention[head] for head in top(mass, heads)], raters)
