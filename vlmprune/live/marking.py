"""Marks are made here: a redistribution method is given a prompt, and returns the group of each of its tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlmprune.device import on_device
from vlmprune.kernels.grouped_attention import column_means
from vlmprune.live.call import Call
from vlmprune.live.edits import LayerInput
from vlmprune.live.layout import real_tokens
from vlmprune.live.marks import Marks
from vlmprune.live.prompt_rows import rows_now
from vlmprune.methods.redistributing import GroupEditor, Picture, Redistributor, Scene, ScoreEditor


def mark_words_only(name: str, method: Redistributor, call: Call, hidden: Tensor) -> Marks:
    """Marks of a conversation that begins without an image: none yet."""
    anchor = first_row(call, hidden) if method.compares_with_first else None
    return Marks(name, torch.zeros(hidden.shape[0], 1, 0, dtype=torch.int8), anchor=anchor, idle=True)


def mark_prompt(
    name: str, method: GroupEditor | ScoreEditor, given: LayerInput, query: Tensor, key: Tensor, scaling: float
) -> Marks:
    """Marks of a conversation whose current prompt has an image: those of earlier prompts, and this prompt's after them.

    Args:
        name: the method as its recipe string.
        method: gives the group of each token.
        given: what the layer is given.
        query, key: `[batch, head, query, dim]`, `[batch, kv_head, key, dim]` after rotary embedding.
        scaling: factor on the scores.
    """
    call, hidden, before = given.call, given.hidden, given.layer.marks
    assert hidden is not None
    past = key.shape[2] - query.shape[2]
    prompt, visual = _prompt(call, query.device)
    first = None if call.past else prompt.to(torch.int8).argmax(dim=1)
    anchor = None if before is None else before.anchor
    if method.compares_with_first and first is not None:
        anchor = first_row(call, hidden)
    position = torch.arange(past, key.shape[2], device=key.device)[None]
    see = Scene(
        hidden=hidden.detach(),
        prompt=prompt,
        visual=visual,
        first=first,
        anchor=anchor,
        pictures=_pictures(call, query.device) if method.needs else (),
        column_means=lambda: column_means(query.detach(), key.detach(), scaling, position, given.valid, prompt)[..., past:],
    )
    groups = method.groups(see)
    # A sample without an image gets no marks, also beside samples that have one.
    assert call.prompt is not None
    if not (pictured := call.prompt.tokens.visual.any(axis=1)).all():
        groups = groups * on_device(np.asarray(pictured), groups.device)[:, None, None]
    if before is not None and before.groups is not None and past:
        heads = max(before.groups.shape[1], groups.shape[1])
        earlier = before.padded(past).to(groups.device)
        groups = torch.cat((earlier.expand(-1, heads, -1), groups.expand(-1, heads, -1)), dim=2)
    # Read on a CPU only, where nothing waits; elsewhere, factors of 1 leave every number as it was.
    idle = groups.device.type == "cpu" and not bool(groups.any())
    return Marks(name, groups, anchor=anchor, idle=idle)


def first_row(call: Call, hidden: Tensor) -> Tensor:
    """`[batch, dim]` fp32 residual of the first token of every conversation that begins with this call."""
    batch, tokens, _ = hidden.shape
    own = call.prompt is not None
    real = _prompt(call, hidden.device)[0] if own else real_tokens(call.mask, batch, tokens, hidden.device)
    samples = torch.arange(batch, device=hidden.device)
    return hidden[samples, real.to(torch.int8).argmax(dim=1)].detach().float()


def _prompt(call: Call, device: torch.device) -> tuple[Tensor, Tensor]:
    """`[batch, token]` bool of what the current layer computes: the prompt's tokens, and the visual ones among them."""
    assert call.prompt is not None
    layout = call.prompt.layout
    place = torch.arange(call.sequence, device=layout.real.device)
    prompt = layout.real & (place <= call.prompt.end[:, None])
    visual = torch.zeros_like(prompt)
    for image in layout.images:
        visual[image.sample, image.places_on_device] = True
    visual &= layout.real
    return computed(call, prompt).to(device), computed(call, visual).to(device)


def computed(call: Call, x: Tensor) -> Tensor:
    """`[batch, token]` of what the current layer computes, from `[batch, sequence]` bool; False on padding."""
    rows = call.section.rows
    return x if rows is None else x.gather(1, rows.rows) & rows.valid


def _pictures(call: Call, device: torch.device) -> list[Picture]:
    assert call.prompt is not None
    images = zip(call.prompt.layout.images, call.section.remaining, call.prompt.tower, strict=True)
    return [
        Picture(image.sample, rows_now(call, number, index).to(device), index, len(image), tower)
        for number, (image, index, tower) in enumerate(images)
    ]
