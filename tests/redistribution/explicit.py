"""Redistribution as the papers write it: the whole softmax, one row and one key at a time, then the edit.

`Explicit` puts these loops in the place of a stock eager model's attention; it shares no code with vlmprune. Marks are made
from the prompt alone, whatever is teacher-forced behind it.
"""

from __future__ import annotations

import math
import sys

import torch
from oracles import decoder_layers, image_columns


# --- one row ---------------------------------------------------------------------------------------------------------
def softmax(scores: list[float]) -> list[float]:
    highest = max(scores)
    powers = [math.exp(score - highest) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


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


def raised(scores: list[float], shares: list[float]) -> list[float]:
    """PAI, PAINT: the softmax of scores that are raised by a share of their size."""
    return softmax([score + share * abs(score) for score, share in zip(scores, shares, strict=True)])


def zero_row(a: list[float], first: int, gain: float) -> list[float]:
    total = 1 + (gain - 1) * a[first]
    return [(gain * w if k == first else w) / total for k, w in enumerate(a)]


def act_row(a: list[float], sinks: list[bool], beta: float) -> list[float]:
    held = math.fsum(w for w, sink in zip(a, sinks, strict=True) if sink)
    rest = math.fsum(w for w, sink in zip(a, sinks, strict=True) if not sink)
    if not rest:
        return a
    return [beta * w if sink else w + (1 - beta) * held * w / rest for w, sink in zip(a, sinks, strict=True)]


def phi(x: torch.Tensor, dims: list[int]) -> float:
    """Of one residual `[dim]`."""
    x = x.double()
    rms = math.sqrt(float((x * x).sum()) / len(x) + 1e-6)
    return max(abs(float(x[d])) for d in dims) / rms


# --- a whole model ---------------------------------------------------------------------------------------------------
class Explicit:
    """Context manager: an eager model whose attention is `edit`, row by row.

    `edit(layer, row)` gets a `Row` and returns its weights; `before(layer, rows)` sees all rows of a layer first.
    """

    def __init__(self, model, inputs: dict, layers, edit):
        self.model, self.layers, self.edit = model, set(layers), edit
        self.real = inputs["attention_mask"].bool()
        self.visual = image_columns(model, inputs["input_ids"])
        self.prompt = inputs["input_ids"].shape[1]
        self.hidden: dict[int, torch.Tensor] = {}

    def __enter__(self):
        attention = type(decoder_layers(self.model)[0].self_attn)
        self.module = sys.modules[attention.__module__]
        self.stock = self.module.eager_attention_forward
        self.module.eager_attention_forward = self.attention
        self.hooks = [
            layer.register_forward_pre_hook(lambda _, args, index=index: self.hidden.__setitem__(index, args[0].detach()))
            for index, layer in enumerate(decoder_layers(self.model))
        ]
        return self

    def __exit__(self, *error):
        self.module.eager_attention_forward = self.stock
        for hook in self.hooks:
            hook.remove()

    def behind(self, sample: int) -> int:
        """First position behind the sample's last picture; beyond everything without one."""
        columns = self.visual[sample].nonzero()[:, 0]
        return int(columns[-1]) + 1 if len(columns) else 10**9

    def attention(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        layer = getattr(module, "layer_idx", None)  # vision towers have none
        if layer not in self.layers:
            return self.stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        batch, heads, rows, _ = query.shape
        share = heads // key.shape[1]
        out = torch.zeros_like(query)
        for sample in range(batch):
            for head in range(heads):
                k, v = key[sample, head // share], value[sample, head // share]
                scores = (query[sample, head].double() @ k.double().T) * scaling
                visible = attention_mask[sample, 0, :, : k.shape[0]] > torch.finfo(attention_mask.dtype).min / 2
                seen = [visible[row].nonzero()[:, 0].tolist() for row in range(rows)]
                values = [scores[row, seen[row]].tolist() for row in range(rows)]
                for row in range(rows):
                    # A prompt without a picture has nothing to redistribute, whoever stands beside it.
                    pictured = bool(self.visual[sample].any())
                    weights = self.edit(self, layer, sample, head, row, seen, values) if pictured else softmax(values[row])
                    out[sample, head, row] = (torch.tensor(weights, dtype=torch.float64) @ v[seen[row]].double()).to(out.dtype)
        return out.transpose(1, 2).contiguous(), None


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


def pai(alpha):
    def edit(oracle, layer, sample, head, row, seen, scores):
        if row < oracle.prompt - 1:
            return softmax(scores[row])
        return raised(scores[row], [alpha * float(k < oracle.prompt and oracle.visual[sample, k]) for k in seen[row]])

    return edit


def paint(alpha, beta, sets):
    """`sets`: per sample, (local, summary) columns."""

    def edit(oracle, layer, sample, head, row, seen, scores):
        if row < oracle.prompt - 1:
            return softmax(scores[row])
        local, summary = sets[sample]
        return raised(scores[row], [alpha * (k in local) + beta * (k in summary) for k in seen[row]])

    return edit


def zerotuning(gain):
    def edit(oracle, layer, sample, head, row, seen, scores):
        first = int(oracle.real[sample].nonzero()[0])
        a = softmax(scores[row])
        return zero_row(a, seen[row].index(first), gain) if first in seen[row] else a

    return edit


def act(beta, alpha):
    known: dict = {}

    def sinks(oracle, layer, sample, head, seen, scores):
        name = layer, sample, head
        if name not in known:
            real = oracle.real[sample].nonzero()[:, 0].tolist()
            rows = {row: dict(zip(seen[row], softmax(scores[row]), strict=True)) for row in real}
            means = {k: math.fsum(rows[row][k] for row in real if row >= k) / sum(row >= k for row in real) for k in real}
            known[name] = {k for k in real[1:] if means[k] > alpha / len(real)}
        return known[name]

    def edit(oracle, layer, sample, head, row, seen, scores):
        found = sinks(oracle, layer, sample, head, seen, scores)
        return act_row(softmax(scores[row]), [k in found for k in seen[row]], beta)

    return edit
