"""From a live call to what a method may see: one function per probe of `vlmprune.view`, under the probe's name.

Probes of the vision tower are taken while the tower runs (`live/tower.py`), and are looked up here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmprune.live.call import Call
from vlmprune.live.source import Part, Source, Tools, columns
from vlmprune.view import View, known_probes, taken_in_tower


def build_view(call: Call, layer: int, needs: frozenset[str], group: Sequence[Part], hidden: Tensor, tools: Tools) -> View:
    """What a method sees of some pictures of equal size.

    Args:
        call: the running forward pass.
        layer: decoder layer of the stage.
        needs: the method's probes.
        group: the pictures, or crops of them.
        hidden: `[batch, token, dim]` entering the layer.
        tools: pieces of the model.
    """
    source = Source(call, layer, group, hidden, tools)
    in_tower, probes = taken_in_tower(needs), {}
    for name in needs - in_tower:
        probes[name] = TAKE[name](source)
    for name in in_tower:
        found = source.of_tower(name)
        probes[name] = found.transpose(1, 2) if known_probes()[name].per_head else found  # [image, head, visual]
    return View(layer, group[0].original, source.position, probes, group[0].entered, source.side, frames=source.frames)


# -- one function per probe --------------------------------------------------------------------------------------------------

TAKE: dict[str, Callable[[Source], Any]] = {}
"""How each probe of the language model is taken, by its name."""


def probe(function: Callable[[Source], Any]) -> Callable[[Source], Any]:
    """File a function under the name of the probe that it takes."""
    TAKE[function.__name__] = function
    return function


@probe
def features(source: Source) -> Tensor:
    return source.rows(source.hidden, source.visual)


@probe
def text_features(source: Source) -> Tensor:
    return source.text(source.hidden)


@probe
def text_valid(source: Source) -> Tensor:
    return source.text_valid


@probe
def text_ids(source: Source) -> Tensor:
    return source.text(source.ids[..., None], whole=True)[..., 0]


@probe
def normed_features(source: Source) -> Tensor:
    return source.tools.norm(source.rows(source.hidden, source.visual))


@probe
def normed_text_features(source: Source) -> Tensor:
    return source.tools.norm(source.text(source.hidden))


@probe
def embeddings(source: Source) -> Tensor:
    return source.rows(source.embeddings, torch.stack([image.places_on_device for image in source.images]))


@probe
def text_embeddings(source: Source) -> Tensor:
    return source.text(source.embeddings, whole=True)


@probe
def attention_from_last(source: Source) -> Tensor:
    return source.of_last(source.attention_of_last)


@probe
def attention_of_layer(source: Source) -> Tensor:
    return source.of_last(source.tools.ahead())


@probe
def attention_from_text(source: Source) -> Tensor:
    return columns(source.attention_of_text, source.visual)


@probe
def attention_among_text(source: Source) -> Tensor:
    attention = columns(source.attention_of_text, source.of_text())
    return attention.masked_fill(~source.text_valid.to(attention.device)[:, None, None], 0)


@probe
def query_of_last(source: Source) -> Tensor:
    return source.unrotated(source.projections.query_of_last[source.samples, source.segments])


@probe
def value_of_last(source: Source) -> Tensor:
    return source.projections.value_of_last[source.samples, source.segments]


@probe
def keys(source: Source) -> Tensor:
    return source.unrotated(source.rows(source.projections.key, source.visual))


@probe
def values(source: Source) -> Tensor:
    return source.rows(source.projections.value, source.visual)


@probe
def text_keys(source: Source) -> Tensor:
    return source.unrotated(source.text(source.projections.key))


@probe
def rotary(source: Source) -> Tensor:
    return source.rows(source.rotary, source.visual).unflatten(-1, (2, -1))


@probe
def text_rotary(source: Source) -> Tensor:
    return source.text(source.rotary).unflatten(-1, (2, -1))


@probe
def project(source: Source) -> Callable[[Tensor], Tensor] | None:
    return source.tools.project


@probe
def frame(source: Source) -> Tensor:
    return source.frame


@probe
def times(source: Source) -> Tensor:
    return source.times


@probe
def identity(source: Source) -> tuple[int, ...]:
    return source.identities()
