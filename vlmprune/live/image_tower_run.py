"""`TowerRun`, the handle of a wrapped image tower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import RLock
from typing import Any

from torch import nn

from vlmprune.adapters.image_tower import ImageTower
from vlmprune.errors import UsageError
from vlmprune.live.attachment import carries_hooks
from vlmprune.live.context import truth
from vlmprune.live.handle_base import Handle
from vlmprune.live.image_tower_attachment import TowerAttachment, tower_attachment_of, tower_attachment_on
from vlmprune.live.image_tower_plan import ImageTowerPlan
from vlmprune.live.image_tower_report import TowerRecord, TowerReport, no_pass
from vlmprune.recipe import Recipe
from vlmprune.schedule import Budget

_attaching = RLock()


def wrapped_tower_in(model: nn.Module) -> TowerAttachment | None:
    """What is on an image tower that a model has, or is; None if it carries nothing."""
    for module in model.modules():
        if (found := tower_attachment_of(module)) is not None and found.current is not None:
            return found
    return None


class TowerRun(Handle):
    """The handle of a wrapped image tower: of a model that encodes pictures and has no language model.

    Settings (`enabled`, `override`) and records (`last`, `report`) belong to the caller, as those of `Run` do.

    Attributes:
        model: the model that was wrapped, without DDP and the like.
        recipe: the recipe that is applied.
    """

    def __init__(self, model: nn.Module, tower: ImageTower, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        self._plan = ImageTowerPlan(model, tower, recipe, self._contexts)  # refuses what cannot work
        root = model.get_submodule(tower.root)
        if carries_hooks(root):
            raise UsageError(
                "this image tower is a part of a vision-language model that is wrapped already: call vlmprune.unwrap on that "
                "one first, or give each model a tower of its own."
            )
        with _attaching:  # from here on the model changes
            blocks: Any = root.get_submodule(tower.blocks)
            mine = tower_attachment_of(root)
            if tower_attachment_on(blocks[0]) is not mine:
                raise UsageError(
                    f"the blocks of {tower.name} are wrapped already, as those of a module around it or inside it: call "
                    "vlmprune.unwrap on that one first."
                )
            self._attachment = mine or TowerAttachment(root, tower)
            self._attachment.current = self._plan

    def __repr__(self) -> str:
        current = self._attachment.current
        return self._shown(f"the image tower of {type(self.model).__name__}", current is None, current is self._plan)

    def remove(self) -> None:
        """Restore the model, bit for bit. A second call does nothing; neither does a call after the model was wrapped again.

        Raises:
            UsageError: another thread is inside the tower, and does not leave it within a minute. New pictures are not pruned
                from then on; call `remove()` again.
        """
        self._contexts.close()
        if self._attachment.current in (None, self._plan):
            self._attachment.remove()

    @contextmanager
    def override(
        self, *, tokens: int | None = None, fraction: float | None = None, enabled: bool | None = None
    ) -> Iterator[TowerRun]:
        """Another budget, or no pruning, inside a `with` block: for the caller's calls, and for threads started in the block.

        Args:
            tokens, fraction: patches to keep of each picture, instead of the recipe's budget.
            enabled: False encodes pictures un-pruned.

        Raises:
            UsageError: the recipe has several stages, and one number cannot be meant for all; the budget is out of range;
                `enabled` is neither True nor False; or the handle was removed or replaced.
        """
        enabled = None if enabled is None else truth("enabled", enabled)
        if self._attachment.current is not self._plan:
            raise UsageError(
                f"this handle of {self.recipe} is no longer on the model and overrides nothing: use the handle that the last "
                "wrap(…) returned, or wrap the model again."
            )
        budget = None if tokens is None and fraction is None else self._budget(tokens, fraction)
        with self._contexts.block(self._plan, enabled, budget):
            yield self

    def _budget(self, tokens: int | None, fraction: float | None) -> Budget:
        stages = self._plan.overridable
        stage, budget = self._only_stage(stages), Budget(tokens, fraction)
        self._plan.check_budget(stages[0], budget)
        replace(stage, budget=budget)  # refuses what the stage would refuse
        return budget

    @property
    def last(self) -> TowerRecord | None:
        """The record of the caller's last batch of pictures, or None if there was none."""
        return self._contexts.last

    def report(self) -> TowerReport:
        """Numbers of the caller's last batch: patches kept, FLOPs and times. `print` shows them as a table.

        Raises:
            UsageError: the caller encoded no picture.
        """
        if (record := self.last) is None:
            raise no_pass()
        return TowerReport.of(record, str(self.recipe))
