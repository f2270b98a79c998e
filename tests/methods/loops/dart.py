"""DART (arXiv:2502.11494), loop by loop."""

from __future__ import annotations

from methods.loops.plain import cosine, floats, ranking


def dart(keys_visual, keys_text, normed_visual, normed_text, keep: int) -> list:
    """Tokens that duplicate the pivots least (code).

    `keys_*` [kv head, tokens, dim]: the previous layer's cached keys; `normed_*` [tokens, d]: the hidden states that enter
    the layer, through the model's final norm; text = everything behind the image.
    Code: pivots are the 4 visual and 4 text tokens of the largest L1 norm over all kv heads; each pivot in turn adds the
    visual tokens not yet taken of the lowest cosine with it; text pivots are then dropped.
    Ours: pivots in the order visual by falling norm, then text by falling norm (the code iterates a set); exactly `keep`:
    every pivot adds (keep - visual pivots) // pivots, and the remainder goes one each to the first pivots.  Fewer pivots where
    there are fewer tokens (or a smaller `keep`) than 4.
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
    """Tokens that the official code keeps where it is told to keep `keep`: every pivot adds int(keep / 8), beside the four
    visual pivots themselves."""
    return 4 + 8 * (keep // 8)


def dart_lightcompress_count(n: int, ratio: float) -> int:
    """Tokens that ModelTC/LightCompress's port keeps of `n` at reduction `ratio`: 4 + 8 int(n (1 - ratio) / 8)."""
    return 4 + 8 * int(n * (1 - ratio) / 8)
