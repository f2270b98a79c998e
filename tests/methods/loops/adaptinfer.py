"""AdaptInfer (arXiv:2508.06084), loop by loop."""

from __future__ import annotations

from methods.loops.plain import floats, mean, ranking, top


def adaptinfer(among, seen, keep: int) -> list[int]:
    """Kept ids: words weigh by the attention among words, symmetrised, and score tokens by it.

    `among` [head, text, text] is the attention among words, `seen` [head, text, visual] that of words to visual tokens.
    """
    among, seen = floats(among), floats(seen)
    words, visual = range(len(among[0])), range(len(seen[0][0]))
    scores = [0.0 for _ in visual]
    for m, a in zip(among, seen, strict=True):
        for t in words:
            weight = sum(m[u][t] + m[t][u] - (m[t][t] if u == t else 0.0) for u in words)
            for j in visual:
                scores[j] += weight * a[t][j]
    return top(scores, keep)


def change_point(values) -> int:
    """Where a curve over layers changes most: the last index before its best single l2 breakpoint.

    `values`: for AdaptInfer one token's attention, summed cumulatively over layers by the caller.  The breakpoint c in
    1..L-1 splits it into values[:c] and values[c:] with the smallest squared error around the two means; returned is c - 1,
    "breakpoint - 1" of the paper's procedure.
    Ours: c may leave a segment of one value and the lower c wins a tie (`ruptures.Binseg` demands at least two values a
    side, and takes the higher).
    """
    values = floats(values)

    def error(segment):
        centre = mean(segment)
        return sum((x - centre) ** 2 for x in segment)

    gains = [-(error(values[:c]) + error(values[c:])) for c in range(1, len(values))]
    return ranking(gains)[0]
