"""EViT (arXiv:2202.07800), loop by loop."""

from __future__ import annotations

import copy
import math

import torch
from methods.loops.plain import mean, softmax, top


def evit_counts(patches: int, keep: int, steps: int) -> list:
    """Patches that leave each of `steps` blocks: the same share at each, as in the paper; the last leaves `keep`.

    Ours: the share follows from `keep`, which counts the fused patch; each count is rounded (halves to even).
    """
    counts = []
    for step in range(steps):
        left = steps - step
        patches = min(patches, max(round(patches * (keep / patches) ** (1 / left)), min(keep, patches)))
        counts.append(patches)
    return counts


def evit_step(attention: list, hidden: list, leave: int, fuse: str = "sum") -> tuple[list, list]:
    """One block (paper, equation 5 and 6): which patches stay, and what they are.

    `attention`: mean over heads of the CLS token's attention to each patch; `hidden` [patch, dim].
    Paper: the k highest stay, and x_f = sum over the others of a_i x_i is one more token.
    Ours: k = leave - 1, and x_f takes the place of the highest of the others. A single patch that is to be left is the highest
    one, and nothing is fused.
    """
    if leave >= len(attention):
        return list(range(len(attention))), hidden
    stay = top(attention, leave)
    if fuse == "no" or leave == 1:
        return stay, [hidden[j] for j in stay]
    attentive = top(attention, leave - 1)
    (place,) = set(stay) - set(attentive)
    others = [j for j in range(len(attention)) if j not in attentive]
    fused = [sum(attention[j] * hidden[j][d] for j in others) for d in range(len(hidden[0]))]
    if fuse == "mean":
        total = sum(attention[j] for j in others)
        fused = [x / total for x in fused]
    return stay, [fused if j == place else hidden[j] for j in stay]


def evit_clip(tower, pixels, keep: int, feature_block: int, blocks: list, fuse: str = "sum") -> tuple[list, torch.Tensor]:
    """EViT inside a stock `CLIPVisionModel` for one picture: raster ids of the patches that leave, and their features.

    `pixels` [3, H, W]. The features are those that leave block `feature_block`, without CLS; float64 throughout.
    Ours: patches are dropped behind a whole block.
    """
    tower = copy.deepcopy(tower).double().eval()
    heads = tower.config.num_attention_heads
    with torch.no_grad():
        hidden = tower.pre_layrnorm(tower.embeddings(pixels.double()[None]))[0]  # [1 + patches, width]
        dim = hidden.shape[1] // heads
        ids = list(range(len(hidden) - 1))
        counts = dict(zip(blocks, evit_counts(len(ids), keep, len(blocks)), strict=True))
        for index in range(feature_block + 1):
            layer = tower.encoder.layers[index]
            normed = layer.layer_norm1(hidden)
            q, k, v = (
                torch.stack(project(normed).split(dim, dim=1))  # [head, token, dim]
                for project in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            )
            weights = [(q[head] @ k[head].T / math.sqrt(dim)).softmax(1) for head in range(heads)]
            mixed = [weights[head] @ v[head] for head in range(heads)]
            hidden = hidden + layer.self_attn.out_proj(torch.cat(mixed, dim=1))
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
            if index in counts:
                rows = [
                    softmax([float(q[head, 0] @ k[head, j]) / math.sqrt(dim) for j in range(len(hidden))])
                    for head in range(heads)
                ]
                attention = [mean([row[1 + j] for row in rows]) for j in range(len(ids))]
                stay, patches = evit_step(attention, hidden[1:].tolist(), counts[index], fuse)
                hidden = torch.cat([hidden[:1], torch.tensor(patches, dtype=torch.float64)])
                ids = [ids[j] for j in stay]
    return ids, hidden[1:]
