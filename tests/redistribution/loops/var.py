"""VAR (arXiv:2503.03321) as the paper writes it: the whole softmax, one row and one key at a time, then the edit."""

from __future__ import annotations

import math

import torch
from redistribution.loops.plain import softmax
from redistribution.recipes import DIMS, TAU
from tiny_models import LAYERS


def var_row(a: list[float], kinds: list[str], keep: float, max_sink_share: float, min_image_mass: float) -> list[float]:
    """arXiv:2503.03321: weights `a` of keys that are "visual", "visual sink", "text sink" or "text"."""
    mass = {kind: math.fsum(w for w, k in zip(a, kinds, strict=True) if k == kind) for kind in set(kinds)}
    sinks, others, text = (mass.get(kind, 0.0) for kind in ("visual sink", "visual", "text sink"))
    if "visual sink" not in mass or others == 0 or sinks + others < min_image_mass:
        return a
    if sinks / (sinks + others) > max_sink_share:
        return a
    out = []
    for weight, kind in zip(a, kinds, strict=True):
        if kind.endswith("sink"):
            out.append(keep * weight)
        elif kind == "visual":
            out.append(weight + (1 - keep) * (sinks + text) * weight / others)
        else:
            out.append(weight)
    return out


def phi(x: torch.Tensor, dims: list[int]) -> float:
    """Of one residual `[dim]`."""
    x = x.double()
    rms = math.sqrt(float((x * x).sum()) / len(x) + 1e-6)
    return max(abs(float(x[d])) for d in dims) / rms


def var(dims, threshold, keep, max_sink_share, min_image_mass):
    """`threshold` is tau."""
    known: dict = {}

    def sink(oracle, layer, sample, k):
        if k >= oracle.prompt or not oracle.real[sample, k]:
            return False
        name = id(oracle.hidden[layer]), layer, sample, k
        if name not in known:
            known[name] = oracle.hidden[layer], phi(oracle.hidden[layer][sample, k], dims) >= threshold
        return known[name][1]

    def kind(oracle, layer, sample, k):
        visual = k < oracle.prompt and bool(oracle.visual[sample, k])
        return ("visual" if visual else "text") + (" sink" if sink(oracle, layer, sample, k) else "")

    def edit(oracle, layer, sample, head, row, seen, scores):
        a = softmax(scores[row])
        if row < oracle.behind(sample):
            return a
        kinds = [kind(oracle, layer, sample, k) for k in seen[row]]
        return var_row(a, kinds, keep, max_sink_share, min_image_mass)

    return edit


def edited(eager, inputs):
    """The layers that the row of `cases.py` edits in the tiny models, and the edit, for `redistribution.explicit.Explicit`."""
    return range(2, LAYERS - 1), var(DIMS, TAU, 0.2, 0.6, 0.1)
