"""Attention that methods look at: of the decoder layer before a stage, and of the stage's own layer, computed ahead of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache

from vlmprune.adapters.family import Family
from vlmprune.kernels.attention_mass import attention_rows
from vlmprune.live.attention import rows_attention
from vlmprune.live.cache_layer import Pruned
from vlmprune.live.call import Call, Projections
from vlmprune.live.decoder import attention_of
from vlmprune.live.masks import shown_cells
from vlmprune.live.prompt_rows import in_shortened, prompt_ends, text_after_pictures
from vlmprune.live.section import complete_entries
from vlmprune.view import LAST_ROW, PROJECTIONS, TEXT_ROWS


def see_attention(
    call: Call,
    layer: int,
    needs: frozenset[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float,
) -> None:
    """Record what methods look at in the attention of the layer before a stage."""
    prompt = call.prompt
    assert prompt is not None
    # Inside `torch.autocast`, rotated queries and keys are fp32, and values have the dtype of what the model returns.
    key, value = key.to(query.dtype), value.to(query.dtype)
    here = query.shape[2]  # keys of earlier turns come before these, and are no candidates
    if key.shape[2] > (there := call.past + call.sequence):  # a static cache's empty places, in a layer that dropped nothing
        key, value = key[:, :, :there], value[:, :, :there]
        attention_mask = attention_mask[..., :there] if isinstance(attention_mask, Tensor) else None
    last = prompt_ends(call, here).to(query.device)
    if needs & LAST_ROW:
        prompt.attention[layer] = rows_attention(query, key, attention_mask, scaling, last)[..., -here:]
    if needs & TEXT_ROWS:
        rows = in_shortened(call, text_after_pictures(call).rows).to(query.device)
        prompt.text_attention[layer] = rows_attention(query, key, attention_mask, scaling, rows)[..., -here:]
    if needs & PROJECTIONS:
        key, value = key[:, :, -here:], value[:, :, -here:]
        samples = torch.arange(len(last), device=last.device)[:, None]
        prompt.projections[layer] = Projections(query[samples, :, last], value[samples, :, last], key, value)


def attention_ahead(
    call: Call,
    family: Family,
    layer: Any,
    index: int,
    hidden: Tensor,
    arguments: dict[str, Any],
    cache: Cache | None,
    mask: Any = None,
    window: int | None = None,
) -> Tensor:
    """`[batch, head, segment, token]` attention from the last prompt token to what enters a decoder layer, ahead of that layer.

    Queries and keys are those of the layer's own code (norms, projections, rotary embedding), run up to its attention.

    Args:
        layer, index: the decoder layer that has not run yet, and its number.
        hidden: `[batch, token, dim]` entering it.
        arguments: what it is given for these rows, its rotary embeddings among it.
        cache: what earlier turns left; it gets its share of the attention.
        mask: the layer's own, if every cell of it counts.
        window: how many slots a token sees, or None.
    """
    prompt = call.prompt
    assert prompt is not None
    batch, tokens, _ = hidden.shape
    row = prompt_ends(call, tokens).to(hidden.device)
    given = {"attention_mask": None, "position_ids": None, "past_key_values": None, "use_cache": False, **arguments}
    own = attention_of(layer, family.attention, hidden, **given)
    key, row = own.key, row.to(own.key.device)
    query = own.query.gather(2, row[:, None, :, None].expand(-1, own.query.shape[1], -1, own.query.shape[3]))
    valid = prompt.layout.real if call.section.rows is None else call.section.rows.valid
    visible = valid.to(key.device)[:, None] & (torch.arange(tokens, device=key.device) <= row[..., None])
    here = torch.arange(tokens, device=row.device).expand(batch, -1) if call.section.rows is None else call.section.rows.rows
    slots = here.to(row.device) + call.past
    if call.past and cache is not None:
        stored: Any = cache.layers[index]
        entries = stored.entries if isinstance(stored, Pruned) else complete_entries(call, stored)
        before, seen = entries.slots.to(row.device), entries.valid.to(row.device)
        seen = seen[:, None].expand(-1, visible.shape[1], -1)
        earlier = stored.filled[0] if isinstance(stored, Pruned) else stored.keys[:, :, : entries.slots.shape[1]]
        key, visible = torch.cat((earlier, key), dim=2), torch.cat((seen, visible), dim=2)
        slots = torch.cat((before, slots), dim=1)
    if mask is not None or window is not None:
        mine = slots.gather(1, row + slots.shape[1] - tokens)
        if mask is not None:
            visible &= shown_cells(mask, mine - call.past, slots, call.past + call.sequence)
        elif window is not None:
            visible &= slots[:, None] > mine[..., None] - window
    return attention_rows(query, key, own.scaling, visible)[..., -tokens:]
