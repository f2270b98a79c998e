"""Each paper's formula, loop by loop: the oracles that the vectorised methods of vlmprune are tested against.

Written from the formulas (and, where those are silent, from facts read in the public code), sharing no code with vlmprune.
One picture, view or sample at a time and no batch axis, so nothing can depend on a batch mate.  Everything is computed in
float64; equal scores go to the lower index; kept indices are sorted ascending and exactly as many as asked for.  "Section"
is a section of the papers file.  A docstring says what follows the paper, what the official code, and what is our own
choice ("ours").
"""

from __future__ import annotations

import copy
import math

import torch


# --- elementary math --------------------------------------------------------------------------------------------------
def floats(numbers) -> list:
    """A tensor or a list of numbers as nested lists of Python floats."""
    return torch.as_tensor(numbers, dtype=torch.float64).tolist()


def dot(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def length(a) -> float:
    return math.sqrt(dot(a, a))


def cosine(a, b) -> float:
    """0 for a zero vector, as a similarity that leans on no direction."""
    lengths = length(a) * length(b)
    return dot(a, b) / lengths if lengths > 0 else 0.0


def distance(a, b) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def mean(numbers) -> float:
    return sum(numbers) / len(numbers)


def mean_of(vectors) -> list:
    return [mean(column) for column in zip(*vectors, strict=True)]


def softmax(logits) -> list:
    high = max(logits)
    powers = [math.exp(x - high) for x in logits]
    total = sum(powers)
    return [x / total for x in powers]


def normalised(numbers) -> list:
    total = sum(numbers)
    return [x / total for x in numbers]


def ranking(scores) -> list:
    """Indices from the highest score to the lowest; the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def top(scores, keep: int) -> list:
    """The ``keep`` indices of the highest scores, ascending."""
    return sorted(ranking(scores)[:keep])


# --- FlowCut (arXiv 2505.19536; sections 3.2 to 3.7) ------------------------------------------------------------------
def flowcut_terms(query_g, keys, value_g, values, scaling: float, semantic_scaling: float) -> tuple[list, list, list]:
    """Relation, semantic and magnitude of every token, as lists of n numbers (FlowCut, section 3.2; code 3.3).

    ``query_g`` and ``value_g`` [head, dim] belong to the global token, ``keys`` and ``values`` [head, n, dim] to the tokens.
    Paper: a_j = mean over heads of softmax_j(scaling q.k_j), s_j = mean over heads of softmax_j(semantic_scaling v.v_j),
    both over the n tokens given; whether CLS is among them is the caller's business.
    Code: d_j = L1 norm of the mean of v_j over heads (the paper leaves the order of mean and norm open).
    """
    query_g, keys, value_g, values = floats(query_g), floats(keys), floats(value_g), floats(values)
    heads, n = len(keys), len(keys[0])
    a, s, d = [0.0] * n, [0.0] * n, [0.0] * n
    for head in range(heads):
        relation = softmax([scaling * dot(query_g[head], keys[head][j]) for j in range(n)])
        semantic = softmax([semantic_scaling * dot(value_g[head], values[head][j]) for j in range(n)])
        for j in range(n):
            a[j] += relation[j] / heads
            s[j] += semantic[j] / heads
    for j in range(n):
        d[j] = sum(abs(x) for x in mean_of([values[head][j] for head in range(heads)]))
    return a, s, d


def flowcut_score(a: list, s: list, d: list) -> list:
    """S = (a / sum a + s / sum s) d (FlowCut, section 3.2; paper and LLaVA code agree)."""
    return [(x + y) * z for x, y, z in zip(normalised(a), normalised(s), d, strict=True)]


def flowcut_smoothed(before: list | None, now: list) -> list:
    """C = S in the first block, 0.5 C + 0.5 S afterwards (FlowCut, section 3.2)."""
    return now if before is None else [0.5 * x + 0.5 * y for x, y in zip(before, now, strict=True)]


def entropy_ratio(a) -> float:
    """r_H = entropy of the renormalised ``a`` over log n (FlowCut, section 3.2; golden value G6).

    Ours: 0 log 0 is 0, where the LLaVA code gives NaN and the Qwen code adds 1e-7.  One token, or no mass at all, counts as
    uniform (1.0), so that it prunes nothing.
    """
    a = floats(a)
    if len(a) == 1 or sum(a) == 0:
        return 1.0
    entropy = 0.0
    for p in normalised(a):
        if p > 0:
            entropy -= p * math.log(p)
    return entropy / math.log(len(a))


def flowcut_prune_count(n: int, target: int, remaining: int, r_h: float) -> int:
    """How many of ``n`` patches an active block drops (FlowCut, sections 3.2 and 3.3; golden value G5).

    Paper and code: round((n - target) / sqrt(remaining) (1 - r_h^2)), with Python's (and torch's) rounding of halves to even;
    ``n`` and ``target`` count patches, without the CLS slot.  Code: the last active block (``remaining`` = 0) drops down to
    exactly ``target``, and no block ever goes below it.
    """
    if n <= target:
        return 0
    if remaining == 0:
        return n - target
    return min(n - target, round((n - target) / math.sqrt(remaining) * (1 - r_h**2)))


def flowcut_counts(n: int, target: int, blocks: int = 24, r_h: float = 0.9) -> list:
    """Patches left behind every active block if the entropy ratio were ``r_h`` throughout (FlowCut, golden value G4).

    Code: R = sel - index - 1 with sel = blocks - 2, the block whose output feeds the projector; active where R is even.
    """
    counts = []
    for index in range(blocks - 2):
        remaining = blocks - 2 - index - 1
        if remaining % 2 == 0:
            n -= flowcut_prune_count(n, target, remaining, r_h)
            counts.append(n)
    return counts


def flowcut_clip(tower, pixels, keep: int, feature_block: int, semantic_scale: str = "code") -> tuple[list, torch.Tensor]:
    """FlowCut inside a stock ``CLIPVisionModel`` for one picture (section 3.3, code): survivors' raster ids and features.

    ``pixels`` [3, H, W].  The features are those that leave block ``feature_block`` (22 of 24 in LLaVA), without CLS.
    Code: relation and semantic softmax run over CLS and patches and are then cut to the patches; a block's score is updated
    while more than ``keep`` patches are left; block i is active if R = feature_block - i - 1 is even.
    ``semantic_scale``: "code" has no scale in the semantic softmax, "paper" has 1 / sqrt(dim); CLS is inside in both.
    Ours: the number of drops is this picture's own, never a batch's maximum; any number of blocks; in float64 throughout.
    """
    tower = copy.deepcopy(tower).double().eval()
    heads = tower.config.num_attention_heads
    with torch.no_grad():
        hidden = tower.pre_layrnorm(tower.embeddings(pixels.double()[None]))[0]  # [1 + patches, width]
        dim = hidden.shape[1] // heads
        ids, cumulative = list(range(len(hidden) - 1)), None
        if feature_block == 0 and keep < len(ids):
            raise ValueError("no block stands before feature_block, so none can drop anything")
        for index in range(feature_block + 1):
            layer = tower.encoder.layers[index]
            normed = layer.layer_norm1(hidden)
            q, k, v = (
                torch.stack(project(normed).split(dim, dim=1))  # [head, token, dim]
                for project in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            )
            mixed = [(q[head] @ k[head].T / math.sqrt(dim)).softmax(1) @ v[head] for head in range(heads)]
            hidden = hidden + layer.self_attn.out_proj(torch.cat(mixed, dim=1))
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))

            if len(ids) <= keep:
                continue
            a, s, d = flowcut_terms(
                q[:, 0], k, v[:, 0], v, 1 / math.sqrt(dim), {"code": 1.0, "paper": 1 / math.sqrt(dim)}[semantic_scale]
            )
            a, s, d = a[1:], s[1:], d[1:]
            cumulative = flowcut_smoothed(cumulative, flowcut_score(a, s, d))
            remaining = feature_block - index - 1
            if remaining % 2 == 0:
                dropped = flowcut_prune_count(len(ids), keep, remaining, entropy_ratio(a))
                chosen = top(cumulative, len(ids) - dropped)
                hidden = torch.stack([hidden[0]] + [hidden[1 + j] for j in chosen])
                ids, cumulative = [ids[j] for j in chosen], [cumulative[j] for j in chosen]
    return ids, hidden[1:]


def flowcut_llm(query_last, keys, value_last, values, scaling: float, keep: int) -> list:
    """Which visual tokens FlowCut keeps inside the language model (section 3.5, LLaVA-NeXT code).

    ``query_last`` [head, dim] and ``value_last`` [head or kv head, dim] are the last prompt token's, ``keys`` and ``values``
    [kv head, n, dim] the visual tokens'; with fewer kv heads each is repeated, as in GQA.
    Code: both softmaxes over the visual tokens only, here both with ``scaling``; norm of the head-mean; sums normalised (the
    Qwen code forgets to).
    """
    query_last, keys, value_last, values = floats(query_last), floats(keys), floats(value_last), floats(values)
    group = len(query_last) // len(keys)
    keys = [keys[head // group] for head in range(len(query_last))]
    values = [values[head // group] for head in range(len(query_last))]
    group = len(query_last) // len(value_last)
    value_last = [value_last[head // group] for head in range(len(query_last))]
    return top(flowcut_score(*flowcut_terms(query_last, keys, value_last, values, scaling, scaling)), keep)


def pooled(x) -> list:
    """[head, n, dim] -> [head, dim]: the mean over tokens, which stands in for CLS where a tower has none."""
    return [mean_of(tokens) for tokens in floats(x)]


def flowcut_unit_scores(blocks: list, scaling: float, unit: int = 4) -> list:
    """Score of every merge unit of a tower without CLS (section 3.7, ours, on the formulas of section 3.2).

    ``blocks``: the tower's (q, k, v), each [head, n, dim] of one picture, in depth order; n a multiple of ``unit``.
    Paper: the global token is the mean-pooled one, S and its smoothing as everywhere.  Ours: pooled q for the relation (after
    RoPE, as the Qwen code does), pooled v for the semantic term, whose scale is 1 / sqrt(dim); a unit's score is the mean of
    its consecutive ``unit`` rows; nothing is dropped inside the tower.
    """
    cumulative = None
    for q, k, v in blocks:
        terms = flowcut_terms(pooled(q), k, pooled(v), v, scaling, 1 / math.sqrt(v.shape[-1]))
        cumulative = flowcut_smoothed(cumulative, flowcut_score(*terms))
    assert len(cumulative) % unit == 0
    return [mean(cumulative[start : start + unit]) for start in range(0, len(cumulative), unit)]


def flowcut_qwen_official_scores(q, k, v, scaling: float) -> list:
    """One block's score of every patch in the official Qwen2-VL tower (section 3.6, code): a_j d_j.

    a with the query mean-pooled over tokens, softmax over all tokens, mean over heads; d the L1 norm of the head-mean value.
    No semantic term and no renormalisation, unlike the paper.
    """
    a, _, d = flowcut_terms(pooled(q), k, pooled(v), v, scaling, 1.0)
    return [x * y for x, y in zip(a, d, strict=True)]


# --- MustDrop (arXiv 2411.10803; section 7) ---------------------------------------------------------------------------
def mustdrop_windows(rows: int, columns: int) -> list:
    """The raster ids of every 3x3 window's nine patches, windows in raster order (section 7.1, code: asserts divisibility)."""
    if rows % 3 or columns % 3:
        raise ValueError(f"a grid of {rows} x {columns} does not divide into 3 x 3 windows")
    windows = []
    for top_row in range(0, rows, 3):
        for left in range(0, columns, 3):
            windows.append([(top_row + y) * columns + left + x for y in range(3) for x in range(3)])
    return windows


def mustdrop_window_scores(hidden, rows: int, columns: int) -> list:
    """Mean of the 72 off-diagonal pairwise cosines of each window (section 7.1, paper and code)."""
    hidden = floats(hidden)
    scores = []
    for window in mustdrop_windows(rows, columns):
        scores.append(mean([cosine(hidden[i], hidden[j]) for i in window for j in window if i != j]))
    return scores


def mustdrop_merged(hidden, rows: int, columns: int, merged: list) -> tuple[list, dict]:
    hidden, windows = floats(hidden), mustdrop_windows(rows, columns)
    return merged, {window: mean_of([hidden[patch] for patch in windows[window]]) for window in merged}


def mustdrop_merge(hidden, rows: int, columns: int, threshold: float = 0.8) -> tuple[list, dict]:
    """Windows to merge and the tokens they become (MustDrop stage 1, section 7.1): ids in raster order, {id: mean}.

    ``hidden`` [patches, dim] leaves the tower's first block.  Paper and code: windows with a score >= threshold, each replaced
    by the plain mean of its nine patches.  Ours: this picture's own number of windows (the code takes the batch's minimum),
    listed in raster order (the code lists them by score).
    """
    scores = mustdrop_window_scores(hidden, rows, columns)
    return mustdrop_merged(hidden, rows, columns, [w for w, score in enumerate(scores) if score >= threshold])


def mustdrop_merge_count(hidden, rows: int, columns: int, windows: int) -> tuple[list, dict]:
    """As ``mustdrop_merge``, but merging exactly the ``windows`` most similar windows.

    Ours, after the fixed count (``fix_r``) of LightCompress's re-implementation (section 7.5).
    """
    return mustdrop_merged(hidden, rows, columns, top(mustdrop_window_scores(hidden, rows, columns), windows))


def mustdrop_key_set(cls_attention) -> list:
    """Tokens that the later stages must keep: the top ceil(0.08 P') by CLS attention (section 7.1, code).

    ``cls_attention``: mean over heads of the last block's CLS row (block 23 of 24), one number per token left by stage 1.
    """
    cls_attention = floats(cls_attention)
    return top(cls_attention, math.ceil(0.08 * len(cls_attention)))


def mustdrop_filter(attention, key_set: list, g: float, u: float) -> list:
    """Tokens kept by the dual attention filter (section 7.2, code; golden value G18).

    ``attention`` [text, visual]: mean over heads, all text after the image.  Token j goes iff its column sum is < g times the
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
    """Exactly ``keep`` tokens: the key set, then the best by column sum (section 7.2's target-count mode, ours).

    A key set larger than ``keep`` is itself cut to its best by column sum.
    """
    attention = floats(attention)
    sums = [sum(column) for column in zip(*attention, strict=True)]
    forced = [j for j in ranking(sums) if j in set(key_set)]
    others = [j for j in ranking(sums) if j not in set(key_set)]
    return sorted((forced + others)[:keep])


# --- VisionZip (arXiv 2412.04467; section 8.2) ------------------------------------------------------------------------
def visionzip(cls_attention, keys, features, keep: int, contextual: int) -> tuple[list, list, torch.Tensor]:
    """VisionZip (section 8.2, code): dominant ids, target ids (both raster order), contextual features [contextual, dim].

    ``cls_attention`` [head, patch] and ``keys`` [head, patch, dim] of block -2, ``features`` [patch, dim] that leave it.
    Code: dominant by CLS attention summed over heads; of the R others in raster order every max(1, R // contextual)-th one is
    a target, the first ``contextual`` of them; the rest join the target of the highest cosine of head-mean keys; contextual
    token = target + mean of its members (their sum, not their mean; a target without members stays as it is).
    Ours: ``keep`` counts patches only, so dominant = keep - contextual (the code's first dominant slot is CLS).
    """
    cls_attention, keys, features = floats(cls_attention), floats(keys), floats(features)
    scores = [sum(column) for column in zip(*cls_attention, strict=True)]
    metric = [mean_of([head[j] for head in keys]) for j in range(len(features))]
    dominant = top(scores, keep - contextual)
    rest = [j for j in range(len(features)) if j not in set(dominant)]
    if contextual == 0:
        return dominant, [], torch.zeros(0, len(features[0]), dtype=torch.float64)
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    members = {target: [] for target in targets}
    for j in rest:
        if j not in members:
            similarity = [cosine(metric[j], metric[target]) for target in targets]
            members[targets[ranking(similarity)[0]]].append(j)
    tokens = []
    for target in targets:
        token = features[target]
        if members[target]:
            token = [x + y for x, y in zip(token, mean_of([features[j] for j in members[target]]), strict=True)]
        tokens.append(token)
    return dominant, targets, torch.tensor(tokens, dtype=torch.float64)


# --- SparseVLM (arXiv 2410.04417; section 8.3) ------------------------------------------------------------------------
def sparsevlm_raters(visual, text) -> list:
    """Text tokens that rate the picture (section 8.3, code): those whose mean over visual tokens v of
    softmax over text tokens t of (v . t) lies above the mean of these means.

    ``visual`` [n, d] and ``text`` [t, d] enter the first layer; no scale.  Ours: if none lies above (one text token, or all
    alike), all of them rate; the code would average over nothing.
    """
    visual, text = floats(visual), floats(text)
    rows = [softmax([dot(v, t) for t in text]) for v in visual]
    weights = mean_of(rows)
    raters = [index for index, weight in enumerate(weights) if weight > mean(weights)]
    return raters or list(range(len(text)))


def sparsevlm_scores(attention, raters: list) -> list:
    """Mean over heads and raters of the attention [head, text, visual] (section 8.3, v1.5 code)."""
    attention = floats(attention)
    return mean_of([mean_of([head[row] for head in attention]) for row in raters])


def sparsevlm_recycled_tokens(visual: int, kept: int) -> int:
    """How many of the pruned tokens are recycled: the top int(0.3 pruned) + 1 by score (section 8.3, code)."""
    pruned = visual - kept
    return int(pruned * 0.3) + 1 if pruned > 0 else 0


def sparsevlm_recycle_count(visual: int, kept: int) -> int:
    """How many tokens the recycled ones become: int(recycled / 10) + 1 clusters (section 8.3, code); 0 if none was pruned."""
    recycled = sparsevlm_recycled_tokens(visual, kept)
    return int(recycled / 10) + 1 if recycled > 0 else 0


def sparsevlm_cluster(x, clusters: int) -> tuple[list, list]:
    """Density-peaks clustering of ``x`` [n, d]: centres (indices, best first) and each token's cluster number.

    Section 8.3; constants from the code (Gumpest/SparseVLMs llava/model/language_model/utils.py, cluster_and_merge):
    distance = L2 / sqrt(d); density = exp(-mean of the squared distances to the ``clusters`` nearest tokens), the token itself
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
    """The recycled tokens (best first) and the tokens [clusters, d] they become (section 8.3, v1.5 code).

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
    ``cos_*`` and ``sin_*`` [tokens, dim] are the rotary tables (both halves alike).  With frequencies w_m this is
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
    """The attention [head, text, visual] over the RoPE bias [text, visual] (section 8.3, v2 code).

    Code: it is the probabilities after the softmax that are divided (the code calls them logits), not renormalised, every
    head by the same bias, and no guard where the bias is small or negative.
    """
    attention, bias = floats(attention), floats(bias)
    return [[[p / b for p, b in zip(row, by, strict=True)] for row, by in zip(head, bias, strict=True)] for head in attention]


def sparsevlm_v2_scores(attention, raters: list, heads: int = 14) -> list:
    """Mean over raters and over the ``heads`` heads with the largest total rater-to-visual mass (section 8.3, v2 code).

    ``attention`` [head, text, visual] is already corrected (``sparsevlm_v2_correct``).  Ours: with fewer heads than asked for,
    all of them.
    """
    attention = floats(attention)
    mass = [sum(sum(head[row]) for row in raters) for head in attention]
    return sparsevlm_scores([attention[head] for head in top(mass, heads)], raters)


# --- CDPruner (arXiv 2506.10967; section 8.5) -------------------------------------------------------------------------
def cdpruner_relevance(features_cosine) -> list:
    """Relevance of every token from its cosines [n, m] with the m texts (section 8.5, code).

    Code: r = -mean over texts, then (r - min + 1e-6) / (max - min).  Ours: min and max over all views of this picture (the
    code: of all pictures in the batch), and 1 for all if they are equal.
    """
    relevance = [-mean(row) for row in floats(features_cosine)]
    low, high = min(relevance), max(relevance)
    if high == low:
        return [1.0] * len(relevance)
    return [(r - low + 1e-6) / (high - low) for r in relevance]


def cdpruner(features, relevance, keep: int) -> list:
    """Greedy MAP of the determinantal point process with kernel r_i cos_ij r_j (section 8.5, paper and code), done naively.

    Every step takes the token that makes the determinant of the chosen tokens' kernel largest; the official incremental
    Cholesky form takes the same ones.  Meaningful only up to the rank of the features: beyond it every determinant is 0 but
    for rounding, and the lowest index left is taken (ours).
    """
    features, relevance = floats(features), floats(relevance)
    n = len(features)
    kernel = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            kernel[i, j] = relevance[i] * cosine(features[i], features[j]) * relevance[j]
    chosen = []
    while len(chosen) < keep:
        best, best_value = None, -math.inf
        for j in range(n):
            if j in chosen:
                continue
            rows = torch.tensor([*chosen, j])
            sign, value = torch.linalg.slogdet(kernel[rows][:, rows])
            value = float(value) if sign > 0 else -math.inf
            if best is None or value > best_value:
                best, best_value = j, value
        chosen.append(best)
    return sorted(chosen)


# --- DART (arXiv 2502.11494; section 8.6) -----------------------------------------------------------------------------
def dart(keys_visual, keys_text, normed_visual, normed_text, keep: int) -> list:
    """Tokens that duplicate the pivots least (section 8.6, code).

    ``keys_*`` [kv head, tokens, dim]: the previous layer's cached keys; ``normed_*`` [tokens, d]: the hidden states that enter
    the layer, through the model's final norm; text = everything behind the image.
    Code: pivots are the 4 visual and 4 text tokens of the largest L1 norm over all kv heads; each pivot in turn adds the
    visual tokens not yet taken of the lowest cosine with it; text pivots are then dropped.
    Ours: pivots in the order visual by falling norm, then text by falling norm (the code iterates a set); exactly ``keep``:
    every pivot adds (keep - visual pivots) // pivots, and the remainder goes one each to the first pivots.  Fewer pivots where
    there are fewer tokens (or a smaller ``keep``) than 4.
    """
    keys_visual, keys_text = floats(keys_visual), floats(keys_text)
    visual, text = floats(normed_visual), floats(normed_text)

    def norms(keys, tokens):
        return [sum(abs(x) for head in keys for x in head[token]) for token in range(tokens)]

    visual_pivots = ranking(norms(keys_visual, len(visual)))[: min(4, keep)]
    text_pivots = ranking(norms(keys_text, len(text)))[:4]
    pivots = [visual[j] for j in visual_pivots] + [text[j] for j in text_pivots]
    kept = set(visual_pivots)
    share, remainder = divmod(min(keep, len(visual)) - len(visual_pivots), len(pivots))
    for number, pivot in enumerate(pivots):
        free = [j for j in range(len(visual)) if j not in kept]
        unlike = ranking([-cosine(pivot, visual[j]) for j in free])
        kept.update(free[i] for i in unlike[: share + (number < remainder)])
    return sorted(kept)


def dart_official_count(keep: int) -> int:
    """Tokens that the official code keeps where it is told to keep ``keep``: every pivot adds int(keep / 8), beside the four
    visual pivots themselves."""
    return 4 + 8 * (keep // 8)


def dart_lightcompress_count(n: int, ratio: float) -> int:
    """Tokens that ModelTC/LightCompress's port keeps of ``n`` at reduction ``ratio``: 4 + 8 int(n (1 - ratio) / 8) (G7)."""
    return 4 + 8 * int(n * (1 - ratio) / 8)


# --- HoloV (arXiv 2510.02912; section 8.7) ----------------------------------------------------------------------------
def holov(cls_attention_mean, features, keep: int, runs: int = 16) -> list:
    """HoloV (section 8.7, code obananas/HoloV llava/model/utils.py): quotas per run of the flat sequence, then attention.

    ``cls_attention_mean`` [n]: head mean of the CLS row of block -2; ``features`` [n, d] behind the projector.
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


# --- VScan (arXiv 2505.22654; section 8.8) ----------------------------------------------------------------------------
def vscan(cls_local, cls_global, features, rows: int, columns: int, keep: int) -> tuple[list, torch.Tensor]:
    """VScan's stage before the language model (section 8.8, code): kept ids and their features [keep, d] after merging.

    ``cls_local`` [n] and ``cls_global`` [n]: head-mean CLS rows of block 5 and of block -2; ``features`` [n, d] behind the
    projector.  Code: (keep // 2) // 16 patches per window by ``cls_local``, 4 x 4 windows; the rest by ``cls_global`` among
    the patches not yet taken; every patch not kept is added to the kept one of the highest cosine (of the features before
    merging), which is then divided by 1 + the number added.
    Ours: window = (row * 4 // rows, column * 4 // columns), which is the code's on its 24 x 24 grid; exactly ``keep``, so what
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


# --- ToMe (arXiv 2210.09461; not in the papers file) ------------------------------------------------------------------
def tome(features, keep: int) -> tuple[list, torch.Tensor]:
    """Bipartite soft matching, repeated until ``keep`` tokens are left: kept positions, merged features [keep, d].

    Code (facebookresearch/ToMe tome/merge.py): the even tokens of the current sequence are set A, the odd ones set B; each A
    draws an edge to the B of the highest cosine; the r best edges are merged, at most half the tokens (n // 2) at a time; a
    merged token is the mean weighted by how many original tokens each side stands for.
    Ours: cosines of the features themselves (ToMe: the block's head-mean keys), as this runs behind the tower and repeats
    without blocks between; a merged token stands at its B's place and the sequence stays in raster order (ToMe puts the
    unmerged A's first, so its later even/odd split differs).
    """
    sequence = [(position, feature, 1) for position, feature in enumerate(floats(features))]
    while len(sequence) > keep:
        set_a, set_b = sequence[0::2], sequence[1::2]
        similarity = [[cosine(a[1], b[1]) for b in set_b] for a in set_a]
        partner = [ranking(row)[0] for row in similarity]
        merges = min(len(sequence) - keep, len(sequence) // 2)
        merged = ranking([row[b] for row, b in zip(similarity, partner, strict=True)])[:merges]
        left = [a for index, a in enumerate(set_a) if index not in merged]
        for index, (position, feature, size) in enumerate(set_b):
            sources = [set_a[a][1:] for a in merged if partner[a] == index] + [(feature, size)]
            total = sum(weight for _, weight in sources)
            columns = zip(*([weight * x for x in source] for source, weight in sources), strict=True)
            left.append((position, [sum(column) / total for column in columns], total))
        sequence = sorted(left)
    positions, tokens, _ = zip(*sequence, strict=True)
    return list(positions), torch.tensor(tokens, dtype=torch.float64)


# --- AdaptInfer's offline schedule (arXiv 2508.06084; section 4.4) ----------------------------------------------------
def change_point(values) -> int:
    """Where a curve over layers changes most: the last index before its best single l2 breakpoint (section 4.4).

    ``values``: for AdaptInfer one token's attention, summed cumulatively over layers by the caller.  The breakpoint c in
    1..L-1 splits it into values[:c] and values[c:] with the smallest squared error around the two means; returned is c - 1,
    "breakpoint - 1" of the paper's procedure.
    Ours: c may leave a segment of one value and the lower c wins a tie (``ruptures.Binseg`` demands at least two values a
    side, and takes the higher).
    """
    values = floats(values)

    def error(segment):
        centre = mean(segment)
        return sum((x - centre) ** 2 for x in segment)

    gains = [-(error(values[:c]) + error(values[c:])) for c in range(1, len(values))]
    return ranking(gains)[0]
