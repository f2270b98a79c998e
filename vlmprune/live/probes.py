"""From a live call to what a method may see: every probe of `vlmprune.view`, taken from hidden states, queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache

from vlmprune.adapters.family import Family
from vlmprune.device import on_device, on_host
from vlmprune.errors import UsageError
from vlmprune.kernels.attention_mass import attention_rows
from vlmprune.live.attention import rows_attention
from vlmprune.live.cache import PrunedLayer
from vlmprune.live.call import Call, Projections
from vlmprune.live.decoder import attention_of
from vlmprune.live.feature_index import FeatureIndex
from vlmprune.live.layout import Image
from vlmprune.live.masks import shown_cells
from vlmprune.live.rows import Reduction
from vlmprune.view import FROM_TOWER, PROJECTIONS, TEXT_ROWS, View


@dataclass(frozen=True, eq=False)
class Part:
    """Tokens that are decided together: a picture, or one view of it.

    Attributes:
        image: index of the picture in the call.
        index: `[visual]` tokens of the picture that are still there.
        original: tokens there were before any pruning.
        entered: tokens of the picture that entered the language model.
        keep: tokens to keep.
    """

    image: int
    index: Tensor
    original: int
    entered: int
    keep: int

    @property
    def size(self) -> tuple[int, ...]:
        """Parts of one size are decided in one batch."""
        return self.original, self.entered, len(self.index), self.keep


@dataclass(frozen=True, eq=False)
class Tools:
    """Pieces of the model that probes are made with.

    Attributes:
        ahead: gives `attention_ahead` of this cut.
        norm: the language model's final norm.
        rotary: gives cosines and sines of the rows that enter the layer of the cut, `[batch or 1, token, dim]` each.
        project: the projector.
        start: gives cosines and sines of the first token of each sample, `[batch, segment, head_dim]` each; None if unknown.
    """

    ahead: Callable[[], Tensor]
    norm: Callable[[Tensor], Tensor]
    rotary: Callable[[], tuple[Tensor, Tensor]]
    project: Callable[[Tensor], Tensor] | None
    start: Callable[[], tuple[Tensor, Tensor] | None]


def build_view(call: Call, layer: int, needs: frozenset[str], group: Sequence[Part], hidden: Tensor, tools: Tools) -> View:
    """What a method sees of some pictures of equal size.

    Args:
        call: the running forward pass.
        layer: decoder layer of the cut.
        needs: probes the method declares.
        group: the pictures, or views of them.
        hidden: `[batch, token, dim]` entering the layer.
        tools: pieces of the model.
    """
    prompt = call.prompt
    assert prompt is not None
    images = [prompt.layout.images[part.image] for part in group]
    position = torch.stack([part.index for part in group])  # [image, visual]
    samples = on_device(np.array([image.sample for image in images]), position.device)
    places = torch.stack([image.positions[part.index] for image, part in zip(images, group, strict=True)])
    here = places if call.section.rows is None else call.section.rows.places(samples, places)  # rows of `hidden`
    segments = on_device(np.array([image.segment for image in images]), position.device)

    def rows(x: Tensor, index: Tensor) -> Tensor:
        """Rows `[image, …, row, dim]` of `[batch, …, token, dim]`."""
        chosen, index = x[samples.to(x.device)], index.to(x.device)
        between = [1] * (x.ndim - 3)
        return chosen.gather(-2, index.view(len(index), *between, -1, 1).expand(*chosen.shape[:-2], -1, x.shape[-1]))

    @cache
    def mine() -> tuple[Tensor | None, Tensor]:
        """Of the rows of `text_after_pictures`, those of each picture's own sample, and which of them are no padding."""
        return own_text(call, images)

    def of_mine(text: Tensor) -> Tensor:
        """`[image, text]` of `[batch, text]`."""
        order, text = mine()[0], text[samples.to(text.device)]
        return text if order is None else text.gather(1, order.to(text.device))

    def words(x: Tensor, text: Tensor) -> Tensor:
        """The same of the text `[batch, text]`; zero where padded."""
        valid = mine()[1].to(x.device)
        chosen = rows(x, of_mine(text))
        return chosen.masked_fill(~valid.view(len(valid), *[1] * (x.ndim - 3), -1, 1), 0)

    def columns(attention: Tensor, index: Tensor) -> Tensor:
        """Columns `[image, …, column]` of `[image, …, key]`."""
        index = index.to(attention.device)
        between = [1] * (attention.ndim - 2)
        return attention.gather(-1, index.view(len(index), *between, -1).expand(*attention.shape[:-1], -1))

    def of_last(attention: Tensor) -> Tensor:
        return columns(attention[samples.to(attention.device), :, segments.to(attention.device)], here)

    def of_text() -> Tensor:
        """`[image, head, text, key]`."""
        attention = prompt.text_attention[layer - 1]
        order, valid = mine()
        attention = attention[samples.to(attention.device)]
        if order is not None:
            index = order.to(attention.device)[:, None, :, None]
            attention = attention.gather(2, index.expand(-1, attention.shape[1], -1, attention.shape[3]))
        return attention.masked_fill(~valid.to(attention.device)[:, None, :, None], 0)

    def among_text() -> Tensor:
        attention = columns(of_text(), of_mine(text()))
        return attention.masked_fill(~mine()[1].to(attention.device)[:, None, None], 0)

    def text() -> Tensor:
        return in_shortened(call, text_after_pictures(call).rows)

    def seen() -> Projections:
        return prompt.projections[layer - 1]

    def ids() -> Tensor:
        return on_device(prompt.tokens.ids, position.device)

    def embeddings() -> Tensor:
        assert prompt is not None
        assert prompt.embeddings is not None
        if not (hidden_tokens := prompt.tokens.hidden).any():
            return prompt.embeddings
        return prompt.embeddings.masked_fill(on_device(hidden_tokens, prompt.embeddings.device)[..., None], torch.nan)

    def turned_back(x: Tensor) -> Tensor:
        """Queries or keys `[image, head, …, dim]` as they would be if their sample began at position 0."""
        if (start := tools.start()) is None:
            return x
        cos, sin = (part[samples, segments.to(part.device)].to(x.device) for part in start)  # [image, dim]
        return unrotated(x, cos, sin)

    def turns() -> Tensor:
        return torch.cat(tools.rotary(), dim=-1).expand(hidden.shape[0], -1, -1)

    take: dict[str, Callable[[], Any]] = {
        "features": lambda: rows(hidden, here),
        "text_features": lambda: words(hidden, text()),
        "text_valid": lambda: mine()[1],
        "text_ids": lambda: words(ids()[..., None], text_after_pictures(call).rows)[..., 0],
        "normed_features": lambda: tools.norm(rows(hidden, here)),
        "normed_text_features": lambda: tools.norm(words(hidden, text())),
        "embeddings": lambda: rows(embeddings(), torch.stack([image.positions for image in images])),
        "text_embeddings": lambda: words(embeddings(), text_after_pictures(call).rows),
        "attention_from_last": lambda: of_last(prompt.attention[layer - 1]),
        "attention_of_layer": lambda: of_last(tools.ahead()),
        "attention_from_text": lambda: columns(of_text(), here),
        "attention_among_text": among_text,
        "query_of_last": lambda: turned_back(seen().query_of_last[samples, segments]),
        "value_of_last": lambda: seen().value_of_last[samples, segments],
        "keys": lambda: turned_back(rows(seen().key, here)),
        "values": lambda: rows(seen().value, here),
        "text_keys": lambda: turned_back(words(seen().key, text())),
        "rotary": lambda: rows(turns(), here).unflatten(-1, (2, -1)),
        "text_rotary": lambda: words(turns(), text()).unflatten(-1, (2, -1)),
        "project": lambda: tools.project,
        "identity": lambda: tuple(identity(call, image) for image in images),
    }
    probes = {name: take[name]() for name in needs - FROM_TOWER}
    for name in needs & FROM_TOWER:
        known = torch.stack([prompt.tower[part.image][name][part.index.to(hidden.device)] for part in group])
        probes[name] = known.transpose(1, 2) if name.startswith("attention") else known  # [image, head, visual]
    side = int(prompt.crops[group[0].image][:, 1].max()) if prompt.crops else 0
    return View(layer, group[0].original, position, probes, group[0].entered, side)


def unrotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `[image, head, …, dim]` back by a rotary embedding `[image, rotary dim]`, whose own factor is taken out; exact where
    it is that of position 0."""
    shape = (len(cos), *[1] * (x.ndim - 2), -1)
    cos, sin = cos.float().view(shape), sin.float().view(shape)
    size = torch.hypot(cos, sin)
    cos, sin = cos / size, sin / size
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.float().chunk(2, dim=-1)
    back = turning.float() * cos - torch.cat((-second, first), dim=-1) * sin
    return torch.cat((back.to(x.dtype), rest), dim=-1)


def rows_now(call: Call, image: int, index: Tensor) -> Tensor:
    """Rows of what the current layer computes, of tokens `index` of a picture; all of them still there."""
    prompt = call.prompt
    assert prompt is not None
    picture = prompt.layout.images[image]
    places = picture.positions[index][None]
    if call.section.rows is not None:
        places = call.section.rows.places(on_device(np.array([picture.sample]), places.device), places)
    return places[0]


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
    """Note what a method wants to know of the attention in the layer before a cut."""
    prompt = call.prompt
    assert prompt is not None
    # Inside `torch.autocast`, rotated queries and keys are fp32, and values have the dtype of what the model returns.
    key, value = key.to(query.dtype), value.to(query.dtype)
    here = query.shape[2]  # what an earlier turn left in the cache stands before these keys, and is no candidate
    last = prompt_ends(call, here).to(query.device)
    if "attention_from_last" in needs:
        prompt.attention[layer] = rows_attention(query, key, attention_mask, scaling, last)[..., -here:]
    if needs & TEXT_ROWS:
        rows = in_shortened(call, text_after_pictures(call).rows).to(query.device)
        prompt.text_attention[layer] = rows_attention(query, key, attention_mask, scaling, rows)[..., -here:]
    if needs & PROJECTIONS:
        key, value = key[:, :, -here:], value[:, :, -here:]
        samples = torch.arange(len(last), device=last.device)[:, None]
        prompt.projections[layer] = Projections(query[samples, :, last], value[samples, :, last], key, value)


def recall_tower(call: Call, memory: FeatureIndex, embeddings: Tensor) -> None:
    """Fetch what the vision tower knew of every picture of a call, by what enters the language model."""
    prompt = call.prompt
    assert prompt is not None
    images = prompt.layout.images
    prompt.tower = memory.recall([embeddings[image.sample, image.positions.to(embeddings.device)] for image in images])
    if images and "view" in prompt.tower[0]:
        known = on_host(torch.cat([torch.stack((tower["view"], tower["side"]), dim=1) for tower in prompt.tower]))
        prompt.crops = np.split(known, np.cumsum(list(map(len, images)))[:-1])


def attention_ahead(
    call: Call,
    family: Family,
    layer: Any,
    index: int,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: Cache | None,
    mask: Any = None,
) -> Tensor:
    """`[batch, head, segment, token]` attention of the last prompt token that a decoder layer would pay to what enters it.

    Queries and keys are those of the layer's own code (norms, projections, rotary embedding), run up to its attention.

    Args:
        layer, index: the decoder layer that has not run yet, and its number.
        hidden: `[batch, token, dim]` entering it.
        rotary: its rotary embeddings, `[batch or 1, token, head_dim]` each.
        cache: what earlier turns left; it takes its share of the attention.
        mask: the layer's own, where every cell of it counts.
    """
    prompt = call.prompt
    assert prompt is not None
    batch, tokens, _ = hidden.shape
    row = prompt_ends(call, tokens).to(hidden.device)
    given = {"attention_mask": None, "position_ids": None, "past_key_values": None, "use_cache": False}
    own = attention_of(layer, family.attention, hidden, position_embeddings=rotary, **given)
    key, row = own.key, row.to(own.key.device)
    query = own.query.gather(2, row[:, None, :, None].expand(-1, own.query.shape[1], -1, own.query.shape[3]))
    valid = prompt.layout.real if call.section.rows is None else call.section.rows.valid
    valid = valid.to(key.device)
    visible = valid[:, None] & (torch.arange(tokens, device=key.device) <= row[..., None])
    if call.past and cache is not None:
        stored: Any = cache.layers[index]
        if isinstance(stored, PrunedLayer):
            before = stored.entries.valid.to(key.device)
        elif call.mask is not None:
            before = call.mask[:, : call.past].to(key.device, torch.bool)
        else:
            before = torch.ones(batch, call.past, dtype=torch.bool, device=key.device)
        key, visible = torch.cat((stored.keys, key), dim=2), torch.cat((before[:, None], visible), dim=2)
    if mask is not None:
        here = (
            torch.arange(tokens, device=row.device).expand(batch, -1) if call.section.rows is None else call.section.rows.rows
        )
        there = here.to(row.device) + call.past
        if call.past and cache is not None:
            slots = stored.entries.slots if isinstance(stored, PrunedLayer) else torch.arange(call.past)[None]
            there = torch.cat((slots.to(row.device).expand(batch, -1), there), dim=1)
        visible &= shown_cells(mask, (there - call.past).gather(1, row + there.shape[1] - tokens), there)
    return attention_rows(query, key, own.scaling, visible)[..., -tokens:]


def prompt_end(call: Call, tokens: int) -> Tensor:
    """`[batch]` row of the last prompt token among the `tokens` rows that the current layer computes."""
    prompt = call.prompt
    assert prompt is not None
    if call.section.rows is None:
        return prompt.end
    return torch.full_like(prompt.end, tokens - 1 - call.tail)  # left-padded, so the end is the same row everywhere


def prompt_ends(call: Call, tokens: int) -> Tensor:
    """`[batch, segment]` the same of every sample that is packed into a row: its last token that is still there."""
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
    """The prompt's text after its last picture, as rows of the call's sequence; none for samples without a picture.

    Raises:
        UsageError: a prompt ends with its picture.
    """
    prompt = call.prompt
    assert prompt is not None
    if prompt.text is None:
        text, place = np.zeros_like(prompt.tokens.real), np.arange(call.sequence)
        asked = prompt.tokens.own & ~prompt.tokens.placeholders  # row separators stand behind the last visual token
        for (sample, segment), begin in prompt.layout.behind.items():
            mine = asked[sample] & (place >= begin) & (prompt.tokens.segment(sample) == segment)
            if not mine.any() and prompt.tokens.visual[sample][prompt.tokens.segment(sample) == segment].any():
                hides = " that the mask does not hide" if not prompt.tokens.real[sample].all() else ""
                raise UsageError(
                    f"the method weighs the text after the picture, but in row {sample} none stands there{hides}: put the "
                    "question behind the picture."
                )
            text[sample] |= mine
        counts = text.sum(axis=1).tolist()
        prompt.text = Reduction.keeping(on_device(text, prompt.layout.real.device), counts)
    return prompt.text


def in_shortened(call: Call, rows: Tensor) -> Tensor:
    """`[batch, row]` positions of the call's sequence, addressed in what the current layer computes."""
    if call.section.rows is None:
        return rows
    samples = torch.arange(rows.shape[0], device=rows.device)
    return call.section.rows.places(samples, rows).clamp_(max=call.section.rows.rows.shape[1] - 1)


def own_text(call: Call, images: Sequence[Image]) -> tuple[Tensor | None, Tensor]:
    """Of the rows of `text_after_pictures`, those of each picture's own sample.

    Returns:
        `[image, text]` places among these rows, or None for all of them; and `[image, text]` bool, False on padding.
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


def identity(call: Call, image: Image) -> int:
    """Equal for equal prompts, whatever the batch, the padding, the row they are packed into, or candidates of assisted
    decoding."""
    prompt = call.prompt
    assert prompt is not None
    mine = prompt.tokens.own[image.sample] & (prompt.tokens.segment(image.sample) == image.segment)
    ids = prompt.tokens.ids[image.sample][mine]
    beside = [other for other in prompt.layout.images if (other.sample, other.segment) == (image.sample, image.segment)]
    ordinal = beside.index(image)
    return int.from_bytes(blake2b(f"{ordinal}/{ids.tolist()}".encode(), digest_size=8).digest(), "little")
