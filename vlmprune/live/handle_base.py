"""What the handles of wrapped models have in common, `Run` and `TowerRun`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from vlmprune.errors import UsageError
from vlmprune.live.choosing import BoundStage
from vlmprune.live.context import Contexts, truth
from vlmprune.recipe import Recipe
from vlmprune.schedule import Stage

H = TypeVar("H", bound="Handle")


class Handle:
    """The handle of a wrapped model. Settings and records belong to the caller; `vlmprune.live.context` has the rule.

    Args:
        model: the wrapped model itself, without PEFT, DDP and the like.
        recipe: the recipe that is applied.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.recipe, self._contexts = model, recipe, Contexts()

    def _shown(self, what: str, removed: bool, attached: bool) -> str:
        """For `repr`: `what` is wrapped, and whether this handle was removed, or is the one on the model."""
        state = "removed" if removed else "attached" if attached else "replaced"
        switched = "" if self.enabled or state != "attached" else ", switched off for this caller"
        return f"<vlmprune.{type(self).__name__} {str(self.recipe)!r} on {what}, {state}{switched}>"

    def __reduce_ex__(self, protocol: object) -> Any:
        raise UsageError("a wrapped model cannot be copied or pickled: call run.remove() first, and wrap the copy.")

    def __enter__(self: H) -> H:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the model."""
        raise NotImplementedError

    @property
    def enabled(self) -> bool:
        """False runs prompts, or pictures of an image tower, un-pruned: those of the caller, and of threads that it starts
        later. Other threads keep their own setting."""
        return self._contexts.settings.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._contexts.switch(truth("enabled", value))

    def _only_stage(self, stages: Sequence[BoundStage]) -> Stage:
        """The one of `stages` that `override` means.

        Raises:
            UsageError: there are several, or none.
        """
        if len(stages) != 1:
            raise UsageError(
                f"override needs a recipe with one stage, found {len(stages)} ({self.recipe}): wrap again instead."
            )
        return stages[0].stage
