"""Attention masks of shortened sequences, and what a given mask shows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from vlmprune.errors import UsageError

BLOCK = 128
"""Rows and columns of a block of flex attention's masks, as in transformers'."""


MASKED = -1e4
"""What is added to a score to mask it: this or less, by custom. Its share of a softmax is zero in every dtype."""


def pruned_mask(
    query_slots: Tensor,
    query_valid: Tensor,
    key_slots: Tensor,
    key_valid: Tensor,
    dense: bool,
    implementation: str,
    dtype: torch.dtype,
    window: int | None = None,
    causal: bool = True,
) -> Tensor | BlockMask | None:
    """The mask of a shortened sequence, in the form the attention implementation expects.

    Args:
        query_slots, query_valid: `[batch, query]` slots, and False on left padding.
        key_slots, key_valid: `[batch, key]` the same of all stored entries, the queries' own last.
        dense: no padding among queries and keys.
        implementation: the model's own: sdpa (bool mask), eager (additive mask), flash_attention_* (2-D mask) or
            flex_attention (block mask).
        dtype: dtype of an additive mask.
        window: how many slots a query sees, its own among them; None if it sees all.
        causal: False where a query sees the keys after it, too.

    Returns:
        None where the implementation sees the same by itself, or one query sees everything; else `[batch, 1, query, key]`
        (flash: `[batch, key]`).
    """
    queries, keys = query_slots.shape[1], key_slots.shape[1]
    if "flash" in implementation:
        return None if dense else key_valid
    if implementation == "flex_attention":  # without a mask it is not causal
        if window is not None:
            return window_mask(query_slots, key_slots, key_valid, window)
        return None if dense and queries == 1 else block_mask(queries, key_valid, dense, causal)
    if dense and window is None and (queries == 1 or queries == keys) and implementation != "eager":
        return None
    visible = key_valid[:, None, :].expand(-1, queries, -1)
    if causal:
        visible = visible & (key_slots[:, None, :] <= query_slots[:, :, None])
    if window is not None:
        visible = visible & (key_slots[:, None, :] > query_slots[:, :, None] - window)
    if not dense:
        visible = visible if causal or window is not None else visible.clone()
        # Padding rows see themselves: an empty row would be NaN, and NaN times zero is NaN in the rows that matter.
        own = torch.arange(keys - queries, keys, device=visible.device)
        visible[:, torch.arange(queries, device=visible.device), own] |= ~query_valid
    visible = visible[:, None]
    if implementation == "eager":
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)
    return visible


def block_mask(queries: int, key_valid: Tensor, dense: bool = False, causal: bool = True) -> BlockMask:
    """Flex attention's mask of `queries` rows, the last of the keys: of the keys up to each, those that are no padding.

    Entries stand in the order of time, so that their places say what is causal. Which blocks are empty, full or neither is
    known from the first valid key of each block; nothing of size query × key is built, and nothing is compiled. Rows that see
    nothing become zero in flex attention.

    Args:
        queries: number of rows.
        key_valid: `[batch, key]` bool, False on padding.
        dense: there is no padding.
        causal: False where every row sees all keys.
    """
    device, keys = key_valid.device, key_valid.shape[1]
    offset = keys - queries if causal else keys

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        before = key <= query + offset
        # A tensor that is looked up here does not follow the mask to the device of another layer.
        return before if dense else before & key_valid[batch, key]

    first_row = torch.arange(0, queries, BLOCK, device=device)
    blocks = -(-keys // BLOCK)
    valid = torch.nn.functional.pad(key_valid, (0, blocks * BLOCK - keys)).unflatten(1, (blocks, BLOCK))
    place = torch.arange(blocks * BLOCK, device=device).view(blocks, BLOCK)
    first_key = place.masked_fill(~valid, blocks * BLOCK + keys).amin(dim=2)  # beyond every row where there is none
    seen = first_key[:, None] <= (first_row + BLOCK - 1 + offset)[:, None]  # [batch, block of queries, block of keys]
    full = valid.all(dim=2)[:, None] & (place[:, -1] <= (first_row + offset)[:, None])
    full &= (first_row + BLOCK <= queries)[:, None]  # nor are blocks full that hang over the last row

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks of keys, and which, in rising order: `[batch, 1, block of queries]` and `[…, block of keys]`."""
        order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(dim=-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]

    return BlockMask.from_kv_blocks(
        *listed(seen & ~full), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(queries, keys)
    )


def window_mask(query_slots: Tensor, key_slots: Tensor, key_valid: Tensor, window: int) -> BlockMask:
    """Flex attention's mask of rows that see a window. Slots are compared: places do not say how far apart these are."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query_slots[batch, query] - key_slots[batch, key]
        return (distance >= 0) & (distance < window) & key_valid[batch, key]

    batch, queries = query_slots.shape
    return create_block_mask(visible, batch, None, queries, key_slots.shape[1], device=str(key_slots.device), BLOCK_SIZE=BLOCK)


def not_masked(mask: Tensor) -> Tensor:
    """Which cells of a bool or additive mask can be seen."""
    return mask if mask.dtype == torch.bool else mask > MASKED


def shown(mask: Tensor | BlockMask, batch: int, queries: int, past: int) -> Tensor:
    """`[batch, query, key]` bool: what a given mask shows to each row, to any head; `past + queries` keys.

    Args:
        mask: bool or additive `[batch or 1, head or 1, query, key or more]`, or a block mask.
        batch, queries, past: shape of the call.

    Raises:
        UsageError: it is of another kind.
    """
    keys = past + queries
    if isinstance(mask, BlockMask):
        rows = torch.arange(queries, device=mask.kv_num_blocks.device).expand(batch, queries)
        return visible_in_rows(mask, rows, keys)
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[2] != queries or mask.shape[3] < keys:
        found = f"a tensor of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise UsageError(
            f"attention_mask is {found}, where {queries} tokens follow {past}: give [batch, tokens so far] or "
            f"[batch, 1, {queries}, {keys}]."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise UsageError(f"an attention_mask with 4 axes is True and False, or added to scores: found {mask.dtype}.")
    return not_masked(mask)[..., :keys].any(dim=1).expand(batch, -1, -1)


def shown_cells(mask: Tensor | BlockMask, rows: Tensor, columns: Tensor, slots: int) -> Tensor:
    """`[batch, row, column]` bool: whether `mask`, as in `part_of_mask`, shows to `rows` `[batch, row]` the `columns`
    `[batch, column]`."""
    there, columns = _in_mask(mask, columns, slots)
    if isinstance(mask, BlockMask):
        seen = visible_in_rows(mask, rows, int(mask.shape[-1]))
    else:
        visible = not_masked(mask).to(rows.device).any(dim=1).expand(len(rows), -1, -1)
        seen = visible.gather(1, rows[..., None].expand(-1, -1, visible.shape[2]))
    return seen.gather(2, columns[:, None].expand(-1, rows.shape[1], -1)) & there[:, None]


def _in_mask(mask: Tensor | BlockMask, columns: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Which of some slots `[batch, column]` a mask has columns for, and these; it may leave out the first of `slots`."""
    left_out = max(slots - int(mask.shape[-1]), 0)
    return columns >= left_out, (columns - left_out).clamp_min(0)


def part_of_mask(
    mask: Tensor | BlockMask, rows: Tensor, rows_valid: Tensor, columns: Tensor, columns_valid: Tensor, slots: int
) -> Tensor | BlockMask:
    """The cells of a given mask that belong to what a shortened layer computes and stores.

    Args:
        mask: as in `shown`.
        rows, rows_valid: `[batch, query]` places in the call's sequence, and False on left padding.
        columns, columns_valid: `[batch, key]` slots of all stored entries, the queries' own last. Where the mask has fewer
            columns than the conversation has slots, it leaves out the first, which no row sees.
        slots: of the conversation.

    Returns:
        The same kind of mask, `[batch, head or 1, query, key]`.
    """
    queries, keys = rows.shape[1], columns.shape[1]
    there, columns = _in_mask(mask, columns, slots)
    columns_valid = columns_valid & there
    if isinstance(mask, BlockMask):
        see = mask.mask_mod

        def kept(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return see(batch, head, rows[batch, query], columns[batch, key]) & columns_valid[batch, key]

        return create_block_mask(kept, len(rows), None, queries, keys, device=str(rows.device), BLOCK_SIZE=BLOCK)
    mask = mask.to(rows.device).expand(len(rows), -1, -1, -1)
    part = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    part = part.gather(3, columns[:, None, None].expand(-1, mask.shape[1], queries, -1))
    masked, seen = (False, True) if mask.dtype == torch.bool else (torch.finfo(mask.dtype).min, 0)
    part = part.masked_fill(~columns_valid[:, None, None], masked)
    place = torch.arange(keys, device=rows.device)
    own = place[keys - queries :, None] == place
    return part.masked_fill(~rows_valid[:, None, :, None] & own, seen)  # padding rows see themselves: none may be empty


def visible_in_rows(mask: BlockMask, rows: Tensor, keys: int) -> Tensor:
    """`[batch, row, key]` bool: what flex attention's `mask` shows to the query rows `[batch, row]`, to all heads alike."""
    device = rows.device
    see = torch.vmap(mask.mask_mod, in_dims=(None, None, None, 0))
    see = torch.vmap(torch.vmap(see, in_dims=(None, None, 0, None)), in_dims=(0, None, 0, None))
    return see(torch.arange(len(rows), device=device), rows.new_zeros(()), rows, torch.arange(keys, device=device))
