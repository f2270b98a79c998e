"""Which rows of a layer are edited, which keys they see, and how edited rows are put among the model's own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlmprune.device import on_device
from vlmprune.live.cache_layer import Marked, Pruned
from vlmprune.live.call import Call
from vlmprune.live.marking import computed
from vlmprune.live.rows import Reduction
from vlmprune.methods.redistributing import Rows


def find_rows(call: Call, kind: Rows, batch: int, tokens: int, device: torch.device) -> Reduction | None:
    """The rows of a kind among the `tokens` query rows of the current layer; None for all of them."""
    if call.prompt is None:  # decoding, candidates of assisted decoding, or a turn without an image: all after the image
        wanted = max(call.logits_wanted, 1)
        if kind != "last" or wanted >= tokens:
            return None
        rows = torch.arange(tokens - wanted, tokens, device=device).expand(batch, wanted)
        return Reduction(rows, torch.ones_like(rows, dtype=torch.bool), True)
    if kind == "all":
        return None
    tokens_of = call.prompt.tokens
    begin, place = tokens_of.end, np.arange(call.sequence)
    if kind == "behind":
        # The text begins after all placeholders of the last image; LLaVA-NeXT's end with a row separator, which is no text.
        # A prompt without an image has no such text; in a later turn, all of it comes after the images of earlier turns.
        begin = np.where(tokens_of.visual, place + 1, 0).max(axis=1)
        begin[begin == 0] = 0 if call.past else call.sequence
    wanted_rows = tokens_of.real & (place >= begin[:, None])
    edited = Reduction.keeping(
        computed(call, on_device(wanted_rows, call.prompt.layout.real.device)), wanted_rows.sum(axis=1).tolist()
    )
    return Reduction(edited.rows.to(device), edited.valid.to(device), edited.dense)


def keys_valid(call: Call, layer: Marked, key: Tensor) -> Tensor | None:
    """`[batch, key]` bool, False on padding; None if there is none."""
    if isinstance(layer, Pruned):
        dense = layer.recorded is None or layer.recorded.dense
        return None if dense else layer.entries.valid.to(key.device)
    if (rows := call.section.rows) is not None:
        return None if rows.dense else rows.valid.to(key.device)
    if call.mask is None:
        return None
    keys = key.shape[2]
    if keys not in call.edits.valid:  # the same in every layer
        valid = call.mask[:, :keys].to(key.device, torch.bool)
        # Read on a CPU only, where nothing waits.
        unpadded = key.device.type == "cpu" and valid.shape[1] == keys and bool(valid.all())
        call.edits.valid[keys] = None if unpadded else valid
    return call.edits.valid[keys]


def overwritten(output: Tensor, edited: Tensor, rows: Reduction | None, changed: Tensor | None) -> Tensor:
    """`[batch, query, head, dim]` with some rows replaced.

    Args:
        output: the model's own.
        edited: `[batch, row, head, dim]`.
        rows: where the edited rows are; None for all.
        changed: `[batch, row, head]` bool, heads that are replaced; None for all.
    """
    if rows is None:
        return edited if changed is None else torch.where(changed[..., None], edited, output)
    index = rows.rows[:, :, None, None].expand(-1, -1, *output.shape[2:])
    own = output.gather(1, index)
    new = edited if changed is None else torch.where(changed[..., None], edited, own)
    if not rows.dense:
        new = torch.where(rows.valid[:, :, None, None], new, own)
    return output.scatter(1, index, new)
