"""VisionZip (arXiv:2412.04467), loop by loop."""

from __future__ import annotations

import torch
from methods.loops.plain import cosine, floats, mean_of, ranking, top


def visionzip(cls_attention, keys, features, keep: int, contextual: int) -> tuple[list, list, torch.Tensor]:
    """VisionZip (code): dominant ids, target ids (both raster order), contextual features [contextual, dim].

    `cls_attention` [head, patch] and `keys` [head, patch, dim] of block -2, `features` [patch, dim] that leave it.
    Code: dominant by CLS attention summed over heads; of the R others in raster order every max(1, R // contextual)-th one is
    a target, the first `contextual` of them; the rest join the target of the highest cosine of head-mean keys; contextual
    token = target + mean of its members (their sum, not their mean; a target without members stays as it is).
    Ours: `keep` counts patches only, so dominant = keep - contextual (the code's first dominant slot is CLS).
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
