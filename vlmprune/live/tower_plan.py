"""What a recipe does in the vision tower of one model: which blocks it watches, and what the hooks of the tower do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from inspect import signature
from math import isqrt
from threading import local
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from vlmprune.adapters.family import Family
from vlmprune.device import on_host
from vlmprune.errors import UsageError
from vlmprune.live.attention import CALL_ARGUMENT
from vlmprune.live.call import Call
from vlmprune.live.choosing import BoundStage
from vlmprune.live.context import Contexts
from vlmprune.live.feature_index import FeatureIndex
from vlmprune.live.pixels import check_pixels, choose_tokens, patches_of_crops, patches_of_list
from vlmprune.live.prompt import by_name, first_of
from vlmprune.live.pruning import Pruning
from vlmprune.live.record import Clock, TowerWork
from vlmprune.live.sizes import shape_of_tower
from vlmprune.live.tower import TowerPass, blocks_of_probes, stage_in_tower
from vlmprune.live.tower_sequence import Form
from vlmprune.methods.tower import TowerPruner
from vlmprune.schedule import Budget
from vlmprune.view import TowerFacts, taken_in_tower


class PerThread(local):
    """What one thread carries from the tower to the prompt."""

    clocks: tuple[Clock, ...] = ()  # of the tower, until the language model takes them
    work: TowerWork | None = None  # likewise


class TowerPlan:
    """A recipe in one vision tower.

    Args:
        plan: the plan that this is a part of.
        family, base, language_model, facts: the model's family, its base model and language model, and the traits of the tower.
        pruning: the stages.
        needs: all probes that methods look at.
        contexts: what callers say about the handle.

    Attributes:
        wanted: probes that are taken in the tower.
        stage: the stage inside the tower, or the one whose method only watches there; None if there is neither.
        pixels: the stage before the tower, or None.
        used: the tower is looked at.
        memory: what the tower saw of each visual token.
        now: what the thread carries.
    """

    def __init__(
        self,
        plan: Any,
        family: Family,
        base: Any,
        language_model: Any,
        facts: TowerFacts,
        pruning: Pruning,
        needs: frozenset[str],
        contexts: Contexts,
    ) -> None:
        self._plan, self._family, self._base, self._language_model, self._facts = plan, family, base, language_model, facts
        self._pruning, self._contexts, self._config = pruning, contexts, base.config
        self.wanted, self.stage = taken_in_tower(needs), stage_in_tower(pruning.stages, needs)
        self.pixels = next((bound for bound in pruning.stages if bound.stage.site == "pixels"), None)
        self.used = bool(self.wanted) or self.stage is not None
        self.memory, self.now = FeatureIndex(), PerThread()
        self._pool = None if family.videos is None else family.videos.pool
        if self.pixels is not None:
            check_pixels(family, base, self.pixels)
        self._patches = None if family.tower is None or self.pixels is None else family.tower.patches
        packed = not facts.cls if self._patches is None else self._patches.grid is not None
        self._form = Form(packed, 1 if self._patches is None else self._patches.before(base))

        tower = family.tower
        self._shape = shape_of_tower(base, tower, facts.patches_per_token) if tower is not None and self.shortens else None

    @property
    def looks(self) -> bool:
        """A method looks into the tower, beyond what any stage before it needs."""
        return self.stage is not None or bool(self.wanted - ({"cell"} if self.pixels is not None else set()))

    @property
    def shortens(self) -> bool:
        """Patches are dropped before the tower, or inside it."""
        return self.pixels is not None or self._between

    @property
    def _between(self) -> bool:
        """Patches are dropped between blocks."""
        return self.stage is not None and self.stage.stage.site == "vision"

    # -- beforehand ------------------------------------------------------------------------------------------------------

    def places(self) -> Iterator[tuple[str, int]]:
        """Where hooks are needed, beside those that every plan has."""
        if not self.used or (tower := self._family.tower) is None:
            return
        yield "projector", 0
        first = tower.full_attention_blocks(self._config)[0] if self.stage is not None else 0
        if passes_on(self._blocks()[first]):
            yield "first block", first
        else:
            yield "first block alone", first
            yield from (("block's attention", index) for index in self._watched())
        if self.shortens:
            yield from (("block", index) for index in range(len(self._blocks())))
            if self._form.packed:
                yield "merger", 0
        if self._patches is not None and self._patches.early is not None:
            yield from (("early", index) for index in range(len(self._base.get_submodule(self._patches.early))))
        if self._pool is not None:
            yield "pool", 0

    def hooked(self) -> Iterator[nn.Module]:
        """What carries hooks, or attention that is looked at: the tower's root, its projector and its blocks."""
        if self.used and (tower := self._family.tower) is not None:
            early = () if self._patches is None or self._patches.early is None else (self._patches.early,)
            pool = () if self._pool is None else (self._pool,)
            yield from (self._base.get_submodule(name) for name in (tower.root, tower.projector, *early, *pool))
            yield from self._blocks()

    def observers(self) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
        """The attention modules of the tower that are observed, each with its observer, which is called with the plan first."""
        if not self.used or (tower := self._family.tower) is None:
            return
        blocks = self._blocks()
        for index, names in self._watched().items():
            yield blocks[index].get_submodule(tower.attention), partial(_watch_block, index=index, probes=names)

    def _watched(self) -> dict[int, list[str]]:
        """The blocks whose attention is observed, by number, each with the probes that are taken there."""
        tower = self._family.tower
        assert tower is not None
        probes = blocks_of_probes(self.wanted, tower.feature_block(self._config), len(self._blocks()))
        if self.stage is not None:
            for index in tower.full_attention_blocks(self._config):
                if index < self.last_block() and self._method_watches(index):
                    probes.setdefault(index, [])
        return dict(sorted(probes.items()))

    def _method_watches(self, index: int) -> bool:
        assert self.stage is not None
        method = self.stage.method
        return not isinstance(method, TowerPruner) or method.watches_block(index, self.last_block())

    def last_block(self) -> int:
        """The block before which the sequence has its final length: what feeds the projector, or in a packed tower its end."""
        assert self._family.tower is not None
        return self._family.tower.feature_block(self._config) + (1 if self._form.packed else 0)

    def _blocks(self) -> Any:
        assert self._family.tower is not None
        return self._base.get_submodule(self._family.tower.blocks)

    # -- hooks, in the order of a forward pass ---------------------------------------------------------------------------

    def begin(self, call: Call | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TowerPass:
        """A pass through the tower begins: what travels through its blocks. `call` is None where images are encoded alone."""
        settings = self._contexts.settings
        enabled, budget = (settings.enabled, settings.budget) if call is None else (call.enabled, call.budget)
        bound = self.stage if enabled else None
        inside = bound is not None and self._between
        self.now.clocks, self.now.work = (), None
        form, chosen = self._form, list[Tensor | None]()
        if enabled and self.pixels is not None:
            kept, given = self._pruning.budget_of(self.pixels, budget), by_name(module, args, kwargs)
            form, chosen = self._choose(self.pixels, kept, first_of(module, args, kwargs), given)
        tower = TowerPass(
            plan=self._plan,
            facts=self._facts,
            last=self.last_block(),
            wanted=self.wanted if enabled else frozenset(),
            pruner=bound.method if bound is not None and isinstance(bound.method, TowerPruner) else None,
            budget=self._pruning.budget_of(bound, budget) if bound is not None and inside else None,
            drops=inside,
            form=form,
            in_call=call is not None,
            chosen=chosen,
        )
        if self._shape is not None and tower.shortens:
            tower.work = self.now.work = TowerWork(self._shape, 0)
        return tower

    def _choose(
        self, bound: BoundStage, budget: Budget, pixels: Tensor, given: dict[str, Any]
    ) -> tuple[Form, list[Tensor | None]]:
        """What stays of every picture before the first block, from the arguments of the tower."""
        patches = self._patches
        assert patches is not None
        with self._timed(pixels.device), torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            if patches.grid is None:
                entering = patches_of_crops(pixels, self._base.get_submodule(patches.embedding))
                return self._form, choose_tokens(bound, budget, self._facts, entering)
            grids, unit = given[patches.grid].tolist(), self._facts.patches_per_token
            chosen = choose_tokens(bound, budget, self._facts, patches_of_list(pixels, grids, unit, bound.method.name))
        side, orders = isqrt(unit), list[Tensor]()
        if (order := patches.order) is not None:
            orders = [order(self._config, height // side, width // side) for _, height, width in grids]
        return replace(self._form, orders=orders, lengths=[height * width for _, height, width in grids]), chosen

    def enter_first_block(self, tower: TowerPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What enters the first block whose attention sees whole pictures says how many patches each has."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if not self._form.packed:
            tower.begin([hidden.shape[1] - self._form.before], hidden.shape[0], hidden.device)
        else:
            tower.begin(tower.form.lengths or kwargs["cu_seqlens"].diff().tolist(), 1, hidden.device)

    def watch_block(
        self, tower: TowerPass, index: int, probes: list[str], query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> None:
        """Look at the attention of a block. One that gradient checkpointing runs again was seen before."""
        if not tower.over:
            with self._timed(query.device), torch.no_grad():
                tower.watch(index, query, key, value, scaling, probes)

    def enter_block(
        self, index: int, module: nn.Module, tower: TowerPass, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Shorten what enters a block of the tower."""
        if not tower.shortens:
            return None
        if index == 0:
            self.enter_first_block(tower, args, kwargs)
        if module.training:
            tower = _as_it_was(tower, index, module)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        with self._timed(hidden.device):
            if index == 0:
                hidden = tower.enter(hidden) if tower.chosen else hidden
            elif tower.drops:
                hidden = tower.shorten_packed(index, hidden) if tower.packed else tower.shorten_crops(index, hidden)
            if not tower.packed:
                mask = tower.mask(self._config.vision_config._attn_implementation, hidden.dtype)
                tower.note([tower.lengths[0] + tower.form.before] * len(hidden), [hidden.shape[1]] * len(hidden))
                if len(args) > 1:  # transformers hands the mask over by position
                    return (hidden, mask, *args[2:]), kwargs
                return (hidden,), {**kwargs, "attention_mask": mask}
            given = tower.packed_arguments(kwargs)
            tower.note(kwargs["cu_seqlens"], given["cu_seqlens"])
            return (hidden, *args[1:]), given

    def enter_merger(self, tower: TowerPass, args: tuple[Any, ...]) -> Any:
        return (tower.shorten_packed(len(self._blocks()), args[0]), *args[1:]) if tower.drops else args

    def leave_projector(self, tower: TowerPass, args: tuple[Any, ...], features: Tensor) -> Tensor:
        with self._timed(features.device):
            return self._remember(tower, args, features)

    def _remember(self, tower: TowerPass, args: tuple[Any, ...], features: Tensor) -> Tensor:
        tower.over = True
        restored = tower.restore(features)
        if tower.work is not None:
            tower.work.tokens = features.flatten(0, -2).shape[0]
        if tower.wanted:
            # transformers casts features to the dtype of the words they are put among, and so must their names
            among = self._language_model.get_input_embeddings().weight.dtype
            lives = (restored.untyped_storage(), tower.output)
            tower.observed = self.memory.add(
                features.flatten(0, -2).to(among), tower.probes(features, args[0]), lives, differentiable=tower.in_call
            )
        if tower.shortens and on_host(features.isnan().any()):
            raise UsageError(
                "the vision tower returned NaN for a picture; NaN marks dropped patches, so the two cannot be told apart: "
                "check the pixel values, or load the tower in a dtype with more range (bfloat16, float32)."
            )
        return restored

    def leave(self, tower: TowerPass, output: Any) -> None:
        """What the tower returned lives as long as its features are wanted."""
        tower.output = None if tower.over else output
        if tower.observed is not None and hasattr(output, "__weakref__"):  # a projector inside the tower
            tower.observed.holders.append(ref(output))

    def _timed(self, device: torch.device) -> Clock:
        """A clock of the time that is spent inside the tower."""
        clock = Clock(what="inside the vision tower", device=device)
        self.now.clocks = (*self.now.clocks, clock)
        return clock


def enter_pool(tower: TowerPass) -> None:
    """A video is in the tower, and squares of its patches become one token each.

    Raises:
        UsageError: patches were dropped, so that there are no squares.
    """
    plan = tower.plan
    if tower.shortened:
        name = plan.recipe if tower.pruner is None else tower.pruner.name
        raise UsageError(
            f"{name} drops patches in the vision tower, but squares of a video's patches become one token behind it, which "
            "needs all of them: choose a method that prunes in the language model, or pass the frames as pictures."
        )
    tower.pooled = plan.family.videos.pooled(plan.config)


def passes_on(block: nn.Module) -> bool:
    """Whether a block of a tower passes keyword arguments on to its attention."""
    return any(str(parameter).startswith("**") for parameter in signature(type(block).forward).parameters.values())


@torch.compiler.disable
def _watch_block(
    plan: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    index: int,
    probes: list[str],
    **kwargs: Any,
) -> None:
    """Observer of a block of the tower."""
    plan.tower.watch_block(kwargs[CALL_ARGUMENT], index, probes, query, key, value, scaling)


def _as_it_was(tower: TowerPass, index: int, module: nn.Module) -> TowerPass:
    """A pass through the tower, as it was when block `index` was entered for the first time.

    Before transformers 5.23, gradient checkpointing runs a block's hooks again when it recomputes the block.
    """
    if (before := tower.before.get(index)) is not None:
        return before.branch()
    if is_recomputed(module):
        tower.before[index] = tower.branch()
    return tower


def is_recomputed(module: nn.Module) -> bool:
    """Whether gradient checkpointing runs a layer again in the backward pass."""
    return module.training and bool(getattr(module, "gradient_checkpointing", False))
