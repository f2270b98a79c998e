"""What a pruning method is: a schedule, the probes it needs, and one decision.

A method knows no model. It is a frozen dataclass whose fields are its paper's parameters; its class attributes name the paper,
and `vlmprune methods` and the README print them. If a paper treats vision towers differently, the method asks for `TowerFacts`,
never for the name of a family. Methods that work inside the tower are in `methods/tower.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.errors import UsageError, shown, unknown
from vlmprune.methods.checks import check_class, check_needs, check_numbers, check_renamed
from vlmprune.methods.parameters import choice, number, settle
from vlmprune.schedule import IN_TOWER, Budget, Schedule, Site, Stage
from vlmprune.view import AT_PIXELS, FROM_TOWER, PROBES, TowerFacts, View, known_probes

Positions = Literal["original", "compact"]
Per = Literal["video", "frame"]


@dataclass(frozen=True, eq=False)
class Choice:
    """What a method returns where an index is not enough.

    Attributes:
        index: `[image, keep]` indices into the `visual` axis, rising; or one tensor per picture if the method itself decides
            how many (`adaptive`).
        features: `[image, keep, dim]` hidden states that replace those of the kept tokens (merging), or None.
        joined: `[image, visual]` which kept token each token was merged into, as an index into the `visual` axis: its own for
            a kept one, −1 for one that was dropped; None where nothing is merged. Only `run.explain` reads it.
    """

    index: Tensor | Sequence[Tensor]
    features: Tensor | None = None
    joined: Tensor | None = None


DEFINED: dict[str, type[Pruner]] = {}
"""Methods that users of the library have defined in this process, by name; of several with one name, the last."""


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """Keeps some visual tokens of each picture, at each stage of its schedule.

    Args:
        layer: first decoder layer that sees the kept tokens only; the paper's if not given.
        tokens: visual tokens kept per picture.
        fraction: the share of the picture's original tokens that is kept, instead of `tokens`.
        schedule: several stages, instead of `layer`, `tokens` and `fraction`; see `vlmprune.stages`.
        preset: the name of a schedule its paper publishes, instead of these.
        site: where the single stage is, if not where the method has it by default: "pixels" is before the vision tower.
        positions: "original" (kept tokens keep their rotary positions; gaps remain) or "compact" (everything after a dropped
            token moves up, as several papers' LLaVA code does; not with M-RoPE).
        cache_layer: first decoder layer from whose KV cache the entries of dropped tokens are removed after the prompt, so that
            decoding steps no longer attend to them there. −1: every layer keeps what it computed.
        newlines: "keep" the row separators of LLaVA-NeXT, which then count as text, on top of the budget; or "drop" them at
            the method's first stage (most papers' code has none). There is one per row of the un-padded picture: 48 for a
            square one of 2 × 2 crops of 24 × 24 patches.
        per: what a budget counts of a video: "video" (all its frames together), or "frame": every frame is decided by itself,
            as if it were a picture, and keeps the budget. Refused for pictures then.

    A subclass with a `name` of its own can be used by that name in recipe strings and files, wherever it is defined.

    Class attributes:
        name, paper, note: its name in recipes; its source; where it differs from the source, in one line.
        needs: the probes it looks at (`needs_at` if stages differ).
        default: its schedule if none is given.
        first_layer: earliest decoder layer it can prune at.
        presets: schedules its paper publishes.
        official_positions: what the paper's code does about positions, in a word.
        chooses: how it decides, for `run.explain`: it completes "it …".
        per_crop: before the language model, each crop of a picture (LLaVA-NeXT) is decided separately, with its share of the
            budget.
        scales_over_picture: a `per_crop` method that has numbers which are scaled over all crops of a picture; it computes
            them in `over_picture`.
        compares_frames: it compares the frames of a video with each other, and refuses `per="frame"`.

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
    per_crop: ClassVar[bool] = False
    scales_over_picture: ClassVar[bool] = False
    compares_frames: ClassVar[bool] = False
    in_tower: ClassVar[bool] = False
    _renamed: ClassVar[Mapping[str, str]] = {"per_view": "per_crop"}
    """New names of class attributes, by the names of earlier versions."""

    schedule: Schedule | None = None
    layer: InitVar[int | None] = None
    tokens: InitVar[int | None] = number(None, low=0, whole=True)  # checked by Budget
    fraction: InitVar[float | None] = number(None, low=0, high=1)
    preset: InitVar[str | None] = None
    site: InitVar[Site | None] = choice(None, "pixels", "vision", "llm")
    positions: Positions = choice("original", "compact")
    cache_layer: int = number(-1, low=-1, whole=True)
    newlines: Literal["keep", "drop"] = choice("keep", "drop")
    per: Per = choice("video", "frame")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(name := vars(cls).get("name"), str) and not cls.__module__.startswith("vlmprune."):
            DEFINED[name] = cls

    def __post_init__(
        self,
        layer: int | None,
        tokens: int | None,
        fraction: float | None,
        preset: str | None,
        site: Site | None,
    ) -> None:
        check_class(type(self), ("name", str, "'mine'"), ("default", Schedule, "vlmprune.at(layer=2, fraction=0.5)"))
        check_renamed(type(self), self._renamed)
        check_needs(self.name, getattr(self, "needs", None), known_probes())
        single = any(value is not None for value in (layer, tokens, fraction, site))
        if (self.schedule is not None) + (preset is not None) + single > 1:
            raise UsageError(f"{self.name}: give schedule=…, preset=…, or layer, tokens, fraction and site; only one of these.")
        if preset is not None and not (isinstance(preset, str) and preset in self.presets):
            raise unknown(f"preset of {self.name}", preset if isinstance(preset, str) else shown(preset), self.presets)
        settle(self, site=site)
        if self.schedule is None:
            schedule = self.presets[preset] if preset is not None else self._from_defaults(layer, tokens, fraction, site)
            object.__setattr__(self, "schedule", schedule)
        if not isinstance(self.schedule, Schedule):
            raise UsageError(
                f"{self.name}: schedule must be a Schedule, for example vlmprune.stages({{8: 0.5}}), found "
                f"{shown(self.schedule)}."
            )
        for stage in self.stages:
            if stage.site == "cache" or (stage.site == "vision" and not self.in_tower):
                raise UsageError(f"{self.name} cannot prune in {stage.place}: give it stages of the language model.")
            self._check_site(stage)
        if self.per == "frame" and self.compares_frames:
            raise UsageError(
                f"{self.name} compares the frames of a video, so that it cannot decide about each of them by itself: leave out "
                'per="frame"; its budget is the video\'s.'
            )
        if self.per == "frame" and any(stage.site in IN_TOWER for stage in self.stages):
            raise UsageError(
                f'{self.name}: per="frame" counts tokens of the language model, but this schedule prunes before it, in the '
                "vision tower, where every frame is counted by itself anyway: leave per out, or give it stages of the language "
                "model."
            )
        earliest = min((stage.layer for stage in self.stages if stage.site == "llm"), default=self.first_layer)
        if earliest < self.first_layer:
            raise UsageError(
                f"{self.name} cannot prune before layer {self.first_layer}: it looks at the attention of the layer before its "
                f"stage, found layer={earliest}."
            )
        self.validate()

    def _check_site(self, stage: Stage) -> None:
        """Refuse a method that looks at what is not there at the site of a stage."""
        needs = self.needs_at(stage)
        if stage.site == "pixels" and (missing := sorted(needs - AT_PIXELS)):
            raise UsageError(
                f"{self.name} cannot prune before the vision tower: it looks at {', '.join(missing)}, of which nothing is "
                "computed there; at site='pixels' use pixelprune, uniform or random, or give this one a stage behind the tower."
            )
        if stage.site != "pixels" and any(name in PROBES and PROBES[name].taken == "pixels" for name in needs):
            raise UsageError(
                f"{self.name} cannot prune at {stage.place}: it looks at the pixels of patches, which are there before the "
                "vision tower only; leave layer out, or give site=pixels."
            )

    def validate(self) -> None:
        """Refuse parameters that do not go together; called when all of them are known and within their limits.

        Raises:
            UsageError: says which, and what to do.
        """

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the schedule."""
        assert self.schedule is not None
        return self.schedule.stages

    @property
    def cuts(self) -> Schedule:
        """The schedule: its former name, for methods that were written with it."""
        return Schedule(self.stages)

    @property
    def forgets(self) -> tuple[Stage, ...]:
        """The stage after prefill, if there is one."""
        return (Stage(self.cache_layer, Budget(fraction=1.0), "cache"),) if self.cache_layer >= 0 else ()

    @property
    def adaptive(self) -> bool:
        """Whether the method itself decides how many tokens it keeps; the budget is then an upper limit."""
        return False

    @property
    def keeps_newlines(self) -> bool:
        """Whether the row separators of LLaVA-NeXT stay; if not, they are dropped at the method's first stage."""
        return self.newlines == "keep"

    def plan(self, facts: TowerFacts) -> Schedule:
        """The stages for one model.

        Raises:
            UsageError: the method does not work with such a model.
        """
        behind = [stage for stage in self.stages if stage.site != "pixels"]
        if not facts.cls and any(self.needs_at(stage) & FROM_TOWER for stage in behind):
            raise UsageError(
                f"{self.name} needs the attention of the vision tower's CLS token, but {facts.refusal}; choose a method "
                "that does not need it."
            )
        return Schedule(self.stages)

    def bind(self, facts: TowerFacts, name: str, device: Any) -> Pruner:
        """The method for one model: what it names is loaded.

        Args:
            facts: traits of its vision tower.
            name: where it was loaded from, a folder or hub id; empty if unknown.
            device: where it is.

        Raises:
            UsageError: something cannot be loaded, or does not fit the model.
        """
        return self

    def variant(self, facts: TowerFacts) -> str:
        """Which form of the method runs on such a model, for the report; empty if there is only one."""
        return ""

    def needs_at(self, stage: Stage) -> frozenset[str]:
        """The probes that the method looks at in one stage."""
        return self.needs

    def _from_defaults(self, layer: int | None, tokens: int | None, fraction: float | None, site: Site | None) -> Schedule:
        if layer is None and tokens is None and fraction is None and site is None:
            return self.default
        default = self.default.stages[0]
        given = tokens is not None or fraction is not None
        budget = Budget(tokens, fraction) if given else default.budget
        if site is None:
            return Schedule((Stage(default.layer, budget, default.site) if layer is None else Stage(layer, budget),))
        its_place = 0 if site in IN_TOWER else default.layer
        return Schedule((Stage(its_place if layer is None else layer, budget, site),))

    def over_picture(self, see: View) -> Tensor:
        """A number for every token that is scaled over the whole picture, for methods that `select` crop by crop.

        Args:
            see: whole pictures, with all their crops, and the probes of `needs_at`.

        Returns:
            `[image, visual]`; each crop's part of it comes back as `see.over_picture`.
        """
        raise NotImplementedError

    def select(self, see: View, keep: int) -> Tensor | Choice:
        """Choose tokens.

        Args:
            see: the pictures, with the probes of `needs_at`.
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
        UsageError: scores of another shape, or NaN among them. On a GPU, NaN fails as an assertion on the device, because
            reading it would make the host wait.
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


def alive_top(score: Tensor, keep: Tensor, valid: Tensor | None) -> Tensor:
    """`[image, token]` bool, True for the `keep` `[image]` highest scores of every row; ties go to the lower index.

    Args:
        score: `[image, token]`.
        keep: `[image]`.
        valid: `[image, token]` bool, False on padding, which is ranked last; None if there is none.
    """
    score = score.float() if valid is None else score.float().masked_fill(~valid, -torch.inf)
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < keep[:, None]
