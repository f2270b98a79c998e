"""VHR (arXiv:2412.13949) as the paper writes it: the whole softmax, one row and one key at a time, then the edit."""

from __future__ import annotations

import torch
from oracles import decoder_layers


def vhr_heads(model, inputs, texts, layers):
    """Algorithm 1, one stock forward per layer and stream: heads are scaled in what enters W_O."""
    heads = model.config.text_config.num_attention_heads
    chosen: dict[int, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}

    def enter(layer):
        def hook(module, args):
            split = args[0].unflatten(-1, (heads, -1))
            seen[layer] = split[0, -1].double()
            if layer in chosen:
                return ((split * chosen[layer][:, None]).flatten(-2),)

        return hook

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(enter(n)) for n, layer in enumerate(decoder_layers(model))]
    try:
        for layer in layers:
            model(**inputs)
            seeing = seen[layer]
            model(**texts)
            blind = seen[layer]
            far = (seeing - blind).norm(dim=-1)
            size = blind.square().sum(-1)
            for h in range(heads):
                if far[h] > far.mean() + far.std(correction=0) and size[h] > size.mean() + size.std(correction=0):
                    far = far.clone()
                    far[h] = 0
                    break
            ranked = far.sort().values
            middle = (ranked[(heads - 1) // 2] + ranked[heads // 2]) / 2
            chosen[layer] = torch.where(far > middle, 2.0, 1.0).float()
        return chosen, model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
