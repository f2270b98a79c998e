"""Rows of a prompt among what the current decoder layer computes: its last token, its text, and the tokens of a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlmprune.device import on_device, on_host
from vlmprune.errors import UsageError
from vlmprune.live.call import Call
from vlmprune.live.layout import Image
from vlmprune.live.rows import Reduction


def rows_now(call: Call, image: int, index: Tensor) -> Tensor:
    """Rows, in what the current layer computes, of the tokens `index` of a picture; all of them are left."""
    prompt = call.prompt
    assert prompt is not None
    picture = prompt.layout.images[image]
    places = picture.places_on_device[index][None]
    if call.section.rows is not None:
        places = call.section.rows.places(on_device(np.array([picture.sample]), places.device), places)
    return places[0]


def prompt_end(call: Call, tokens: int) -> Tensor:
    """`[batch]` row of the last prompt token among the `tokens` rows that the current layer computes."""
    prompt = call.prompt
    assert prompt is not None
    if call.section.rows is None:
        return prompt.end
    return torch.full_like(prompt.end, tokens - 1 - call.tail)  # left-padded, so the end is the same row everywhere


def prompt_ends(call: Call, tokens: int) -> Tensor:
    """`[batch, segment]` the same of every sample that is packed into a row: its last token that is left."""
    prompt = call.prompt
    assert prompt is not None
    if prompt.tokens.segments is None:
        return prompt_end(call, tokens)[:, None]
    assert call.section.alive is not None
    segments = on_device(prompt.tokens.segments, call.section.alive.device)
    numbers = torch.arange(prompt.tokens.ends.shape[1], device=segments.device)[:, None]
    mine = (segments[:, None] == numbers) & call.section.alive[:, None]
    return in_shortened(call, torch.where(mine, torch.arange(call.sequence, device=segments.device), 0).amax(dim=2))


def text_after_pictures(call: Call) -> Reduction:
    """The prompt's text after its last picture, as places in the prompt; none for samples without a picture.

    Raises:
        UsageError: a prompt ends with its picture.
    """
    prompt = call.prompt
    assert prompt is not None
    if prompt.text is None:
        text, place = np.zeros_like(prompt.tokens.real), np.arange(call.sequence)
        asked = prompt.tokens.own & ~prompt.tokens.placeholders  # row separators follow the last visual token
        for (sample, segment), begin in prompt.layout.first_text_place.items():
            mine = asked[sample] & (place >= begin) & (prompt.tokens.segment(sample) == segment)
            if not mine.any() and prompt.tokens.visual[sample][prompt.tokens.segment(sample) == segment].any():
                hides = " that the mask does not hide" if not prompt.tokens.real[sample].all() else ""
                raise UsageError(
                    f"the method looks at the text after the picture, but in row {sample} there is none{hides}: put the "
                    "question after the picture."
                )
            text[sample] |= mine
        counts = text.sum(axis=1).tolist()
        prompt.text = Reduction.keeping(on_device(text, prompt.layout.real.device), counts)
    return prompt.text


def in_shortened(call: Call, rows: Tensor) -> Tensor:
    """Rows, in what the current layer computes, of places `[batch, row]` of the prompt."""
    if call.section.rows is None:
        return rows
    samples = torch.arange(rows.shape[0], device=rows.device)
    return call.section.rows.places(samples, rows).clamp_(max=call.section.rows.rows.shape[1] - 1)


def own_text(call: Call, images: Sequence[Image]) -> tuple[Tensor | None, Tensor]:
    """Which rows of `text_after_pictures` belong to each picture's own sample.

    Returns:
        `[image, text]` numbers of these rows, or None if all of them do; and `[image, text]` bool, False on padding.
    """
    prompt = call.prompt
    assert prompt is not None
    text = text_after_pictures(call)
    if prompt.tokens.segments is None:
        return None, text.valid[on_device(np.array([image.sample for image in images]), text.valid.device)]
    rows, valid = on_host(text.rows), on_host(text.valid)
    chosen = [
        (valid[image.sample] & (prompt.tokens.segment(image.sample)[rows[image.sample]] == image.segment)).nonzero()[0]
        for image in images
    ]
    order = np.zeros((len(images), max(map(len, chosen))), dtype=int)
    there = np.zeros_like(order, dtype=bool)
    for number, mine in enumerate(chosen):  # padded on the left, as everywhere
        order[number, order.shape[1] - len(mine) :], there[number, order.shape[1] - len(mine) :] = mine, True
    return on_device(order, text.rows.device), on_device(there, text.rows.device)
