"""What a redistribution method is: the layers and rows it edits, what it marks, and one of three edits.

    GroupEditor   a′_k = c_g(μ) · a_k         factors of groups of keys, decided per head and row from the groups' masses
    ScoreEditor   s′_k = s_k + w_k · |s_k|    before the softmax
    HeadScaler    o′_h = c_h · o_h            outputs of heads, before they are mixed

A method knows no model and brings no decoding loop. It is a frozen dataclass whose fields are its paper's parameters. What is
marked is marked at a prompt, and stays with the conversation: generated tokens are ordinary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlmprune.errors import UsageError, unknown
from vlmprune.methods.checks import check_class, check_needs
from vlmprune.methods.parameters import settle
from vlmprune.schedule import scaled_layer
from vlmprune.view import FROM_TOWER

M = TypeVar("M", bound="Redistributor")
Rows = Literal["behind", "last", "all"]


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture, as far as it is still there.

    Attributes:
        sample: batch row.
        rows: `[visual]` where its tokens stand among what the layer computes.
        index: `[visual]` which of the picture's tokens these are.
        original: tokens the picture had before any pruning.
        tower: `[original, head]` by name, what the vision tower knew.
    """

    sample: int
    rows: Tensor
    index: Tensor
    original: int
    tower: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Scene:
    """A prompt in one decoder layer; `token` counts what that layer computes.

    Attributes:
        hidden: `[batch, token, dim]` residual entering the layer.
        prompt: `[batch, token]` bool, False on padding and on candidates of assisted decoding.
        visual: `[batch, token]` bool.
        first: `[batch]` row of the conversation's first token; None in a later turn.
        anchor: `[batch, dim]` residual of that token, whenever it was.
        pictures: every picture of the batch.
        sink_dims: dimensions of the residual that massive activations use, or None.
        sink_energy: share of a token's energy in one of them that makes it a sink, where it is known, or None.
        column_means: gives `[batch, head, token]`, the attention each token gets from the prompt's rows, on average.
    """

    hidden: Tensor
    prompt: Tensor
    visual: Tensor
    first: Tensor | None
    anchor: Tensor | None
    pictures: Sequence[Picture]
    sink_dims: tuple[int, ...] | None
    sink_energy: float | None
    column_means: Callable[[], Tensor]


DEFINED: dict[str, type[Redistributor]] = {}
"""Methods that users of the library have defined in this process, by their names; the last of those with one name."""


@dataclass(frozen=True, kw_only=True)
class Redistributor:
    """Edits the attention of some rows in some decoder layers.

    Args:
        layers: which, as indices and slices of Python: "2:-1", "1|18:", or numbers one after the other: [1, 18], range(2, 6);
            the paper's if empty.
        preset: name of settings its paper or code publishes; a parameter that is given wins.

    A subclass with a `name` of its own can be used by that name in recipe strings and files, wherever it is defined.

    Class attributes:
        rows: "behind" (of the prompt, the text behind its last picture), "last" (its last token) or "all"; in each case every
            row of decoding too.
        needs: probes of the vision tower.
        default_layers: the paper's layers.
        causal: False where what is done to a row of the prompt depends on what stands behind it, as the paper has it.

    Raises:
        UsageError: an unknown preset, or a parameter outside its range.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    note: ClassVar[str] = ""
    edits: ClassVar[str]
    rows: ClassVar[Rows]
    needs: ClassVar[frozenset[str]] = frozenset()
    default_layers: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    causal: ClassVar[bool] = True
    _given: ClassVar[frozenset[str]] = frozenset()
    """Names of the parameters that were given, of an instance."""

    layers: str = ""
    preset: InitVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(name := vars(cls).get("name"), str) and not cls.__module__.startswith("vlmprune."):
            DEFINED[name] = cls

    def __new__(cls: type[M], **given: Any) -> M:
        # Afterwards, a parameter that was given as its default looks like one that was not.
        method = super().__new__(cls)
        object.__setattr__(method, "_given", frozenset(given))
        return method

    def __post_init__(self, preset: str | None) -> None:
        check_class(type(self), ("name", str, "'mine'"), ("rows", str, "'all'"), ("default_layers", str, "':'"))
        check_needs(self.name, self.needs, FROM_TOWER)
        if preset is not None:
            if preset not in self.presets:
                raise unknown(f"preset of {self.name}", str(preset), self.presets)
            for key, value in self.presets[preset].items():
                if key not in self._given:
                    object.__setattr__(self, key, value)
        settle(self)
        several = isinstance(self.layers, list | tuple | range | np.ndarray)
        object.__setattr__(self, "layers", "|".join(map(str, self.layers)) if several else str(self.layers))
        _pieces(self.name, self.layers)

    @property
    def neutral(self) -> bool:
        """The parameters are such that nothing changes."""
        raise NotImplementedError

    def layers_of(self, depth: int) -> tuple[int, ...]:
        """The decoder layers it edits in a model with `depth` of them.

        Raises:
            UsageError: the model lacks one, or has none of them.
        """
        chosen: set[int] = set()
        lacking = False
        for piece in _pieces(self.name, self.layers or self.default_layers):
            if isinstance(piece, int):
                lacking |= not -depth <= piece < depth
                chosen.add(piece % depth)
            else:
                lacking |= not all(-depth <= end <= depth for end in (piece.start, piece.stop) if end is not None)
                chosen.update(range(depth)[piece])
        if self.layers and (lacking or not chosen):
            raise UsageError(
                f"{self.name} is to edit layers {self.layers!r}, but the model has layers 0 to {depth - 1}: choose among them"
                f"{_example(self.name, self.layers, depth)}."
            )
        if not chosen:
            raise UsageError(
                f"{self.name} edits layers {self.default_layers!r} unless it is told others, and the model has layers 0 to "
                f"{depth - 1}, none of them: choose with layers=…{_example(self.name, self.default_layers, depth)}."
            )
        return tuple(sorted(chosen))


class GroupEditor(Redistributor):
    """A method that multiplies the attention weights of groups of keys by factors decided from the groups' masses.

    Class attributes:
        groups: number of groups, besides group 0 of ordinary keys.
    """

    edits = "attention weights"
    groups: ClassVar[int]

    def codes(self, see: Scene) -> Tensor:
        """`[batch, 1 or head, token]` group of every token of a prompt, 0 … groups."""
        raise NotImplementedError

    def coefficients(self, mass: Tensor, present: Tensor | None = None) -> Tensor:
        """Factors from masses, `[batch, head, row, 1 + group]` both; rows must go on summing to one.

        Args:
            mass: attention to each group; a group's may have rounded to 0.
            present: `[batch, 1 or head, 1, 1 + group]` bool, groups that have a key; None: those with a mass above 0.
        """
        raise NotImplementedError


class ScoreEditor(Redistributor):
    """A method that raises the scores of marked keys by a share of their size."""

    edits = "scores"

    def codes(self, see: Scene) -> Tensor:
        """`[batch, 1, token]` group of every token of a prompt."""
        raise NotImplementedError

    @property
    def strengths(self) -> tuple[float, ...]:
        """The share of each group 1, 2, …"""
        raise NotImplementedError


class HeadScaler(Redistributor):
    """A method that compares each head's output with and without the picture, once, and scales heads from then on."""

    edits = "outputs of heads"

    def scale(self, seeing: Tensor, blind: Tensor) -> Tensor:
        """`[batch, head]` factors.

        Args:
            seeing: `[batch, head, dim]` fp32 outputs at the last prompt token, before the output projection.
            blind: the same of the prompt without its pictures.
        """
        raise NotImplementedError


def _pieces(name: str, layers: str) -> list[int | slice]:
    pieces: list[int | slice] = []
    for piece in filter(None, (piece.strip() for piece in layers.split("|"))):
        try:
            ends = [int(end) if end else None for end in piece.split(":")]
        except ValueError:
            ends = []
        if not 1 <= len(ends) <= 2 or ends == [None]:
            raise UsageError(f"{name}: layers are written as indices and slices, for example 2:-1 or 1|18:, found {layers!r}.")
        pieces.append(slice(*ends) if len(ends) == 2 else ends[0])  # type: ignore[arg-type]
    return pieces


def _example(name: str, layers: str, depth: int) -> str:
    """The same layers, scaled to a model of `depth` layers, as the end of a sentence; nothing where none are left."""

    def scaled(end: int | None) -> int | None:
        return None if end is None else -(scaled_layer(-end - 1, depth) + 1) if end < 0 else scaled_layer(end, depth)

    pieces: list[str] = []
    for piece in _pieces(name, layers):
        if isinstance(piece, int):
            pieces.append(str(scaled(piece)))
            continue
        start, stop = scaled(piece.start), scaled(piece.stop)
        if not range(depth)[slice(start, stop)]:
            start, stop = start if start is not None else 0, None
        pieces.append(f"{'' if start is None else start}:{'' if stop is None else stop}")
    return f", for example layers={'|'.join(dict.fromkeys(pieces))}" if pieces else ""


def spans(layers: Sequence[int]) -> str:
    """Rising numbers for people, with runs written as first–last."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def first_token(see: Scene, batch: int) -> Tensor:
    """`[batch, 1, token]` codes with 1 at the conversation's first token."""
    codes = torch.zeros(batch, 1, see.prompt.shape[1], dtype=torch.int8, device=see.prompt.device)
    return codes if see.first is None else codes.scatter(2, see.first[:, None, None], 1)
