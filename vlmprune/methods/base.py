"""What a pruning method is: a schedule, what it needs to see, and one decision.

A method knows no model. It is a frozen dataclass whose fields are its paper's parameters; the class attributes say which
paper, and `vlmprune methods` and the README print them. Where a paper does different things with different vision towers, the
method asks for `TowerFacts`, never for a family's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.errors import UsageError, shown, unknown
from vlmprune.methods.checks import check_class, check_needs, check_numbers
from vlmprune.methods.parameters import Range, choice, limited, number
from vlmprune.schedule import Budget, Schedule, Stage, plain
from vlmprune.view import PROBES, WITH_CLS, TowerFacts, View

Positions = Literal["original", "compact"]


@dataclass(frozen=True, eq=False)
class Choice:
    """What a method decides where an index is not enough.

    Attributes:
        index: `[image, keep]` indices into the `visual` axis, rising; or one tensor per picture where the method itself decides
            how many (`adaptive`).
        features: `[image, keep, dim]` hidden states that take the place of the kept ones (merging), or None.
        joined: `[image, visual]` which kept token each token was merged into, as an index into the `visual` axis: its own for
            a kept one, −1 for one that was dropped; None where nothing is merged. Only `run.explain` reads it.
    """

    index: Tensor | Sequence[Tensor]
    features: Tensor | None = None
    joined: Tensor | None = None


DEFINED: dict[str, type[Pruner]] = {}
"""Methods that users of the library have defined in this process, by their names; the last of those with one name."""


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """Keeps some visual tokens of each picture, at each stage of its schedule.

    Args:
        layer: first decoder layer that sees the kept tokens only; the paper's if not given.
        tokens: visual tokens kept per picture.
        fraction: the share of the picture's original tokens that is kept, instead of `tokens`.
        schedule: several cuts, instead of `layer`, `tokens` and `fraction`; see `vlmprune.stages`.
        preset: the name of a schedule its paper publishes, instead of these.
        positions: "original" (survivors keep their rotary positions; gaps remain) or "compact" (everything after a dropped
            token moves up, as several papers' LLaVA code does; not with M-RoPE).
        cache_layer: first decoder layer whose KV cache forgets, once prefill is over, what the last cut dropped; decoding steps
            see no more of the picture there. −1: every layer remembers what it computed.
        newlines: "keep" the row separators of LLaVA-NeXT, which then count as text, on top of the budget; or "drop" them with
            the method's first cut, as most papers' code has none. There are as many as the packed picture has rows behind
            un-padding: 48 for a square one of 2 × 2 crops of 24 × 24 patches, fewer or more for others.

    A subclass with a `name` of its own can be used by that name in recipe strings and files, wherever it is defined.

    Class attributes:
        needs: probes it looks at (`needs_at` where stages differ).
        first_layer: earliest decoder layer it can cut at.
        presets: schedules its paper publishes.
        official_positions: what the paper's code does, in a word.
        chooses: how it decides, for `run.explain`: it completes "it …".
        adaptive: the method decides how many tokens it keeps; the budget is an upper limit.
        per_view: before the language model, the views of a picture (LLaVA-NeXT: its crops) are decided apart, each with its
            share of the budget.
        scales_over_picture: and yet it has numbers that only mean something over all views of a picture (`over_picture`).
        keeps_newlines: False drops the row separators of LLaVA-NeXT with the first cut.

    Raises:
        UsageError: a budget out of range, an unknown preset, or more than one way of saying when and how many.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    note: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]]
    default: ClassVar[Schedule]
    first_layer: ClassVar[int] = 0
    presets: ClassVar[Mapping[str, Schedule]] = {}
    official_positions: ClassVar[str] = "original"
    chooses: ClassVar[str] = "decides about all tokens together"
    per_view: ClassVar[bool] = False
    scales_over_picture: ClassVar[bool] = False

    schedule: Schedule | None = None
    layer: InitVar[int | None] = None
    tokens: InitVar[int | None] = number(None, low=0, whole=True)  # checked by Budget
    fraction: InitVar[float | None] = number(None, low=0, high=1)
    preset: InitVar[str | None] = None
    positions: Positions = choice("original", "compact")
    cache_layer: int = number(-1, low=-1, whole=True)
    newlines: Literal["keep", "drop"] = choice("keep", "drop")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(name := vars(cls).get("name"), str) and not cls.__module__.startswith("vlmprune."):
            DEFINED[name] = cls

    def __post_init__(self, layer: int | None, tokens: int | None, fraction: float | None, preset: str | None) -> None:
        check_class(type(self), ("name", str, "'mine'"), ("default", Schedule, "vlmprune.at(layer=2, fraction=0.5)"))
        check_needs(self.name, getattr(self, "needs", None), PROBES)
        for parameter in fields(self):
            object.__setattr__(self, parameter.name, plain(getattr(self, parameter.name)))
        single = any(value is not None for value in (layer, tokens, fraction))
        if (self.schedule is not None) + (preset is not None) + single > 1:
            raise UsageError(f"{self.name}: give schedule=…, preset=…, or layer, tokens and fraction; only one of these.")
        if preset is not None and preset not in self.presets:
            raise unknown(f"preset of {self.name}", preset, self.presets)
        self._check_parameters()
        if self.schedule is None:
            schedule = self.presets[preset] if preset is not None else self._from_defaults(layer, tokens, fraction)
            object.__setattr__(self, "schedule", schedule)
        if not isinstance(self.schedule, Schedule):
            raise UsageError(
                f"{self.name}: schedule must be a Schedule, for example vlmprune.stages({{8: 0.5}}), found {self.schedule!r}."
            )
        for stage in self.cuts:
            if stage.site == "cache" or (stage.site == "vision" and not isinstance(self, TowerPruner)):
                raise UsageError(f"{self.name} cannot cut in {stage.place}: give it stages of the language model.")
        earliest = min((stage.layer for stage in self.cuts if stage.site == "llm"), default=self.first_layer)
        if earliest < self.first_layer:
            raise UsageError(
                f"{self.name} cannot cut before layer {self.first_layer}: it looks at the attention of the layer before the "
                f"cut, found layer={earliest}."
            )

    @property
    def cuts(self) -> Schedule:
        """The schedule."""
        assert self.schedule is not None
        return self.schedule

    @property
    def forgets(self) -> tuple[Stage, ...]:
        """The stage after prefill, if there is one."""
        return (Stage(self.cache_layer, Budget(fraction=1.0), "cache"),) if self.cache_layer >= 0 else ()

    @property
    def adaptive(self) -> bool:
        """Whether the method decides how many tokens it keeps."""
        return False

    @property
    def keeps_newlines(self) -> bool:
        """Whether the row separators of LLaVA-NeXT stay."""
        return self.newlines == "keep"

    def plan(self, facts: TowerFacts) -> Schedule:
        """The stages for one model.

        Raises:
            UsageError: the method does not work with such a model.
        """
        if not facts.cls and any(self.needs_at(stage) & WITH_CLS for stage in self.cuts):
            raise UsageError(
                f"{self.name} needs the attention of the vision tower's CLS token, but {facts.refusal}; choose a method "
                "that does not need it."
            )
        return self.cuts

    def variant(self, facts: TowerFacts) -> str:
        """Which form of the method runs on such a model, for the report; empty where there is one only."""
        return ""

    def needs_at(self, stage: Stage) -> frozenset[str]:
        """The probes looked at in one stage."""
        return self.needs

    def _from_defaults(self, layer: int | None, tokens: int | None, fraction: float | None) -> Schedule:
        if layer is None and tokens is None and fraction is None:
            return self.default
        default = self.default.stages[0]
        given = tokens is not None or fraction is not None
        budget = Budget(tokens, fraction) if given else default.budget
        return Schedule((Stage(default.layer, budget, default.site) if layer is None else Stage(layer, budget),))

    def _check_parameters(self) -> None:
        """Refuse a parameter outside its limits.

        Raises:
            UsageError: says the limits and what was found.
        """
        for parameter, allowed in limited(self):
            if isinstance(allowed, Range):
                self._in_range(parameter, allowed.low, allowed.high, allowed.whole)
            else:
                self._one_of(parameter, allowed)

    def _one_of(self, parameter: str, values: tuple[Any, ...]) -> None:
        """Refuse a field whose value is none of a few.

        Raises:
            UsageError: names the nearest.
        """
        if getattr(self, parameter) not in values:
            raise unknown(f"value of {parameter} in {self.name}", str(getattr(self, parameter)), [str(v) for v in values])

    def _in_range(self, parameter: str, low: float, high: float, whole: bool = False) -> None:
        """Refuse a number outside [low, high].

        Raises:
            UsageError: says the range and what was found.
        """
        value = getattr(self, parameter)
        kind = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            what = "a whole number" if whole else "a number"
            where = f" in [{low:g}, {high:g}]" if low > float("-inf") else ""
            raise UsageError(f"{self.name}: {parameter} must be {what}{where}, found {shown(value)}.")

    def over_picture(self, see: View) -> Tensor:
        """A number for every token that is scaled over all of its picture, for methods that `select` view by view.

        Args:
            see: whole pictures, all their views together, with the probes of `needs_at`.

        Returns:
            `[image, visual]`; every view's part of it comes back as `see.over_picture`.
        """
        raise NotImplementedError

    def select(self, see: View, keep: int) -> Tensor | Choice:
        """Choose tokens.

        Args:
            see: the cut, with the probes of `needs_at`.
            keep: tokens to keep of each picture; 0 < keep < see.visual (keep <= see.visual if `adaptive`).

        Returns:
            `[image, keep]` int64 indices into the `visual` axis of the view, rising and different; or a `Choice`.
        """
        raise NotImplementedError

    def scores(self, see: View) -> Tensor | None:
        """`[image, visual]` the numbers by which `select` ranks tokens, higher = kept; None if it does not rank them. Computed
        only for `run.explain`."""
        return None

    def order(self, see: View, keep: int) -> Tensor | None:
        """`[image, keep]` what `select` keeps, in the order in which it picks; None if it does not pick one token after the
        other. Computed only for `run.explain`."""
        return None


class ScorePruner(Pruner):
    """A method that gives every token one number and keeps the highest.

    Raises:
        UsageError: scores of another shape, or NaN among them. On a GPU, NaN fails as an assertion of the device, because
            looking would wait for it.
    """

    chooses = "keeps the highest scores"

    def score(self, see: View) -> Tensor:
        """`[image, visual]`, higher = keep."""
        raise NotImplementedError

    def scores(self, see: View) -> Tensor:
        return self.score(see)

    def select(self, see: View, keep: int) -> Tensor | Choice:
        score = self.score(see)
        check_numbers(f"{self.name}: score(see)", score, (see.images, see.visual))
        return top(score, keep)


def top(score: Tensor, keep: int) -> Tensor:
    """Rising indices `[image, keep]` of the highest scores `[image, visual]`; ties go to the lower index on every device."""
    ranked = score.float().argsort(dim=-1, descending=True, stable=True)
    return ranked[:, :keep].sort(dim=-1).values


# -- inside the vision tower -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Block:
    """The attention of one block of the vision tower, as a method sees it.

    Attributes:
        index: number of the block; `last` is the block whose output feeds the projector.
        query, key, value: `[view, head, token, dim]`, after rotary embedding where the tower has one. With `cls`, token 0 is
            the CLS token.
        scaling: factor on the scores.
        valid: `[view, token]` bool, False on padding of a view that kept fewer tokens than another; None if all are real.
    """

    index: int
    last: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    cls: bool
    valid: Tensor | None


@dataclass(eq=False)
class TowerState:
    """What a tower method carries from block to block, for some views of one size.

    Attributes:
        facts: what is known of the tower.
        target: patches that each view shall have in the end.
        cells: `[view, patch]` raster index of every patch that is still there; `side` × `side` of them at first.
        valid: `[view, patch]` bool, or None.
        carried: what was noted of each patch, `[view, patch, …]`: probes, and a method's own; shortened with the patches.
    """

    facts: TowerFacts
    target: int
    cells: Tensor
    side: int
    valid: Tensor | None = None
    carried: dict[str, Tensor] = field(default_factory=dict)


class TowerPruner(Pruner):
    """A method that shortens the sequence inside the vision tower; `watches` says by what, in a reader's words.

    Class attributes:
        chooses_in_tower: how it decides there, as `chooses`.
    """

    watches: ClassVar[str]
    chooses_in_tower: ClassVar[str] = "decides between blocks"

    def watch(self, block: Block, state: TowerState) -> None:
        """Look at a block's attention."""

    def cut(self, index: int, last: int, hidden: Tensor, state: TowerState) -> tuple[Tensor, Tensor] | None:
        """Decide behind block `index`, with the patches `[view, patch, dim]` that leave it.

        Returns:
            `[view, patch]` bool of what stays and the patches with merged ones in their places; or None to keep everything.
        """
        raise NotImplementedError


def alive_top(score: Tensor, keep: Tensor, valid: Tensor | None) -> Tensor:
    """`[view, patch]` bool of the `keep` `[view]` highest scores of every view; ties go to the lower index."""
    score = score.float() if valid is None else score.float().masked_fill(~valid, -torch.inf)
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < keep[:, None]
