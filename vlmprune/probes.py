"""From a live call to what a method may see: every probe of `vlmprune.view`, taken from hidden states, queries and keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vlmprune.adapters.family import Family
from vlmprune.attention import rows_attention
from vlmprune.cache import PrunedLayer
from vlmprune.errors import UsageError
from vlmprune.kernels.attention_mass import attention_rows
from vlmprune.layout import Layout, group_by_size
from vlmprune.reduction import Reduction
from vlmprune.run import Call
from vlmprune.view import View

TEXT = frozenset({"attention_from_text", "attention_among_text"})
BEFORE_THE_CUT = TEXT | {"attention_from_last"}
"""Probes that look into the attention of the layer before a cut."""

CLS_MEMORY = 1024
"""Pictures whose CLS attention is remembered between the vision tower and the language model."""


def build_view(
    call: Call, layer: int, needs: frozenset[str], group: Sequence[int], hidden: Tensor, ahead: Callable[[], Tensor]
) -> View:
    """What a method sees of some pictures of equal size.

    Args:
        call: the running forward pass.
        layer: decoder layer of the cut.
        needs: probes the method declares.
        group: indices of the pictures.
        hidden: `[batch, token, dim]` entering the layer.
        ahead: gives `attention_ahead` of this cut.
    """
    assert call.layout is not None
    images = [call.layout.images[i] for i in group]
    position = torch.stack([call.remaining[i] for i in group])  # [image, visual]
    samples = torch.tensor([image.sample for image in images], device=position.device)
    places = torch.stack([image.positions for image in images]).gather(1, position)  # in the call's sequence
    if call.reduction is not None:
        places = call.reduction.places(samples, places)

    def columns(attention: Tensor, index: Tensor) -> Tensor:
        """Columns of `[image, …, key]` by `[image, column]`."""
        index = index.to(attention.device)
        shape = (index.shape[0], *[1] * (attention.ndim - 2), index.shape[1])
        return attention.gather(-1, index.view(shape).expand(*attention.shape[:-1], -1))

    probes: dict[str, Tensor | tuple[int, ...]] = {}
    if "features" in needs:
        probes["features"] = hidden[samples[:, None].to(hidden.device), places.to(hidden.device)]
    if "attention_from_last" in needs:
        last = call.attention[layer - 1]
        probes["attention_from_last"] = columns(last[samples.to(last.device)], places)
    if "attention_of_layer" in needs:
        last = ahead()
        probes["attention_of_layer"] = columns(last[samples.to(last.device)], places)
    if needs & TEXT:
        text = text_after_pictures(call)
        rows = call.text_attention[layer - 1][samples.to(hidden.device)]  # [image, head, text, key]
        valid = text.valid[samples].to(rows.device)
        rows = rows.masked_fill(~valid[:, None, :, None], 0)
        among = columns(rows, in_shortened(call, text.rows)[samples])
        probes["attention_from_text"] = columns(rows, places)
        probes["attention_among_text"] = among.masked_fill(~valid[:, None, None], 0)
    if "attention_from_cls" in needs:
        probes["attention_from_cls"] = columns(torch.stack([call.cls[i] for i in group]), position)
    if "identity" in needs:
        probes["identity"] = tuple(identity(call, image.sample, image.ordinal) for image in images)
    return View(layer, len(images[0]), position, probes)


def see_attention(
    call: Call,
    layer: int,
    needs: frozenset[str],
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
) -> None:
    """Note attention of the last prompt token, or of the prompt's text, in the layer before a cut."""
    here = query.shape[2]  # what an earlier turn left in the cache stands before these keys, and is no candidate
    if "attention_from_last" in needs:
        rows = prompt_end(call, here).to(query.device)[:, None]
        call.attention[layer] = rows_attention(query, key, attention_mask, scaling, rows)[:, :, 0, -here:]
    if needs & TEXT:
        rows = in_shortened(call, text_after_pictures(call).rows).to(query.device)
        call.text_attention[layer] = rows_attention(query, key, attention_mask, scaling, rows)[..., -here:]


def attention_ahead(
    call: Call, family: Family, layer: Any, index: int, hidden: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache | None
) -> Tensor:
    """`[batch, head, token]` attention of the last prompt token that a decoder layer would pay to what enters it.

    Args:
        layer, index: the decoder layer that has not run yet, and its number.
        hidden: `[batch, token, dim]` entering it.
        rotary: its rotary embeddings, `[batch or 1, token, head_dim]` each.
        cache: what earlier turns left; it takes its share of the attention.
    """
    batch, tokens, _ = hidden.shape
    row = prompt_end(call, tokens).to(hidden.device)[:, None]
    query, key = family.queries_and_keys(layer, hidden, rotary, row)
    assert call.layout is not None
    valid = call.layout.real if call.reduction is None else call.reduction.valid
    visible = valid.to(hidden.device) & (torch.arange(tokens, device=hidden.device) <= row)
    if call.past and cache is not None:
        stored: Any = cache.layers[index]
        if isinstance(stored, PrunedLayer):
            before = stored.entries(batch, hidden.device)[1]
        elif call.mask is not None:
            before = call.mask[:, : call.past].to(hidden.device, torch.bool)
        else:
            before = torch.ones(batch, call.past, dtype=torch.bool, device=hidden.device)
        key, visible = torch.cat((stored.keys, key), dim=2), torch.cat((before, visible), dim=1)
    return attention_rows(query, key, layer.self_attn.scaling, visible[:, None])[:, :, 0, -tokens:]


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
        assert call.prompt_end is not None
        last = torch.full_like(call.prompt_end, call.sequence)
        for image in call.layout.images:
            last[image.sample] = image.positions[-1]
        place = torch.arange(call.sequence, device=last.device)
        text = call.layout.real & (place > last[:, None]) & (place <= call.prompt_end[:, None])
        pictured = sorted({image.sample for image in call.layout.images})
        if not bool(text[pictured].any(dim=1).all()):
            raise UsageError(
                "the method weighs the text after the picture, but a prompt ends with its picture: put the question behind it."
            )
        call.text = Reduction.keeping(text)
    return call.text


def in_shortened(call: Call, rows: Tensor) -> Tensor:
    """`[batch, row]` positions of the call's sequence, addressed in what the current layer computes."""
    if call.reduction is None:
        return rows
    samples = torch.arange(rows.shape[0], device=rows.device)
    return call.reduction.places(samples, rows).clamp_(max=call.reduction.rows.shape[1] - 1)


def identity(call: Call, sample: int, ordinal: int) -> int:
    """Equal for equal prompts, whatever the batch, the padding, or candidates of assisted decoding."""
    assert call.ids is not None
    assert call.layout is not None
    assert call.prompt_end is not None
    end = int(call.prompt_end[sample]) + 1
    ids = call.ids[sample, :end][call.layout.real[sample, :end]]
    return int.from_bytes(blake2b(f"{ordinal}/{ids.tolist()}".encode(), digest_size=8).digest(), "little")


class ClsMemory:
    """CLS attention on its way from the vision tower to the language model.

    Beams, batching and caching of features all copy and move the features, so their content is the one name that survives until
    the language model sees them. The oldest pictures are forgotten.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def remember(self, features: Tensor, attention: Tensor) -> None:
        """File attention `[image, head, visual]` under features `[image, visual, dim]`."""
        for name, scores in zip(_fingerprints(features), attention, strict=True):
            self._known[name] = scores
            self._known.move_to_end(name)
        while len(self._known) > max(CLS_MEMORY, len(features)):
            self._known.popitem(last=False)

    def recall(self, layout: Layout, embeddings: Tensor) -> list[Tensor]:
        """The attention of every picture of a call, from what enters the language model `[batch, sequence, dim]`.

        Raises:
            UsageError: a picture's features did not come from the wrapped model's tower.
        """
        found: list[Tensor] = [embeddings] * len(layout.images)
        for group in group_by_size([(len(image),) for image in layout.images]):
            features = torch.stack([embeddings[layout.images[i].sample, layout.images[i].positions] for i in group])
            for image, name in zip(group, _fingerprints(features), strict=True):
                if name not in self._known:
                    raise UsageError(
                        "the CLS attention of a picture is unknown: its features were computed before the model was wrapped; "
                        "pass pixel_values instead of encoded features."
                    )
                found[image] = self._known[name]
        return found

    def clear(self) -> None:
        self._known.clear()


def _fingerprints(features: Tensor) -> list[tuple[int, ...]]:
    """A name for the content of each picture's features `[image, visual, dim]`: two sums over their bits."""
    bits = features.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[features.element_size()])
    bits = bits.flatten(1).long()
    place = torch.arange(bits.shape[1], device=bits.device) * 2654435761 % 2147483647  # order matters
    sums = torch.stack((bits.sum(dim=1), (bits * place).sum(dim=1)), dim=1)
    return [tuple(row) for row in sums.tolist()]
