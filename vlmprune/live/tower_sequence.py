"""The sequence that runs through the blocks of a vision tower: whose patches it has, and how it becomes shorter.

A crop that was shortened leaves the projector at full length, with NaN in the rows of dropped patches: `live/tower.py` says
why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vlmprune.device import on_host
from vlmprune.live.masks import block_mask
from vlmprune.live.record import TowerWork
from vlmprune.live.rows import Reduction
from vlmprune.methods.tower import TowerState
from vlmprune.schedule import Budget
from vlmprune.view import TowerFacts


@dataclass(frozen=True, eq=False)
class Form:
    """What runs through the blocks of a tower.

    Attributes:
        packed: patches of all pictures in one sequence `[patch, dim]`; else `[crop, token, dim]`.
        before: tokens of a crop before its patches.
        orders: of a packed tower, per picture `[token]` which token stands at each place; empty if row by row.
        lengths: of a packed tower, patches of every picture, where they are known before the first block.
    """

    packed: bool = False
    before: int = 1
    orders: Sequence[Tensor] = ()
    lengths: Sequence[int] = ()


class TowerSequence:
    """The patches that are left of every picture, or crop, of one pass through a tower.

    Args:
        facts: traits of the tower.
        form: of the sequence.
        budget: what a method shall keep of each crop between blocks.
        chosen: per picture or crop, the tokens that stay before the first block, or None for all; empty if no stage is there.

    Attributes:
        states: what is left; of a packed tower per picture, else of all crops.
        lengths: patches of every picture, or of each crop, before any were dropped.
        marks: patches may be dropped between blocks, too.
        shortened: some were dropped.
        work: what it computes, or None.
        scattered: patches were dropped in a packed tower wherever they were; its tokens are no squares of the picture.
    """

    def __init__(self, facts: TowerFacts, form: Form, budget: Budget | None, chosen: Sequence[Tensor | None]) -> None:
        self.facts, self.form, self.budget, self.chosen, self.packed = facts, form, budget, chosen, form.packed
        self.states: list[TowerState] = []
        self.work: TowerWork | None = None
        self.marks = self.shortened = self.scattered = False
        self._entered: list[Tensor] = []  # cells that entered the first block, where some did not
        self._given: dict[tuple[int, int], tuple[Any, Any, dict[str, Any]]] = {}  # what blocks are given, for what they were

    def begin(self, lengths: Sequence[int], crops: int, device: torch.device) -> None:
        """Set the shape of what enters the first block: `crops` of `[1 + patch]` tokens; or, in a packed tower (Qwen-VL), one
        picture after another, with `lengths` patches. A second call changes nothing."""
        if self.states:
            return
        self.lengths, self.crops, self.device = list(lengths), crops, device
        self.states = [self._state(length) for length in lengths]

    def _state(self, patches: int) -> TowerState:
        crops = 1 if self.packed else self.crops
        tokens = patches // self.facts.patches_per_token
        target = (tokens if self.budget is None else self.budget.resolve(tokens)) * self.facts.patches_per_token
        cells = torch.arange(patches, device=self.device).expand(crops, patches)
        return TowerState(facts=self.facts, target=target, cells=cells, side=round(patches**0.5))

    def enter(self, hidden: Tensor) -> Tensor:
        """What enters the first block: `hidden` `[crop, token, dim]`, or `[patch, dim]` of a packed tower, without the patches
        of tokens that were not chosen."""
        if all(index is None for index in self.chosen):
            self._entered = [state.cells for state in self.states]
            return hidden
        stays = [self._patches_of(number, index) for number, index in enumerate(self.chosen)]
        before = self.form.before
        if not self.packed:
            kept = self._apply(self.states[0], torch.stack(stays), hidden[:, before:])
            shorter = torch.cat((hidden[:, :before], kept), dim=1)
        else:
            pieces = hidden.split(self.lengths)
            parts = zip(self.states, stays, pieces, strict=True)
            shorter = torch.cat([self._apply(state, mine[None], piece[None])[0] for state, mine, piece in parts])
        padding = self.lengths[0]
        self._entered = [
            state.cells if state.valid is None else torch.where(state.valid, state.cells, padding) for state in self.states
        ]
        return shorter

    def _patches_of(self, number: int, index: Tensor | None) -> Tensor:
        """`[patch]` bool, in the order of the blocks: the patches of some tokens of a picture, or of all."""
        unit, length = self.facts.patches_per_token, self.lengths[number if self.packed else 0]
        tokens = torch.ones(length // unit, dtype=torch.bool, device=self.device)
        if index is not None:
            tokens = torch.zeros_like(tokens).index_fill(0, index.to(self.device), True)
        if (order := self._order(number)) is not None:
            tokens = tokens[order]
        return tokens.repeat_interleave(unit)

    def _order(self, number: int) -> Tensor | None:
        """`[token]` which token of a picture stands at each place of the blocks' sequence; None if row by row."""
        return self.form.orders[number].to(self.device) if self.form.orders else None

    def _apply(self, state: TowerState, stays: Tensor, patches: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The patches that stay; `counts`: how many of each crop, if that is known without asking the device."""
        if state.valid is not None:
            stays = stays & state.valid
        reduction = Reduction.keeping(stays, counts)
        self.shortened, self._given = True, {}
        state.valid = None if reduction.dense else reduction.valid
        state.cells = state.cells.gather(1, reduction.rows)
        crop = torch.arange(len(state.cells), device=state.cells.device)[:, None]
        state.carried = {name: carried[crop, reduction.rows] for name, carried in state.carried.items()}
        return reduction.gather(patches)

    def _visible(self, state: TowerState) -> Tensor | None:
        """`[crop, token]` bool, False on padding; None if there is none."""
        if state.valid is None or self.packed:
            return None
        return torch.nn.functional.pad(state.valid, (self.form.before, 0), value=True)

    def mask(self, implementation: str, dtype: torch.dtype) -> Tensor | BlockMask | None:
        """The attention mask of crops of different lengths, in the form the implementation expects; None without padding."""
        if self.states[0].valid is None:
            return None
        visible = self._visible(self.states[0])
        if visible is None or "flash" in implementation:
            return visible
        if implementation == "flex_attention":
            return block_mask(visible.shape[1], visible, causal=False)
        visible = visible[:, None, None]
        if implementation == "eager":
            return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)
        return visible

    def note(self, entered: Tensor | list[int], left: Tensor | list[int]) -> None:
        """A block computes segments of these lengths, or ends; `entered` is what it would without the recipe."""
        if self.work is not None and len(self.work.left) < len(self.work.shape.blocks):  # not run again for a gradient
            self.work.patches = sum(self.lengths) * (1 if self.packed else self.crops)
            self.work.entered.append(entered)
            self.work.left.append(left)

    def packed_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a block of a packed tower, for the patches that are left."""
        if not self.shortened:
            return kwargs
        ends, rotary = kwargs["cu_seqlens"], kwargs["position_embeddings"]
        known = self._given.get((id(ends), id(rotary)))  # one for windows, one for whole pictures
        if known is None:
            known = self._given[id(ends), id(rotary)] = ends, rotary, self._shortened(ends, rotary, kwargs.get("max_seqlen"))
        return {**kwargs, **known[2]}

    def _shortened(self, ends: Tensor, rotary: Any, longest: Any) -> dict[str, Any]:
        """What the patches that are left are given: `cu_seqlens` without the windows that are empty now, and rotary
        embeddings."""
        starts = np.cumsum([0, *self.lengths]).tolist()
        rows = torch.cat([state.cells[0] + start for state, start in zip(self.states, starts, strict=False)])
        there = torch.zeros(starts[-1] + 1, dtype=torch.long, device=rows.device).index_fill(0, rows + 1, 1)
        left = there.cumsum(0)[ends.to(rows.device).long()]
        if len(ends) != len(self.states) + 1:
            left = left.unique_consecutive()
        given: dict[str, Any] = {
            "position_embeddings": tuple(part[rows.to(part.device)] for part in rotary),
            "cu_seqlens": left.to(ends.device, ends.dtype),
        }
        if longest is not None:
            most = left.diff().max()
            given["max_seqlen"] = most if isinstance(longest, Tensor) else int(on_host(most))
        return given

    def restore(self, projected: Tensor) -> Tensor:
        """Put the kept patches back in their places among all, NaN elsewhere. If `marks`, rows that entered the first block and
        did not come here end in infinity."""
        if not self.shortened:
            return projected
        if not self.packed:
            (state,) = self.states
            full = projected.new_full((len(projected), self.lengths[0] + 1, projected.shape[-1]), torch.nan)
            target = state.cells if state.valid is None else torch.where(state.valid, state.cells, self.lengths[0])
            if self.marks:
                full[..., -1] = full[..., -1].scatter(1, self._entered[0], torch.inf)
            return full.scatter(1, target[..., None].expand_as(projected), projected)[:, :-1]
        merged, pieces = self.facts.patches_per_token, []
        kept = [state.cells.shape[1] // merged for state in self.states]
        for number, (patches, tokens) in enumerate(zip(self.lengths, projected.split(kept), strict=True)):
            full = tokens.new_full((patches // merged, tokens.shape[-1]), torch.nan)
            if self.marks:
                full[self._entered[number][0, ::merged] // merged, -1] = torch.inf
            pieces.append(full.index_put((self._tokens(number),), tokens))
        return torch.cat(pieces)

    def _tokens(self, number: int) -> Tensor:
        """`[token]` the places of a packed tower's tokens among those of their picture, in the order of the blocks. If patches
        are merged wherever they were, their tokens take the first places that entered."""
        merged, cells = self.facts.patches_per_token, self.states[number].cells
        count = cells.shape[1] // merged
        if self.scattered:
            cells = self._entered[number] if self._entered else torch.arange(self.lengths[number], device=self.device)[None]
        return cells[0, ::merged][:count] // merged
