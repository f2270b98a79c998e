"""What a redistribution method is: the layers and rows it edits, the tokens it marks, and one of three edits.

    GroupEditor   a′_k = c_g(μ) · a_k         one factor per group of keys, from the attention that a row pays to each group
    ScoreEditor   s′_k = s_k + w_k · |s_k|    scores, before the softmax
    HeadScaler    o′_h = c_h · o_h            outputs of heads, before the output projection mixes them

A method is a frozen dataclass whose fields are its paper's parameters. It contains no decoding loop, and depends on no model:
`bind` gives it plain data about the one it will run in. Tokens are marked when a prompt is processed, and the marks last as
long as the conversation. Generated tokens are never marked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlmprune.errors import UsageError, shown, unknown
from vlmprune.methods.checks import check_class, check_needs, check_renamed
from vlmprune.methods.parameters import settle
from vlmprune.schedule import scaled_layer
from vlmprune.view import FROM_TOWER, TowerFacts

M = TypeVar("M", bound="Redistributor")
Rows = Literal["behind", "last", "all"]


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """Facts about a model that a method may use before the model runs.

    Attributes:
        config: the language model's config; read only.
        hidden_size: numbers in a token's residual.
        layers: number of decoder layers.
        tower: facts about the vision tower.
    """

    config: Any
    hidden_size: int
    layers: int
    tower: TowerFacts


@dataclass(frozen=True, eq=False)
class Picture:
    """The tokens of one image that have not been dropped.

    Attributes:
        sample: batch row.
        rows: `[visual]` rows of its tokens among those that the layer computes.
        index: `[visual]` index of each token in its image.
        original: number of tokens that the image had before any were dropped.
        tower: probes of the vision tower by name, `[original, head]`.
    """

    sample: int
    rows: Tensor
    index: Tensor
    original: int
    tower: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Scene:
    """A prompt in one decoder layer. The axis `token` has the rows that this layer computes.

    Attributes:
        hidden: `[batch, token, dim]` residual that enters the layer.
        prompt: `[batch, token]` bool, False on padding and on candidates of assisted decoding.
        visual: `[batch, token]` bool.
        first: `[batch]` row of the conversation's first token; None in a later turn.
        anchor: `[batch, dim]` residual of that token; None unless the method compares with it.
        pictures: the images of the batch, if the method needs probes of the vision tower.
        column_means: returns `[batch, head, token]`, the mean attention that each token gets from the prompt's rows.
    """

    hidden: Tensor
    prompt: Tensor
    visual: Tensor
    first: Tensor | None
    anchor: Tensor | None
    pictures: Sequence[Picture]
    column_means: Callable[[], Tensor]


DEFINED: dict[str, type[Redistributor]] = {}
"""Methods that users of the library defined in this process, by name. The last definition of a name wins."""


@dataclass(frozen=True, kw_only=True)
class Redistributor:
    """Edits the attention of some rows in some decoder layers.

    Args:
        layers: the decoder layers, as Python indices and slices ("2:-1", "1|18:") or as a sequence of numbers ([1, 18],
            range(2, 6)); the paper's layers if empty.
        preset: name of settings that the paper or its code publishes; parameters that are given win over it.

    A subclass with its own `name` can be used by that name in recipe strings and files, wherever it is defined.

    Class attributes:
        rows: the rows of a prompt that are edited: "behind" (the text after its last image), "last" (its last token) or "all".
            Every row of a decoding step is edited in each case.
        needs: probes of the vision tower.
        default_layers: the paper's layers.
        causal: False if the edit of a prompt's row depends on later rows, as in the paper.

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
    _renamed: ClassVar[Mapping[str, str]] = {}
    """New names of what a class defines, by the names of earlier versions."""
    _given: ClassVar[frozenset[str]] = frozenset()
    """Names of the parameters that an instance was given."""

    layers: str = ""
    preset: InitVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(name := vars(cls).get("name"), str) and not cls.__module__.startswith("vlmprune."):
            DEFINED[name] = cls

    def __new__(cls: type[M], **given: Any) -> M:
        # Later, a parameter that was given with its default value looks the same as one that was not given.
        method = super().__new__(cls)
        object.__setattr__(method, "_given", frozenset(given))
        return method

    def __post_init__(self, preset: str | None) -> None:
        check_class(type(self), ("name", str, "'mine'"), ("rows", str, "'all'"), ("default_layers", str, "':'"))
        check_renamed(type(self), self._renamed)
        check_needs(self.name, self.needs, FROM_TOWER)
        if preset is not None:
            if not (isinstance(preset, str) and preset in self.presets):
                raise unknown(f"preset of {self.name}", preset if isinstance(preset, str) else shown(preset), self.presets)
            for key, value in self.presets[preset].items():
                if key not in self._given:
                    object.__setattr__(self, key, value)
        settle(self)
        if not (layers := written(self.layers)) and not isinstance(self.layers, str):
            raise UsageError(
                f"{self.name}: layers=… names the decoder layers to edit, found {shown(self.layers)}, which names none: give "
                "at least one, or leave layers out for the paper's."
            )
        object.__setattr__(self, "layers", layers)
        _pieces(self.name, self.layers)

    @property
    def neutral(self) -> bool:
        """True if the edit changes nothing with these parameters."""
        raise NotImplementedError

    @property
    def compares_with_first(self) -> bool:
        """True if marks depend on the residual of the conversation's first token (`Scene.anchor`)."""
        return False

    def bind(self: M, model: ModelFacts) -> M:
        """The method for one model, the twin of `Pruner.plan`. A method that looks something up about the model returns a copy
        of itself with the result (`_copy_with`).

        Raises:
            UsageError: the method does not work with this model.
        """
        if self.needs and not model.tower.cls:
            raise UsageError(
                f"{self.name} needs the attention of the vision tower's CLS token, but {model.tower.refusal}; choose a method "
                "that does not need it."
            )
        return self

    def _copy_with(self: M, **found: Any) -> M:
        """The same method with private attributes set."""
        bound = copy(self)
        for name, value in found.items():
            object.__setattr__(bound, name, value)
        return bound

    def layers_of(self, depth: int) -> tuple[int, ...]:
        """The decoder layers that the method edits in a model with `depth` layers.

        Raises:
            UsageError: the model lacks one of the layers that were given, or all of the default ones.
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
                f"{self.name} edits layers {self.default_layers!r} by default; this model has none of them: its layers are "
                f"0 to {depth - 1}; choose with layers=…{_example(self.name, self.default_layers, depth)}."
            )
        return tuple(sorted(chosen))


class GroupEditor(Redistributor):
    """A method that multiplies the attention weights of each group of keys by a factor that depends on the groups' masses.

    Class attributes:
        group_count: number of groups, not counting group 0 of the ordinary keys.
    """

    edits = "attention weights"
    group_count: ClassVar[int]
    _renamed = {"codes": "groups"}  # noqa: RUF012

    def groups(self, see: Scene) -> Tensor:
        """`[batch, 1 or head, token]` group of every token of a prompt, 0 … `group_count`."""
        raise NotImplementedError

    def coefficients(self, mass: Tensor, present: Tensor | None = None) -> Tensor:
        """Factors from masses, both `[batch, head, row, 1 + group]`. The edited weights of a row must still sum to one.

        Args:
            mass: attention that the row pays to each group; it can be rounded to 0.
            present: `[batch, 1 or head, 1, 1 + group]` bool, True for groups that have a key; None means a mass above 0.
        """
        raise NotImplementedError


class ScoreEditor(Redistributor):
    """A method that raises the scores of marked keys by a fraction of their absolute value."""

    edits = "scores"
    _renamed = {"codes": "groups"}  # noqa: RUF012

    def groups(self, see: Scene) -> Tensor:
        """`[batch, 1, token]` group of every token of a prompt."""
        raise NotImplementedError

    @property
    def strengths(self) -> tuple[float, ...]:
        """The fraction for each of the groups 1, 2, …"""
        raise NotImplementedError


class HeadScaler(Redistributor):
    """A method that compares the output of each head with and without the image once, at the prompt, and then scales heads."""

    edits = "outputs of heads"

    def scale(self, with_image: Tensor, text_only: Tensor) -> Tensor:
        """`[batch, head]` factors.

        Args:
            with_image: `[batch, head, dim]` fp32 outputs of the heads at the last prompt token, before the output projection.
            text_only: the same for the prompt without its images.
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
    """The same layers scaled to a model of `depth` layers, as the end of a sentence; empty if there is none."""

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


def written(value: Any) -> str:
    """A parameter that may be a sequence of numbers, as in a recipe string: "1|2"."""
    return "|".join(map(str, value)) if isinstance(value, list | tuple | range | np.ndarray) else str(value)


def first_token(see: Scene, batch: int) -> Tensor:
    """`[batch, 1, token]` groups: 1 for the conversation's first token, 0 for all others."""
    groups = torch.zeros(batch, 1, see.prompt.shape[1], dtype=torch.int8, device=see.prompt.device)
    return groups if see.first is None else groups.scatter(2, see.first[:, None, None], 1)
