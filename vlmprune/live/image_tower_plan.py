"""A recipe on one image tower that stands alone: what is fixed beforehand, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.image_tower import ImageTower
from vlmprune.cost import LayerShape
from vlmprune.errors import UsageError
from vlmprune.live.choosing import BoundStage
from vlmprune.live.context import Contexts
from vlmprune.live.image_tower_choosing import OF_BLOCK_BEFORE, OF_EARLIER, OF_STAGE
from vlmprune.live.image_tower_pass import ImageTowerPass
from vlmprune.live.image_tower_report import TowerRecord
from vlmprune.live.record import Clock
from vlmprune.live.tower import blocks_of_probes, stage_in_tower
from vlmprune.methods import Pruner
from vlmprune.methods.checks import check_needs
from vlmprune.methods.tower import TowerPruner
from vlmprune.recipe import Recipe
from vlmprune.schedule import Budget, Schedule, Stage
from vlmprune.view import TowerFacts, known_probes

BY_PATCHES = "choose a method that looks at patches only; see the column 'scored by' of `vlmprune methods`"


class ImageTowerPlan:
    """A recipe on one image tower.

    Args:
        model: the model, or a part of one, that carries the tower.
        tower: where its parts are.
        recipe: what to do.
        contexts: what callers say about the handle.

    It keeps no part of the model alive.

    Attributes:
        blocks, shape: how many blocks there are, and the sizes of one.
        stages: those at blocks, in the order in which they run.
        inside: the stage whose method drops patches between blocks of its own choice, or None.
        wanted: probes that are taken from the attention of blocks.

    Raises:
        UsageError: the recipe cannot work in this tower; the sentence says what is missing, and what to do.
    """

    def __init__(self, model: nn.Module, tower: ImageTower, recipe: Recipe, contexts: Contexts) -> None:
        self.tower, self.recipe, self.contexts = tower, recipe, contexts
        blocks: Any = model.get_submodule(tower.root).get_submodule(tower.blocks)
        self.blocks = len(blocks)
        self.shape = LayerShape(sum(p.numel() for p in blocks[0].parameters() if p.ndim == 2), tower.queries)
        if recipe.redistributors:
            raise UsageError(
                f"{recipe.redistributors[0].name} redistributes attention in a language model, and {tower.name} has none: "
                f"choose a method that drops tokens."
            )
        bound = [_bound(number, *pair) for number, pair in enumerate(recipe.stages(replace(tower.facts, blocks=self.blocks)))]
        self.inside = stage_in_tower(bound, frozenset().union(*(stage.needs for stage in bound)))
        self.stages = [stage for stage in bound if stage is not self.inside]
        for stage in bound:
            if stage.stage.site != "cache":  # refused with the option that makes it
                self._check(stage)
        for method in recipe.pruners:
            _check_options(method, tower)
        self.wanted = frozenset(name for stage in self.stages for name in stage.needs - OF_STAGE)

    # -- beforehand ------------------------------------------------------------------------------------------------------

    def _check(self, bound: BoundStage) -> None:
        """Refuse a stage that this tower cannot have."""
        name, layer, blocks = bound.method.name, bound.stage.layer, self.blocks
        check_needs(name, bound.needs, known_probes())
        if bound is self.inside:
            if not self.tower.cls:
                raise UsageError(
                    f"{name} drops patches by the attention of a CLS token, but {self.tower.name} has "
                    f"{self.tower.before or 'no'} tokens before its patches: {BY_PATCHES}."
                )
            return
        if lacking := sorted(bound.needs - OF_STAGE - OF_BLOCK_BEFORE - OF_EARLIER):
            raise UsageError(
                f"{name} looks at {', '.join(lacking)}, which an image tower without a language model does not have: "
                f"{BY_PATCHES}."
            )
        if layer >= blocks:
            raise UsageError(
                f"{name} prunes at block {layer}, but {self.tower.name} has blocks 0 to {blocks - 1}: choose among them."
            )
        earliest = max((block for block, _ in self._blocks_of(bound)), default=-1) + 1
        if layer < earliest or (layer == 0 and bound.needs & OF_BLOCK_BEFORE):
            looks, first = ", ".join(sorted(bound.needs & (OF_BLOCK_BEFORE | OF_EARLIER))), max(earliest, 1)
            others = f"choose a layer from {first} to {blocks - 1}" if _may_move(bound, first, self.tower.facts) else BY_PATCHES
            raise UsageError(f"{name} looks at {looks}, taken from a block before its stage, found layer={layer}: {others}.")
        self.check_budget(bound, bound.stage.budget)
        if "pixels" in bound.needs and self.tower.patch is None:
            raise UsageError(
                f"{name} compares the pixels of patches, but {self.tower.name} makes patches by more than one convolution, or "
                "patches that overlap: choose another method."
            )

    def check_budget(self, bound: BoundStage, budget: Budget) -> None:
        """Refuse a budget that keeps nothing.

        Raises:
            UsageError: says so.
        """
        if 0 in (budget.tokens, budget.fraction):
            raise UsageError(
                f"{bound.method.name} would keep no patch of a picture, which then has no feature: keep at least tokens=1."
            )

    def _blocks_of(self, bound: BoundStage) -> Iterable[tuple[int, list[str]]]:
        """The blocks whose attention a stage looks at, each with its probes."""
        before = sorted(bound.needs & OF_BLOCK_BEFORE)
        if before and bound.stage.layer:
            yield bound.stage.layer - 1, before
        yield from blocks_of_probes(bound.needs & OF_EARLIER, 0, self.blocks).items()

    def probes_of(self, stages: Iterable[BoundStage]) -> dict[int, list[str]]:
        """The probes that are taken in each block, for some stages."""
        found: dict[int, list[str]] = {}
        for bound in stages:
            for block, names in self._blocks_of(bound):
                mine = found.setdefault(block, [])
                mine += [name for name in names if name not in mine]
        return found

    @property
    def overridable(self) -> list[BoundStage]:
        """The stages whose budget an `override` block may replace."""
        return [*self.stages, *([] if self.inside is None else [self.inside])]

    def budget_of(self, bound: BoundStage, override: Budget | None) -> Budget:
        """What a stage keeps."""
        return bound.stage.budget if override is None else override

    # -- a pass ----------------------------------------------------------------------------------------------------------

    def begin(self, root: nn.Module, pixels: Tensor, kwargs: Mapping[str, Any]) -> ImageTowerPass:
        """A pass through the tower.

        Args:
            root: the tower.
            pixels: what the tower is given, `[picture, channel, row, column]`.
            kwargs: the other arguments.

        Raises:
            UsageError: pictures of another size than the tower takes, or gradient checkpointing.
        """
        self._check_checkpointing(root)
        grid = self._grid(pixels, kwargs)
        clock = Clock(what="the image tower", device=pixels.device)
        record = TowerRecord(len(pixels), grid[0] * grid[1], self.tower.before, self.shape, self.blocks, tower=clock)
        return ImageTowerPass(self, self.tower, self.contexts.settings.budget, record, pixels, grid)

    def _grid(self, pixels: Tensor, kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """Rows and columns of patches of some pictures."""
        size, tower = (pixels.shape[-2], pixels.shape[-1]), self.tower
        if size == tower.image:
            return tower.grid
        if tower.image is None or kwargs.get("interpolate_pos_encoding"):
            if tower.patch is None:
                return tower.grid
            return size[0] // tower.patch[0], size[1] // tower.patch[1]
        raise UsageError(
            f"{tower.name} takes pictures of {tower.image[0]} × {tower.image[1]} pixels, found {size[0]} × {size[1]}: prepare "
            "them with the model's own preprocessing."
        )

    def _check_checkpointing(self, root: nn.Module) -> None:
        """Refuse blocks that a backward pass will run again."""
        if not torch.is_grad_enabled():
            return
        flags = ("grad_checkpointing", "gradient_checkpointing")
        on = (getattr(module, name, False) for module in root.modules() if module.training for name in flags)
        if any(flag is True for flag in on):
            raise UsageError(
                f"gradient checkpointing runs the blocks of {self.tower.name} again in the backward pass, which is not "
                "supported while patches are dropped: switch it off, or encode under torch.no_grad()."
            )


def _bound(number: int, stage: Stage, method: Pruner) -> BoundStage:
    needs = frozenset() if isinstance(method, TowerPruner) and stage.site == "vision" else method.needs_at(stage)
    return BoundStage(number, stage, method, needs, method.name, False, method.adaptive)


def _may_move(bound: BoundStage, layer: int, facts: TowerFacts) -> bool:
    """Whether a method could have its stage at another block of an image tower."""
    try:
        (stage,) = replace(bound.method, schedule=Schedule((replace(bound.stage, layer=layer),))).plan(facts)
    except UsageError:
        return False
    return not bound.method.needs_at(stage) - OF_STAGE - OF_BLOCK_BEFORE - OF_EARLIER


def _check_options(method: Pruner, tower: ImageTower) -> None:
    """Refuse options that mean something in a language model only."""
    of_language_model = {
        "positions": (method.positions == "compact", "compact", "no rotary positions of a prompt"),
        "newlines": (method.newlines == "drop", "drop", "no row separators"),
        "cache_layer": (method.cache_layer >= 0, method.cache_layer, "no cache"),
    }
    for name, (given, value, lacks) in of_language_model.items():
        if given:
            raise UsageError(f"{method.name}: {name}={value} means nothing in {tower.name}, which has {lacks}: leave it out.")
