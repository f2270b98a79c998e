"""What a tower must compute for the patches that enter it, from the stock model alone. No code is shared with vlmprune.

hidden     The tower runs at full length, and in every block the patches of dropped tokens are hidden from attention.
shorter    The patches of kept tokens, with the positions that they had in the whole picture, are run through the tower's own
           blocks and mergers, one after the other, as a list that never had any others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_window_index

NAME = "hidden_patches"


def in_order(model: Any, grids: Tensor, keep: Sequence[Tensor]) -> Tensor:
    """`[token]` bool of all pictures, in the order of a packed tower's blocks; `keep` `[token]` of each, row by row."""
    tower = model.model.visual
    tokens = torch.cat(list(keep))
    if not hasattr(tower, "window_size"):
        return tokens
    index, _ = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return tokens[index]


class _Hiding:
    """An attention function that hides columns; `begin` says which ones of the next segments."""

    def __init__(self, patches: Tensor | None) -> None:
        self.patches, self.segments = patches, iter(())

    def begin(self, module: Any, args: tuple, kwargs: dict) -> None:
        if "cu_seqlens" in kwargs:
            self.segments = iter(self.patches.split(kwargs["cu_seqlens"].diff().tolist()))

    def __call__(self, module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        seen = next(self.segments, None)
        seen = self.patches if seen is None else seen[None]  # [1 or crop, column]
        allowed = seen[:, None, None] | torch.eye(key.shape[2], dtype=torch.bool)  # a row that sees nothing would be NaN
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)
        return out.transpose(1, 2).contiguous(), None


@contextmanager
def hidden_patches(model: Any, keep: Sequence[Tensor], grids: Tensor | None = None, before: int = 1) -> Iterator[None]:
    """Inside the block, the tower's attention does not see the patches of dropped tokens.

    Args:
        keep: per picture, or crop, `[token]` bool, row by row.
        grids: of a packed tower.
        before: tokens before the patches, of another one.
    """
    if grids is None:
        tower = model.model.vision_tower
        blocks = tower.encoder.layers
        patches = torch.nn.functional.pad(torch.stack(list(keep)), (before, 0), value=True)
    else:
        tower = model.model.visual
        blocks, patches = tower.blocks, in_order(model, grids, keep).repeat_interleave(tower.spatial_merge_size**2)
    hiding, old = _Hiding(patches), tower.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(NAME, hiding)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)
    tower.config._attn_implementation = NAME
    handles = [block.register_forward_pre_hook(hiding.begin, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        tower.config._attn_implementation = old
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._local_mapping.pop(NAME, None)
            registry._global_mapping.pop(NAME, None)


class _EnoughError(Exception):
    pass


@torch.no_grad()
def shorter_features(model: Any, pixels: Tensor, grids: Tensor, keep: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Features `[kept, dim]` of the kept tokens of all pictures, row by row, and what leaves the tower early of them.

    What enters the first block is the stock tower's own (patch embedding, positions); from there on nothing else is there.
    """
    tower, seen = model.model.visual, {}

    def enter(index: int):
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            seen[index] = args[0], kwargs
            if index == len(tower.blocks) - 1:
                raise _EnoughError

        return hook

    handles = [block.register_forward_pre_hook(enter(n), with_kwargs=True) for n, block in enumerate(tower.blocks)]
    try:
        tower(pixels, grid_thw=grids)
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    unit = tower.spatial_merge_size**2
    stays = in_order(model, grids, keep).repeat_interleave(unit)
    hidden, early = seen[0][0][stays], []
    for index, block in enumerate(tower.blocks):
        kwargs = seen[index][1]
        lengths = [int(part.sum()) for part in stays.split(kwargs["cu_seqlens"].diff().tolist())]
        ends = torch.tensor(np.cumsum([0, *(length for length in lengths if length)]), dtype=torch.int32)
        rotary = tuple(part[stays] for part in kwargs["position_embeddings"])
        hidden = block(hidden, cu_seqlens=ends, position_embeddings=rotary)
        if index in getattr(tower, "deepstack_visual_indexes", ()):
            merger = tower.deepstack_merger_list[list(tower.deepstack_visual_indexes).index(index)]
            early.append(merger(hidden))
    if hasattr(tower, "downsample"):  # GLM-V
        side = tower.spatial_merge_size
        hidden = tower.post_layernorm(hidden).view(-1, side, side, hidden.shape[-1]).permute(0, 3, 1, 2)
        hidden = tower.downsample(hidden).view(-1, tower.config.out_hidden_size)
    features = tower.merger(hidden)
    if hasattr(tower, "window_size"):  # back from windows to rows
        index, _ = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
        features = features[index[in_order(model, grids, keep)].argsort()]
    return features, early
