"""ToMe (arXiv:2210.09461), loop by loop."""

from __future__ import annotations

import torch
from methods.loops.plain import cosine, floats, ranking


def tome(features, keep: int) -> tuple[list, torch.Tensor]:
    """Bipartite soft matching, repeated until `keep` tokens are left: kept positions, merged features [keep, d].

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
