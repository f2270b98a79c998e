"""Views of random numbers with every probe, and one entry for every form of every method: shared by the tests of methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cases import PRUNING
from torch import Tensor

import vlmprune as vp
from vlmprune.methods.tower import TowerPruner
from vlmprune.schedule import Budget, Stage
from vlmprune.view import PROBES, View

PROVIDED = [
    method.provides for method in vp.METHODS.values() if issubclass(method, TowerPruner) and method.provides is not None
]
OURS = {**PROBES, **{probe.name: probe for probe in PROVIDED}}
"""Every probe of the library: other tests may have defined more."""
FP32 = frozenset(name for name, probe in OURS.items() if probe.fp32)
"""Probes that are fp32 whatever the model's dtype."""


def random_view(
    seed: int = 0,
    images: int = 3,
    visual: int = 20,
    text: Sequence[int] = (5, 3, 1),
    heads: int = 4,
    kv_heads: int = 2,
    layer: int = 2,
    gone: int = 5,
    in_tower: int = 2,
    frames: int = 1,
) -> View:
    """A view with every probe.

    Args:
        text: words behind each picture; the shorter ones are padded on the left, as in a live call.
        gone: tokens of each picture that were dropped before, `in_tower` of them inside the vision tower.
        frames: of each video; 1 for pictures.
    """
    draw = torch.Generator().manual_seed(seed)
    original, side, dim, width = visual + gone, math.ceil((visual + gone) ** 0.5), 8, 16
    longest, text = max(text[:images]), list(text[:images])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    def attention(*shape: int) -> Tensor:
        return (2 * normal(*shape)).softmax(-1)

    def some(count: int, of: int) -> Tensor:
        return torch.stack([torch.randperm(of, generator=draw)[:count].sort().values for _ in range(images)])

    position = some(visual, original)
    embeddings = normal(images, original, width)
    for image in range(images):  # what the tower dropped is not among what remains
        lost = torch.tensor([i for i in range(original) if i not in position[image].tolist()], dtype=torch.long)[:in_tower]
        embeddings[image, lost] = torch.nan
    valid = torch.arange(longest) >= longest - torch.tensor(text)[:, None]  # [image, text]

    def words(x: Tensor) -> Tensor:
        """Zero where `[image, …, text, dim]` is padded."""
        return x.masked_fill(~valid.view(images, *[1] * (x.ndim - 3), longest, 1), 0)

    def turns(places: Tensor) -> Tensor:
        """`[image, token, 2, dim]` cosines and sines of rotary positions."""
        angles = places[..., None] * 100.0 ** (-torch.arange(dim // 2) / (dim / 2))
        angles = torch.cat((angles, angles), dim=-1)
        return torch.stack((angles.cos(), angles.sin()), dim=-2)

    text_attention = attention(images, heads, longest, visual + longest)
    among = text_attention[..., visual:].tril() * valid[:, None, None]
    weight = normal(width, width) / 4
    probes: dict[str, Any] = {
        "features": normal(images, visual, width),
        "text_features": words(normal(images, longest, width)),
        "text_valid": valid,
        "text_ids": torch.randint(8, 96, (images, longest), generator=draw) * valid,
        "normed_features": normal(images, visual, width),
        "normed_text_features": words(normal(images, longest, width)),
        "embeddings": embeddings,
        "text_embeddings": words(normal(images, longest, width)),
        "attention_from_last": attention(images, heads, visual),
        "attention_of_layer": attention(images, heads, visual),
        "attention_from_text": words(text_attention[..., :visual]),
        "attention_among_text": words(among),
        "query_of_last": 2 * normal(images, heads, dim),
        "value_of_last": normal(images, kv_heads, dim),
        "keys": normal(images, kv_heads, visual, dim),
        "values": normal(images, kv_heads, visual, dim),
        "text_keys": words(normal(images, kv_heads, longest, dim)),
        "attention_from_cls": attention(images, heads, visual),
        "attention_from_cls_first": attention(images, heads, visual),
        "attention_from_cls_early": attention(images, heads, visual),
        "attention_from_cls_final": attention(images, heads, visual),
        "tower_keys": normal(images, visual, dim),
        "tower_features": normal(images, visual, width),
        "project": lambda x: x @ weight.to(x.dtype),
        "flow": normal(images, visual).abs(),
        "cell": some(visual, side**2),
        "rotary": turns(3 + position.float()),
        "text_rotary": words(turns(original + 3 + torch.arange(longest).expand(images, -1).float()).flatten(-2)).unflatten(
            -1, (2, dim)
        ),
        "frame": position * frames // original,
        "times": 0.5 * torch.arange(frames).expand(images, -1),
        "identity": tuple(range(7 + 100 * seed, 7 + 100 * seed + images)),
        "pixels": blurred(draw, images, visual),
    }
    assert set(probes) == set(OURS), set(probes) ^ set(OURS)
    return View(layer, original, position, probes, entered=original - in_tower, side=side, grid=_grid(visual), frames=frames)


def _grid(visual: int) -> tuple[int, int]:
    rows = max(side for side in range(1, math.isqrt(visual) + 1) if visual % side == 0)
    return rows, visual // rows


def blurred(draw: torch.Generator, images: int, visual: int) -> Tensor:
    """`[image, visual, 12]` pixels of which half repeat those of a neighbour."""
    rows, columns = _grid(visual)
    pixels = torch.randint(0, 3, (images, rows, columns, 1), generator=draw).float() / 2 + torch.zeros(12)
    across = torch.rand(images, rows, columns, 1, generator=draw) < 0.5
    for column in range(1, columns):
        pixels[:, :, column] = torch.where(across[:, :, column], pixels[:, :, column - 1], pixels[:, :, column])
    return pixels.flatten(1, 2)


def replaced(see: View, layer: int | None = None, side: int | None = None, **probes: Any) -> View:
    """The same view with some things changed."""
    side = see.side if side is None else side
    layer = see.layer if layer is None else layer
    return View(layer, see.original, see.position, {**see.probes, **probes}, see.entered, side, see.grid, frames=see.frames)


def in_dtype(see: View, dtype: torch.dtype) -> View:
    """The view as a model in another dtype gives it: what a probe's entry calls fp32 stays fp32."""
    changed = {
        name: value.to(dtype)
        for name, value in see.probes.items()
        if name not in FP32 and isinstance(value, Tensor) and value.is_floating_point()
    }
    return replaced(see, **changed)


def in_fp32(see: View) -> View:
    """The same numbers in fp32."""
    floats = {k: v.float() for k, v in see.probes.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return replaced(see, **floats)


def alone(see: View, image: int) -> View:
    """One picture of a view, without the padding of its text."""
    words = see.probes["text_valid"][image]
    own = {}
    for name, value in see.probes.items():
        if name == "project":
            own[name] = value
        elif name == "identity":
            own[name] = value[image : image + 1]
        else:
            own[name] = value[image : image + 1]
            if name == "attention_from_text":
                own[name] = own[name][:, :, words]
            elif name == "attention_among_text":
                own[name] = own[name][:, :, words][..., words]
            elif name == "text_keys":
                own[name] = own[name][:, :, words]
            elif "text" in name:
                own[name] = own[name][:, words]
    return View(
        see.layer, see.original, see.position[image : image + 1], own, see.entered, see.side, see.grid, frames=see.frames
    )


@dataclass(frozen=True)
class Case:
    """One form of a method, at one of its stages.

    Attributes:
        method: the method.
        layer: decoder layer of the stage.
        idle: probes that this form declares but has no use for.
    """

    method: vp.Pruner
    layer: int = 2
    idle: frozenset[str] = frozenset()

    @property
    def stage(self) -> Stage:
        return Stage(self.layer, Budget(tokens=1))

    @property
    def needs(self) -> frozenset[str]:
        return self.method.needs_at(self.stage)

    def select(self, see: View, keep: int) -> vp.Choice:
        """The method's choice from nothing but what it declares."""
        chosen = self.method.select(self.declared(see), keep)
        return chosen if isinstance(chosen, vp.Choice) else vp.Choice(chosen)

    def declared(self, see: View) -> View:
        probes = {need: see.probes[need] for need in self.needs}
        return View(self.layer, see.original, see.position, probes, see.entered, see.side, see.grid, frames=see.frames)


CASES = {name: Case(form.method, form.layer, form.idle) for row in PRUNING for name, form in row.views.items()}
"""Every method, in every form that looks at something else."""
MERGING = {name for row in PRUNING for name, form in row.views.items() if form.merges}
