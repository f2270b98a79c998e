"""From a live call to what a method may see: every probe of `vlmprune.view`, taken from hidden states, queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache

from vlmprune.adapters.family import Family
from vlmprune.attention import rows_attention
from vlmprune.cache import PrunedLayer
from vlmprune.decoder import attention_of
from vlmprune.errors import UsageError
from vlmprune.kernels.attention_mass import attention_rows
from vlmprune.layout import on_device, on_host
from vlmprune.reduction import Reduction
from vlmprune.run import Call, Projections
from vlmprune.tower import RowMemory
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
    """

    ahead: Callable[[], Tensor]
    norm: Callable[[Tensor], Tensor]
    rotary: Callable[[], tuple[Tensor, Tensor]]
    project: Callable[[Tensor], Tensor] | None


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
    assert call.layout is not None
    images = [call.layout.images[part.image] for part in group]
    position = torch.stack([part.index for part in group])  # [image, visual]
    samples = on_device(np.array([image.sample for image in images]), position.device)
    places = torch.stack([image.positions[part.index] for image, part in zip(images, group, strict=True)])
    here = places if call.reduction is None else call.reduction.places(samples, places)  # rows of `hidden`

    def rows(x: Tensor, index: Tensor) -> Tensor:
        """Rows `[image, …, row, dim]` of `[batch, …, token, dim]`."""
        chosen, index = x[samples.to(x.device)], index.to(x.device)
        between = [1] * (x.ndim - 3)
        return chosen.gather(-2, index.view(len(index), *between, -1, 1).expand(*chosen.shape[:-2], -1, x.shape[-1]))

    def words(x: Tensor, text: Tensor) -> Tensor:
        """The same of the text `[batch, text]`; zero where padded."""
        valid = text_after_pictures(call).valid[samples].to(x.device)
        chosen = rows(x, text[samples.to(text.device)])
        return chosen.masked_fill(~valid.view(len(valid), *[1] * (x.ndim - 3), -1, 1), 0)

    def columns(attention: Tensor, index: Tensor) -> Tensor:
        """Columns `[image, …, column]` of `[image, …, key]`."""
        index = index.to(attention.device)
        between = [1] * (attention.ndim - 2)
        return attention.gather(-1, index.view(len(index), *between, -1).expand(*attention.shape[:-1], -1))

    def of_last(attention: Tensor) -> Tensor:
        return columns(attention[samples.to(attention.device)], here)

    def of_text() -> Tensor:
        """`[image, head, text, key]`."""
        attention = call.text_attention[layer - 1]
        valid = text_after_pictures(call).valid[samples].to(attention.device)
        return attention[samples.to(attention.device)].masked_fill(~valid[:, None, :, None], 0)

    def among_text() -> Tensor:
        attention = columns(of_text(), text()[samples])
        return attention.masked_fill(~text_after_pictures(call).valid[samples].to(attention.device)[:, None, None], 0)

    def text() -> Tensor:
        return in_shortened(call, text_after_pictures(call).rows)

    def seen() -> Projections:
        return call.projections[layer - 1]

    def ids() -> Tensor:
        assert call.prompt is not None
        return on_device(call.prompt.ids, position.device)

    def embeddings() -> Tensor:
        assert call.embeddings is not None
        return call.embeddings

    def turns() -> Tensor:
        return torch.cat(tools.rotary(), dim=-1).expand(hidden.shape[0], -1, -1)

    take: dict[str, Callable[[], Any]] = {
        "features": lambda: rows(hidden, here),
        "text_features": lambda: words(hidden, text()),
        "text_valid": lambda: text_after_pictures(call).valid[samples],
        "text_ids": lambda: words(ids()[..., None], text_after_pictures(call).rows)[..., 0],
        "normed_features": lambda: tools.norm(rows(hidden, here)),
        "normed_text_features": lambda: tools.norm(words(hidden, text())),
        "embeddings": lambda: rows(embeddings(), torch.stack([image.positions for image in images])),
        "text_embeddings": lambda: words(embeddings(), text_after_pictures(call).rows),
        "attention_from_last": lambda: of_last(call.attention[layer - 1]),
        "attention_of_layer": lambda: of_last(tools.ahead()),
        "attention_from_text": lambda: columns(of_text(), here),
        "attention_among_text": among_text,
        "query_of_last": lambda: seen().query_of_last[samples],
        "value_of_last": lambda: seen().value_of_last[samples],
        "keys": lambda: rows(seen().key, here),
        "values": lambda: rows(seen().value, here),
        "text_keys": lambda: words(seen().key, text()),
        "rotary": lambda: rows(turns(), here).unflatten(-1, (2, -1)),
        "text_rotary": lambda: words(turns(), text()).unflatten(-1, (2, -1)),
        "project": lambda: tools.project,
        "identity": lambda: tuple(identity(call, image.sample, image.ordinal) for image in images),
    }
    probes = {name: take[name]() for name in needs - FROM_TOWER}
    for name in needs & FROM_TOWER:
        known = torch.stack([call.tower[part.image][name][part.index.to(hidden.device)] for part in group])
        probes[name] = known.transpose(1, 2) if name.startswith("attention") else known  # [image, head, visual]
    side = int(call.views[group[0].image][:, 1].max()) if call.views else 0
    return View(layer, group[0].original, position, probes, group[0].entered, side)


def rows_now(call: Call, image: int, index: Tensor) -> Tensor:
    """Rows of what the current layer computes, of tokens `index` of a picture; all of them still there."""
    assert call.layout is not None
    picture = call.layout.images[image]
    places = picture.positions[index][None]
    if call.reduction is not None:
        places = call.reduction.places(on_device(np.array([picture.sample]), places.device), places)
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
    here = query.shape[2]  # what an earlier turn left in the cache stands before these keys, and is no candidate
    last = prompt_end(call, here).to(query.device)
    if "attention_from_last" in needs:
        call.attention[layer] = rows_attention(query, key, attention_mask, scaling, last[:, None])[:, :, 0, -here:]
    if needs & TEXT_ROWS:
        rows = in_shortened(call, text_after_pictures(call).rows).to(query.device)
        call.text_attention[layer] = rows_attention(query, key, attention_mask, scaling, rows)[..., -here:]
    if needs & PROJECTIONS:
        key, value = key[:, :, -here:], value[:, :, -here:]
        samples = torch.arange(len(last), device=last.device)
        call.projections[layer] = Projections(query[samples, :, last], value[samples, :, last], key, value)


def recall_tower(call: Call, memory: RowMemory, embeddings: Tensor) -> None:
    """Fetch what the vision tower knew of every picture of a call, by what enters the language model."""
    assert call.layout is not None
    images = call.layout.images
    call.tower = memory.recall([embeddings[image.sample, image.positions.to(embeddings.device)] for image in images])
    if images and "view" in call.tower[0]:
        known = on_host(torch.cat([torch.stack((tower["view"], tower["side"]), dim=1) for tower in call.tower]))
        call.views = np.split(known, np.cumsum(list(map(len, images)))[:-1])


def attention_ahead(
    call: Call, family: Family, layer: Any, index: int, hidden: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache | None
) -> Tensor:
    """`[batch, head, token]` attention of the last prompt token that a decoder layer would pay to what enters it.

    Queries and keys are those of the layer's own code (norms, projections, rotary embedding), run up to its attention.

    Args:
        layer, index: the decoder layer that has not run yet, and its number.
        hidden: `[batch, token, dim]` entering it.
        rotary: its rotary embeddings, `[batch or 1, token, head_dim]` each.
        cache: what earlier turns left; it takes its share of the attention.
    """
    batch, tokens, _ = hidden.shape
    row = prompt_end(call, tokens).to(hidden.device)[:, None]
    given = {"attention_mask": None, "position_ids": None, "past_key_values": None, "use_cache": False}
    own = attention_of(layer, family.attention, hidden, position_embeddings=rotary, **given)
    key, row = own.key, row.to(own.key.device)
    query = own.query.gather(2, row[:, None, :, None].expand(-1, own.query.shape[1], -1, own.query.shape[3]))
    assert call.layout is not None
    valid = call.layout.real if call.reduction is None else call.reduction.valid
    visible = valid.to(key.device) & (torch.arange(tokens, device=key.device) <= row)
    if call.past and cache is not None:
        stored: Any = cache.layers[index]
        if isinstance(stored, PrunedLayer):
            before = stored.entries(batch, key.device)[1]
        elif call.mask is not None:
            before = call.mask[:, : call.past].to(key.device, torch.bool)
        else:
            before = torch.ones(batch, call.past, dtype=torch.bool, device=key.device)
        key, visible = torch.cat((stored.keys, key), dim=2), torch.cat((before, visible), dim=1)
    return attention_rows(query, key, own.scaling, visible[:, None])[:, :, 0, -tokens:]


def prompt_end(call: Call, tokens: int) -> Tensor:
    """`[batch]` row of the last prompt token among the `tokens` rows that the current layer computes."""
    assert call.prompt_end is not None
    if call.reduction is None:
        return call.prompt_end
    return torch.full_like(call.prompt_end, tokens - 1 - call.tail)  # left-padded, so the end is the same row everywhere


def text_after_pictures(call: Call) -> Reduction:
    """The prompt's text after its last picture, as rows of the call's sequence; none for samples without a picture.

    Raises:
        UsageError: a prompt ends with its picture.
    """
    if call.text is None:
        assert call.layout is not None
        assert call.prompt is not None
        behind = call.layout.behind
        begin = np.array([behind.get(sample, call.sequence) for sample in range(call.batch)])
        text = call.prompt.asked & (np.arange(call.sequence) >= begin[:, None])
        if call.newlines is not None:  # the last row separator stands behind the last visual token
            text &= ~call.newlines
        counts = text.sum(axis=1).tolist()
        if not all(counts[sample] for sample in behind):
            raise UsageError(
                "the method weighs the text after the picture, but a prompt ends with its picture: put the question behind it."
            )
        call.text = Reduction.keeping(on_device(text, call.layout.real.device), counts)
    return call.text


def in_shortened(call: Call, rows: Tensor) -> Tensor:
    """`[batch, row]` positions of the call's sequence, addressed in what the current layer computes."""
    if call.reduction is None:
        return rows
    samples = torch.arange(rows.shape[0], device=rows.device)
    return call.reduction.places(samples, rows).clamp_(max=call.reduction.rows.shape[1] - 1)


def identity(call: Call, sample: int, ordinal: int) -> int:
    """Equal for equal prompts, whatever the batch, the padding, or candidates of assisted decoding."""
    assert call.prompt is not None
    ids = call.prompt.ids[sample][call.prompt.asked[sample]]
    return int.from_bytes(blake2b(f"{ordinal}/{ids.tolist()}".encode(), digest_size=8).digest(), "little")
