"""Redistribution in a whole model as the papers write it.

`Explicit` puts a paper's loops (`redistribution/loops/`) in the place of a stock eager model's attention; it shares no code
with vlmprune. Marks are made from the prompt alone, whatever is teacher-forced behind it.
"""

from __future__ import annotations

import sys

import torch
from oracles import decoder_layers, image_columns
from redistribution.loops.plain import softmax


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
