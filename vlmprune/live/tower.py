"""Inside the vision tower: what is seen there, what is dropped there, and how both reach the language model.

Two facts of transformers decide the form. Between tower and language model, features are cut up, un-padded, copied for beams
and cached by the user, so nothing that is told beside them stays in step. And the number of features must match the prompt.
Hence

* what the tower knew of a token is filed under the token's own features (`FeatureIndex`);
* a view that was shortened inside the tower leaves the projector at full length, with NaN in the rows of dropped patches; a cut
  before the first decoder layer removes them. Forgetting that cut would be loud.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vlmprune.device import on_device
from vlmprune.kernels.attention_mass import attention_mass
from vlmprune.live.feature_index import (
    Known,
)
from vlmprune.live.masks import block_mask
from vlmprune.live.rows import Reduction
from vlmprune.methods.base import Block, TowerPruner, TowerState
from vlmprune.schedule import Budget
from vlmprune.view import WITH_CLS, TowerFacts


class TowerPass:
    """One pass through a vision tower. It travels from block to block as a keyword argument.

    Args:
        plan: the plan that this pass follows.
        facts: what is known of the tower.
        last: block whose output feeds the projector.
        wanted: probes to take.
        pruner: the method that works inside the tower, or None.
        budget: what that method shall keep of each view.
        cuts: False where the method only watches.
        in_call: the prompt follows in the same call.

    Attributes:
        over: the pass has left the projector. What runs in the tower from then on is run again, by gradient checkpointing.
        before: per block, the pass as it was when the block was entered; see `Call.before`.
        known: what the memory holds of this pass, or None.
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
        cuts: bool,
        in_call: bool = False,
    ) -> None:
        self.plan, self.facts, self.last, self.wanted = plan, facts, last, wanted
        self.pruner, self.budget, self.cuts, self.in_call = pruner, budget, cuts, in_call
        self.states: list[TowerState] = []
        self.before: dict[int, TowerPass] = {}
        self.known: Known | None = None
        self.output: Any = None
        self.shortened = self.over = False
        self._segment = (-1, -1)  # block and view that were watched last, in a packed tower

    def begin(self, lengths: Sequence[int], views: int, device: torch.device) -> None:
        """The shape of what enters the first block: `[view, 1 + patch]`; a packed tower (Qwen-VL) has one view after another,
        in `lengths`. A second call changes nothing."""
        if self.states:
            return
        self.lengths, self.views, self.device = list(lengths), views, device
        self.states = [self._state(length, self.budget) for length in lengths]

    @property
    def recomputes(self) -> bool:
        """Gradient checkpointing runs blocks of this pass again, in the backward pass."""
        return bool(self.before)

    def branch(self) -> TowerPass:
        """The pass as it is now: what happens to it later does not reach the copy, nor the other way round."""
        copied = copy(self)
        copied.states = [replace(state, carried=dict(state.carried)) for state in self.states]
        return copied

    def _state(self, patches: int, budget: Budget | None) -> TowerState:
        views = 1 if self.packed else self.views
        tokens = patches // self.facts.unit
        target = (tokens if budget is None else budget.resolve(tokens)) * self.facts.unit
        cells = torch.arange(patches, device=self.device).expand(views, patches)
        return TowerState(facts=self.facts, target=target, cells=cells, side=round(patches**0.5))

    @property
    def packed(self) -> bool:
        """Views stand one after the other in one sequence without CLS tokens."""
        return not self.facts.cls

    # -- attention of a block --------------------------------------------------------------------------------------------

    def see(self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Attention of block `index`, `[view, head, token, dim]` each; in a packed tower one view at a time, in their order."""
        key, value = key.to(query.dtype), value.to(query.dtype)  # `torch.autocast` leaves them in different ones
        state = self.states[0]
        if self.packed:
            view = self._segment[1] + 1 if self._segment[0] == index else 0
            self._segment = (index, view)
            state = self.states[view]
        valid = None
        if self.facts.cls and state.valid is not None:
            valid = torch.nn.functional.pad(state.valid, (1, 0), value=True)
        if self.pruner is not None and (not self.cuts or state.cells.shape[1] > state.target):
            block = Block(index, self.last, query, key, value, scaling, self.facts.cls, valid)
            self.pruner.watch(block, state)

    def note(self, probe: str, query: Tensor, key: Tensor, scaling: float) -> None:
        """Take a probe of a tower with CLS tokens from one block's attention."""
        if probe == "tower_keys":
            self.states[0].carried[probe] = key[:, :, 1:].float().mean(dim=1)  # [view, patch, dim]
            return
        valid = self.states[0].valid
        visible = None if valid is None else torch.nn.functional.pad(valid, (1, 0), value=True)[:, None]
        attention = attention_mass(query[:, :, :1], key, scaling, visible)[:, :, 1:]
        self.states[0].carried[probe] = attention.transpose(1, 2)  # [view, patch, head]

    # -- shortening ------------------------------------------------------------------------------------------------------

    def shorten_views(self, index: int, hidden: Tensor) -> Tensor:
        """What enters block `index` of a tower with CLS tokens: `[view, 1 + patch, dim]` -> `[view, 1 + kept, dim]`."""
        assert self.pruner is not None
        (state,) = self.states
        alive = self.pruner.cut(index - 1, self.last, hidden[:, 1:], state)
        if alive is None:
            return hidden
        stays, patches = alive
        return torch.cat((hidden[:, :1], self._apply(state, stays, patches)), dim=1)

    def shorten_packed(self, index: int, hidden: Tensor) -> Tensor:
        """What enters block `index` of a packed tower: `[patch, dim]` -> `[kept, dim]`."""
        assert self.pruner is not None
        lengths = [state.cells.shape[1] for state in self.states]
        pieces = []
        for state, patches in zip(self.states, hidden.split(lengths), strict=True):
            alive = self.pruner.cut(index - 1, self.last, patches[None], state)
            pieces.append(patches if alive is None else self._apply(state, *alive)[0])
        return torch.cat(pieces) if self.shortened else hidden

    def packed_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a block of a packed tower, for the patches that are left."""
        if not self.shortened:
            return kwargs
        starts = np.cumsum([0, *self.lengths]).tolist()
        rows = torch.cat([state.cells[0] + start for state, start in zip(self.states, starts, strict=False)])
        kept = on_device(np.array([0, *(state.cells.shape[1] for state in self.states)]), rows.device).cumsum(0)
        rotary = tuple(part[rows.to(part.device)] for part in kwargs["position_embeddings"])
        return {**kwargs, "position_embeddings": rotary, "cu_seqlens": kept.to(kwargs["cu_seqlens"].dtype)}

    def _apply(self, state: TowerState, stays: Tensor, patches: Tensor) -> Tensor:
        if state.valid is not None:
            stays = stays & state.valid
        reduction = Reduction.keeping(stays)
        self.shortened = True
        state.valid = None if reduction.dense else reduction.valid
        state.cells = state.cells.gather(1, reduction.rows)
        view = torch.arange(len(state.cells), device=state.cells.device)[:, None]
        state.carried = {name: carried[view, reduction.rows] for name, carried in state.carried.items()}
        return reduction.gather(patches)

    def mask(self, implementation: str, dtype: torch.dtype) -> Tensor | BlockMask | None:
        """The attention mask of views of different lengths, in the form the implementation expects; None without padding."""
        valid = self.states[0].valid
        if valid is None:
            return None
        visible = torch.nn.functional.pad(valid, (1, 0), value=True)
        if "flash" in implementation:
            return visible
        if implementation == "flex_attention":
            return block_mask(visible.shape[1], visible, causal=False)
        visible = visible[:, None, None]
        if implementation == "eager":
            return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)
        return visible

    # -- behind the projector --------------------------------------------------------------------------------------------

    def probes(self, projected: Tensor, entering: Tensor) -> dict[str, Tensor]:
        """The probes, one row per row of `projected` `[…, dim]`, from what entered the projector."""
        found = {name: carried for name, carried in self.states[0].carried.items() if name in self.wanted & WITH_CLS}
        if "tower_features" in self.wanted:
            found["tower_features"] = entering
        if "flow" in self.wanted:
            flow = torch.cat([state.carried["flow"][0] for state in self.states])
            found["flow"] = flow.unflatten(0, (-1, self.facts.unit)).mean(dim=1)
        if "cell" in self.wanted:
            found |= self._places()
        rows = projected.flatten(0, -2).shape[0]
        return {name: value.reshape(rows, *value.shape[projected.ndim - 1 :]) for name, value in found.items()}

    def _places(self) -> dict[str, Tensor]:
        """Raster index, number of the view, and side of the view of every row; packed towers have no views."""
        if self.packed:
            units = [state.cells.shape[1] // self.facts.unit for state in self.states]
            return {"cell": torch.cat([torch.arange(count, device=self.device) for count in units])}
        (state,) = self.states
        view = torch.arange(len(state.cells), device=self.device)[:, None].expand_as(state.cells)
        return {"cell": state.cells, "view": view, "side": torch.full_like(view, state.side)}

    def restore(self, projected: Tensor) -> Tensor:
        """Put the survivors back at their places among all, NaN elsewhere."""
        if not self.shortened:
            return projected
        if not self.packed:
            (state,) = self.states
            full = projected.new_full((len(projected), self.lengths[0] + 1, projected.shape[-1]), torch.nan)
            target = state.cells if state.valid is None else torch.where(state.valid, state.cells, self.lengths[0])
            return full.scatter(1, target[..., None].expand_as(projected), projected)[:, :-1]
        unit, pieces = self.facts.unit, []
        kept = [state.cells.shape[1] // unit for state in self.states]
        for patches, tokens in zip(self.lengths, projected.split(kept), strict=True):
            # FlowCut's Qwen code merges each four consecutive survivors and gives them the first places of the picture.
            missing = tokens.new_full((patches // unit - len(tokens), tokens.shape[-1]), torch.nan)
            pieces.append(torch.cat((tokens, missing)))
        return torch.cat(pieces)
