"""What a pruning method is: a schedule, what it needs to see, and one decision.

A method knows no model. It is a frozen dataclass whose fields are its paper's parameters; the class attributes say which
paper, and `vlmprune methods` and the README print them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import ClassVar

from torch import Tensor

from vlmprune.errors import UsageError, unknown
from vlmprune.schedule import Budget, Schedule, Stage
from vlmprune.view import View


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """Keeps some visual tokens of each picture, at each stage of its schedule.

    Args:
        layer: first decoder layer that sees the kept tokens only; the paper's if not given.
        tokens: visual tokens kept per picture.
        fraction: or the share of the picture's original tokens that is kept.
        schedule: or several cuts, see `vlmprune.stages`.
        preset: or the name of a schedule its paper publishes.

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

    schedule: Schedule | None = None
    layer: InitVar[int | None] = None
    tokens: InitVar[int | None] = None
    fraction: InitVar[float | None] = None
    preset: InitVar[str | None] = None

    def __post_init__(self, layer: int | None, tokens: int | None, fraction: float | None, preset: str | None) -> None:
        single = (layer, tokens, fraction) != (None, None, None)
        if (self.schedule is not None) + (preset is not None) + single > 1:
            raise UsageError(f"{self.name}: give schedule=…, preset=…, or layer, tokens and fraction; only one of these.")
        if preset is not None and preset not in self.presets:
            raise unknown(f"preset of {self.name}", preset, self.presets)
        if self.schedule is None:
            schedule = self.presets[preset] if preset is not None else self._from_defaults(layer, tokens, fraction)
            object.__setattr__(self, "schedule", schedule)
        earliest = self.cuts.stages[0].layer
        if earliest < self.first_layer:
            raise UsageError(
                f"{self.name} cannot cut before layer {self.first_layer}: it looks at the attention of the layer before the "
                f"cut, found layer={earliest}."
            )

    @property
    def cuts(self) -> Schedule:
        """The resolved schedule."""
        assert self.schedule is not None
        return self.schedule

    def _from_defaults(self, layer: int | None, tokens: int | None, fraction: float | None) -> Schedule:
        if (layer, tokens, fraction) == (None, None, None):
            return self.default
        default = self.default.stages[0]
        given = tokens is not None or fraction is not None
        budget = Budget(tokens, fraction) if given else default.budget
        return Schedule((Stage(default.layer if layer is None else layer, budget),))

    def select(self, see: View, keep: int) -> Tensor:
        """Choose tokens.

        Args:
            see: the cut, with the probes named in `needs`.
            keep: tokens to keep of each picture; 0 <= keep < see.visual.

        Returns:
            `[image, keep]` int64 indices into the `visual` axis of the view, rising and different.
        """
        raise NotImplementedError


class ScorePruner(Pruner):
    """A method that gives every token one number and keeps the highest."""

    def score(self, see: View) -> Tensor:
        """`[image, visual]`, higher = keep."""
        raise NotImplementedError

    def select(self, see: View, keep: int) -> Tensor:
        # Stable: equal scores go to the lower index on every device.
        ranked = self.score(see).float().argsort(dim=-1, descending=True, stable=True)
        return ranked[:, :keep].sort(dim=-1).values
