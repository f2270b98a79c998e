"""FlowCut (arXiv:2505.19536), loop by loop."""

from __future__ import annotations

import copy
import math

import torch
from methods.loops.plain import dot, floats, mean, mean_of, normalised, softmax, top


def flowcut_terms(query_g, keys, value_g, values, scaling: float, semantic_scaling: float) -> tuple[list, list, list]:
    """Relation, semantic and magnitude of every token, as lists of n numbers (FlowCut).

    `query_g` and `value_g` [head, dim] belong to the global token, `keys` and `values` [head, n, dim] to the tokens.
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
    """S = (a / sum a + s / sum s) d (paper and code agree)."""
    return [(x + y) * z for x, y, z in zip(normalised(a), normalised(s), d, strict=True)]


def flowcut_smoothed(before: list | None, now: list) -> list:
    """C = S in the first block, 0.5 C + 0.5 S afterwards (FlowCut)."""
    return now if before is None else [0.5 * x + 0.5 * y for x, y in zip(before, now, strict=True)]


def flowcut_entropy_ratio(a) -> float:
    """r_H = entropy of the renormalised `a` over log n (FlowCut).

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
    """How many of `n` patches an active block drops (FlowCut).

    Paper and code: round((n - target) / sqrt(remaining) (1 - r_h^2)), with Python's (and torch's) rounding of halves to even;
    `n` and `target` count patches, without the CLS slot.  Code: the last active block (`remaining` = 0) drops down to
    exactly `target`, and no block ever goes below it.
    """
    if n <= target:
        return 0
    if remaining == 0:
        return n - target
    return min(n - target, round((n - target) / math.sqrt(remaining) * (1 - r_h**2)))


def flowcut_counts(n: int, target: int, blocks: int = 24, r_h: float = 0.9) -> list:
    """Patches left behind every active block if the entropy ratio were `r_h` throughout (FlowCut).

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
    """FlowCut inside a stock `CLIPVisionModel` for one picture (code): survivors' raster ids and features.

    `pixels` [3, H, W].  The features are those that leave block `feature_block` (22 of 24 in LLaVA), without CLS.
    Code: relation and semantic softmax run over CLS and patches and are then cut to the patches; a block's score is updated
    while more than `keep` patches are left; block i is active if R = feature_block - i - 1 is even.
    `semantic_scale`: "code" has no scale in the semantic softmax, "paper" has 1 / sqrt(dim); CLS is inside in both.
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
                dropped = flowcut_prune_count(len(ids), keep, remaining, flowcut_entropy_ratio(a))
                chosen = top(cumulative, len(ids) - dropped)
                hidden = torch.stack([hidden[0]] + [hidden[1 + j] for j in chosen])
                ids, cumulative = [ids[j] for j in chosen], [cumulative[j] for j in chosen]
    return ids, hidden[1:]


def flowcut_llm(query_last, keys, value_last, values, scaling: float, keep: int) -> list:
    """Which visual tokens FlowCut keeps inside the language model (section 3.5, LLaVA-NeXT code).

    `query_last` [head, dim] and `value_last` [head or kv head, dim] are the last prompt token's, `keys` and `values`
    [kv head, n, dim] the visual tokens'; with fewer kv heads each is repeated, as in GQA.
    Code: both softmaxes over the visual tokens only, here both with `scaling`; norm of the head-mean; sums normalised (the
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
    """Score of every merge unit of a tower without CLS (ours, on the paper's formulas).

    `blocks`: the tower's (q, k, v), each [head, n, dim] of one picture, in depth order; n a multiple of `unit`.
    Paper: the global token is the mean-pooled one, S and its smoothing as everywhere.  Ours: pooled q for the relation (after
    RoPE, as the Qwen code does), pooled v for the semantic term, whose scale is 1 / sqrt(dim); a unit's score is the mean of
    its consecutive `unit` rows; nothing is dropped inside the tower.
    """
    cumulative = None
    for q, k, v in blocks:
        terms = flowcut_terms(pooled(q), k, pooled(v), v, scaling, 1 / math.sqrt(v.shape[-1]))
        cumulative = flowcut_smoothed(cumulative, flowcut_score(*terms))
    assert len(cumulative) % unit == 0
    return [mean(cumulative[start : start + unit]) for start in range(0, len(cumulative), unit)]


def flowcut_qwen_official_scores(q, k, v, scaling: float) -> list:
    """One block's score of every patch in the official Qwen2-VL tower (code): a_j d_j.

    a with the query mean-pooled over tokens, softmax over all tokens, mean over heads; d the L1 norm of the head-mean value.
    No semantic term and no renormalisation, unlike the paper.
    """
    a, _, d = flowcut_terms(pooled(q), k, pooled(v), v, scaling, 1.0)
    return [x * y for x, y in zip(a, d, strict=True)]
