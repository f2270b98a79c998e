"""Inside the vision tower: what is observed there, what is dropped there, and how both reach the language model.

Two facts of transformers decide the form. Between the tower and the language model, features are cut up, un-padded, copied for
beams and cached by the user, so that nothing passed along beside them would stay aligned. And the number of features must match
the prompt's placeholders. Hence

* what was observed of a token is looked up by a hash of the token's features (`FeatureIndex`);
* a crop that was shortened inside the tower leaves the projector at full length, with NaN in the rows of dropped patches. A
  stage before the first decoder layer removes these rows. Were it forgotten, every output would be NaN.

A picture that is not cut up is its own only crop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import replace
from math import isqrt
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlmprune.device import on_host
from vlmprune.errors import UsageError
from vlmprune.kernels.attention_mass import attention_mass
from vlmprune.live.call import Call
from vlmprune.live.feature_index import FeatureIndex, Observed
from vlmprune.live.tower_sequence import Form, TowerSequence
from vlmprune.methods.base import Pruner
from vlmprune.methods.tower import Block, TowerPruner
from vlmprune.schedule import Budget, Stage
from vlmprune.view import PROBES, TowerFacts, known_probes

CROP, SIDE = "crop", "side"
"""Recorded with the probe `cell`: the number of the crop that a token belongs to, and that crop's side."""


class PlannedStage(Protocol):
    """One stage of a recipe in a model: its method, and the probes that it lists."""

    @property
    def stage(self) -> Stage: ...
    @property
    def method(self) -> Pruner: ...
    @property
    def needs(self) -> frozenset[str]: ...


S = TypeVar("S", bound=PlannedStage)


def stage_in_tower(stages: Sequence[S], needs: frozenset[str]) -> S | None:
    """The stage whose method works inside the vision tower: it drops patches there, or provides a probe that is needed.

    Args:
        stages: of a recipe, in their order.
        needs: all probes that the recipe's methods list.

    Raises:
        UsageError: two methods would work there, or none provides a probe that another method lists.
    """
    inside = [stage for stage in stages if stage.stage.site == "vision" or (needs & _provided(stage.method))]
    names = list(dict.fromkeys(stage.method.name for stage in inside))
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} both work inside the vision tower, where only one method can: leave one out.")
    known = known_probes()
    for name in sorted(needs):
        if name in known and known[name].taken == "tower method" and not any(name in _provided(s.method) for s in inside):
            raise UsageError(
                f"the probe {name!r} is made inside the vision tower by a method that is not in this recipe: add that method, "
                "or choose another probe."
            )
    return inside[0] if inside else None


def _provided(method: Pruner) -> frozenset[str]:
    made = method.provides if isinstance(method, TowerPruner) else None
    return frozenset() if made is None else frozenset({made.name})


# -- probes of blocks --------------------------------------------------------------------------------------------------------


def _attention_from_cls(block: Block) -> Tensor:
    visible = None if block.valid is None else block.valid[:, None]
    attention = attention_mass(block.query[:, :, :1], block.key, block.scaling, visible)[:, :, 1:]
    return attention.transpose(1, 2)  # [crop, patch, head]


def _tower_keys(block: Block) -> Tensor:
    return block.key[:, :, 1:].float().mean(dim=1)  # [crop, patch, dim]


FROM_BLOCK: dict[str, Callable[[Block], Tensor]] = {
    "tower_keys": _tower_keys,
    **dict.fromkeys((name for name in PROBES if name.startswith("attention_from_cls")), _attention_from_cls),
}
"""How each probe is taken from the attention of its block (`Probe.part`), `[crop, patch, …]`, in a tower with CLS tokens."""


def blocks_of_probes(needs: Iterable[str], feature: int, blocks: int) -> dict[int, list[str]]:
    """The blocks that probes are taken from, by number.

    Args:
        needs: probes.
        feature: the block whose output feeds the projector.
        blocks: how many there are.
    """
    numbers = {"first": 0, "early": max(blocks // 4 - 1, 0), "feature": feature, "final": blocks - 1}
    found: dict[int, list[str]] = {}
    for name, probe in PROBES.items():
        if name in needs and probe.taken == "tower block":
            found.setdefault(numbers[probe.part], []).append(name)
    return found


def look_up_tower(call: Call, index: FeatureIndex, embeddings: Tensor) -> None:
    """Fetch the tower's probes of every picture of a call, by what enters the language model."""
    prompt = call.prompt
    assert prompt is not None
    images = prompt.layout.images
    prompt.tower = index.find([embeddings[image.sample, image.places_on_device.to(embeddings.device)] for image in images])
    if images and CROP in prompt.tower[0]:
        crops = on_host(torch.cat([torch.stack((tower[CROP], tower[SIDE]), dim=1) for tower in prompt.tower]))
        prompt.crops = np.split(crops, np.cumsum(list(map(len, images)))[:-1])


# -- a pass ------------------------------------------------------------------------------------------------------------------


class TowerPass(TowerSequence):
    """One pass through a vision tower. It travels from block to block as a keyword argument.

    Args:
        plan: the plan that this pass follows.
        facts: traits of the tower.
        last: block whose output feeds the projector.
        wanted: probes to take.
        pruner: the method that works inside the tower, or None.
        budget: what that method shall keep of each crop.
        drops: False if the method only watches.
        form: of the sequence that runs through the blocks.
        in_call: the prompt follows in the same call.
        chosen: what stays before the first block.

    Attributes:
        pooled: patches on a side of the squares that a video's patches are made into, beside those of every picture.
        over: the pass has left the projector. If a block runs later, gradient checkpointing recomputes it.
        before: per block, a copy of the pass as it was when the block was first entered, from which gradient checkpointing
            runs the block again.
        observed: this pass's entry in the feature index, or None.
        output: what the tower returned, or None.
    """

    def __init__(
        self,
        plan: Any,
        facts: TowerFacts,
        last: int,
        wanted: frozenset[str],
        pruner: TowerPruner | None,
        budget: Budget | None,
        drops: bool,
        form: Form,
        in_call: bool = False,
        chosen: Sequence[Tensor | None] = (),
    ) -> None:
        super().__init__(facts, form, budget, chosen)
        self.plan, self.last, self.wanted = plan, last, wanted
        self.pruner, self.drops, self.in_call = pruner, drops, in_call
        self.marks = drops and bool(chosen)
        self.before: dict[int, TowerPass] = {}
        self.observed: Observed | None = None
        self.output: Any = None
        self.over = False
        self.pooled = 1
        self._watched = (-1, -1)  # block and picture that were watched last, in a packed tower

    @property
    def recomputes(self) -> bool:
        """Gradient checkpointing runs blocks of this pass again, in the backward pass."""
        return bool(self.before)

    def branch(self) -> TowerPass:
        """The pass as it is now: later changes to it do not reach the copy, nor changes to the copy the pass."""
        copied = copy(self)
        copied.states = [replace(state, carried=dict(state.carried)) for state in self.states]
        copied._given = {}
        return copied

    @property
    def shortens(self) -> bool:
        """Patches may be dropped before the first block, or between blocks."""
        return self.drops or bool(self.chosen)

    # -- attention of a block --------------------------------------------------------------------------------------------

    def watch(self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, probes: Sequence[str] = ()) -> None:
        """Look at the attention of block `index`, `[crop, head, token, dim]` each; a packed tower calls this once per picture,
        in their order."""
        key, value = key.to(query.dtype), value.to(query.dtype)  # `torch.autocast` leaves them in different ones
        state = self.states[self._picture(index)]
        visible = None if state.valid is None else self._visible(state)
        block = Block(index, self.last, query, key, value, scaling, self.facts.cls, visible)
        if self.pruner is not None and (not self.drops or state.cells.shape[1] > state.target):
            self.pruner.watch(block, state)
        for name in probes:
            if name in self.wanted:
                state.carried[name] = FROM_BLOCK[name](block)

    def _picture(self, index: int) -> int:
        """Which picture of a packed tower is watched now, in block `index`."""
        if not self.packed:
            return 0
        picture = self._watched[1] + 1 if self._watched[0] == index else 0
        self._watched = (index, picture)
        return picture

    # -- shortening ------------------------------------------------------------------------------------------------------

    def shorten_crops(self, index: int, hidden: Tensor) -> Tensor:
        """What enters block `index` of a tower with CLS tokens: `[crop, 1 + patch, dim]` -> `[crop, 1 + kept, dim]`."""
        assert self.pruner is not None
        (state,) = self.states
        left = self.pruner.drop(index - 1, self.last, hidden[:, 1:], state)
        if left is None:
            return hidden
        stays, patches = left
        return torch.cat((hidden[:, :1], self._apply(state, stays, patches)), dim=1)

    def shorten_packed(self, index: int, hidden: Tensor) -> Tensor:
        """What enters block `index` of a packed tower: `[patch, dim]` -> `[kept, dim]`."""
        assert self.pruner is not None
        lengths = [state.cells.shape[1] for state in self.states]
        pieces = []
        for state, patches in zip(self.states, hidden.split(lengths), strict=True):
            left = self.pruner.drop(index - 1, self.last, patches[None], state)
            self.scattered |= left is not None
            pieces.append(patches if left is None else self._apply(state, *left)[0])
        return torch.cat(pieces) if self.shortened else hidden

    # -- after the projector ---------------------------------------------------------------------------------------------

    def probes(self, projected: Tensor, entering: Tensor) -> dict[str, Tensor]:
        """The probes, one row per row of `projected` `[…, dim]`, from what entered the projector."""
        found = {name: self._carried(name) for name in self.wanted - {"tower_features", "cell"}}
        if "tower_features" in self.wanted:
            found["tower_features"] = entering
        if "cell" in self.wanted:
            found |= self._places()
        rows = projected.flatten(0, -2).shape[0]
        return {name: value.reshape(rows, *value.shape[projected.ndim - 1 :]) for name, value in found.items()}

    def _carried(self, name: str) -> Tensor:
        """`[crop, token, …]` what blocks recorded of each patch, the mean over the patches of each token."""
        if any(name not in state.carried for state in self.states):
            made = "the method" if self.pruner is None else self.pruner.name
            raise UsageError(
                f"{made} provides the probe {name!r}, but its watch(block, state) left no state.carried[{name!r}]."
            )
        if not self.packed:
            return self._over_squares(self.states[0].carried[name])
        patches = torch.cat([state.carried[name][0] for state in self.states])
        return patches.unflatten(0, (-1, self.facts.patches_per_token)).mean(dim=1)

    def _places(self) -> dict[str, Tensor]:
        """Cell, number of the crop, and side of the crop of every row; packed towers have no crops."""
        if self.packed:
            tokens = [self._tokens(number) for number in range(len(self.states))]
            orders = [self._order(number) for number in range(len(self.states))]
            raster = [mine if order is None else order[mine] for mine, order in zip(tokens, orders, strict=True)]
            return {"cell": torch.cat(raster)}
        (state,) = self.states
        cells, side = state.cells, state.side
        if (unit := self._unit) > 1:
            side = side // unit
            cells = torch.arange(side * side, device=self.device).expand(len(cells), -1)
        crop = torch.arange(len(cells), device=self.device)[:, None].expand_as(cells)
        return {"cell": cells, CROP: crop, SIDE: torch.full_like(crop, side)}

    @property
    def _unit(self) -> int:
        """Patches on a side of the square that becomes a token."""
        return isqrt(self.facts.patches_per_token) * self.pooled

    def _over_squares(self, x: Tensor) -> Tensor:
        """`[crop, token, …]` means of `[crop, patch, …]` over squares of the raster, where these become tokens."""
        if (unit := self._unit) == 1:
            return x
        side = isqrt(x.shape[1])
        whole = side // unit * unit  # what is no whole square at the edges becomes no token
        x = x.unflatten(1, (side, side))[:, :whole, :whole].flatten(1, 2)
        squares = x.unflatten(1, (side // unit, unit, side // unit, unit))  # [crop, row, in it, column, in it, …]
        return squares.mean(dim=(2, 4)).flatten(1, 2)
