"""One pass through an image tower that stands alone: a batch of pictures of one size, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters.image_tower import ImageTower, Pool
from vlmprune.device import on_host
from vlmprune.errors import UsageError
from vlmprune.live.choosing import BoundStage
from vlmprune.live.image_tower_attention import BlockAttention
from vlmprune.live.image_tower_choosing import Pictures, choose
from vlmprune.live.image_tower_report import Left, TowerRecord
from vlmprune.live.record import Clock
from vlmprune.live.tower import FROM_BLOCK, TowerPass
from vlmprune.live.tower_sequence import Form
from vlmprune.methods.tower import TowerPruner, TowerState
from vlmprune.schedule import Budget


class ImageTowerPass(TowerPass):
    """A pass through an image tower. It belongs to the thread in which the tower runs.

    Args:
        plan: the plan that it follows (`ImageTowerPlan`).
        tower: the tower.
        budget: of an override, or None.
        record: what happens is written there.
        pixels: `[picture, channel, row, column]` what the tower was given.
        grid: rows and columns of patches.

    Attributes:
        entered: how many blocks were entered.
        attention: the mode that is on in the block which runs now, or None.
    """

    def __init__(
        self,
        plan: Any,
        tower: ImageTower,
        budget: Budget | None,
        record: TowerRecord,
        pixels: Tensor,
        grid: tuple[int, int],
    ) -> None:
        inside: BoundStage | None = plan.inside
        pruner = None if inside is None else inside.method
        super().__init__(
            plan=plan,
            facts=tower.facts,
            last=record.blocks - 1,
            wanted=plan.wanted,
            pruner=pruner if isinstance(pruner, TowerPruner) else None,
            budget=None if inside is None else plan.budget_of(inside, budget),
            drops=True,
            form=Form(packed=False, before=tower.before),
        )
        self.tower, self.record, self.grid = tower, record, grid
        self._pictures = Pictures(pixels, grid, tower.patch)
        self.entered = 0
        self.attention: BlockAttention | None = None
        patches = grid[0] * grid[1]
        self._keep = {bound.number: plan.budget_of(bound, budget).resolve(patches) for bound in plan.stages}
        self._running = [bound for bound in plan.stages if self._keep[bound.number] < patches or bound.adaptive]
        self._probes = plan.probes_of(self._running)

    # -- what the hooks call ---------------------------------------------------------------------------------------------

    def enter_block(self, index: int, hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Shorten what enters a block, `[picture, token, dim]`, and look at its attention from now on if that is needed."""
        self.entered += 1
        if index == 0:
            self._begin(hidden)
        (state,) = self.states
        if self.pruner is not None or any(bound.stage.layer == index for bound in self._running):
            with self._timed("choosing"), torch.autocast(hidden.device.type, enabled=False):
                hidden = self._shorten(index, hidden, state)
        watched = self._watches(index, state)
        if watched or state.valid is not None:
            self.attention = BlockAttention(self._see(index) if watched else None, self._visible(state))
            self.attention.__enter__()
        return hidden, self._with_rotary(state, kwargs)

    def leave_block(self, index: int, failed: bool) -> None:
        """A block has run, or failed.

        Raises:
            UsageError: it ran, and computed attention otherwise than in one call of one of torch's two functions for it.
        """
        attention, self.attention = self.attention, None
        if attention is None:
            return
        attention.__exit__(None, None, None)
        if attention.count != 1 and not failed:
            raise UsageError(
                f"{self.plan.recipe} has to see, or to mask, the attention of block {index}, but the block called neither "
                f"scaled_dot_product_attention nor nn.MultiheadAttention once over all tokens, without a mask (found "
                f"{attention.count}): use an attention implementation that does, in transformers "
                'model.set_attn_implementation("sdpa"), in timm without TIMM_FUSED_ATTN=0.'
            )

    def average(self, out: Tensor) -> Tensor:
        """Padding of what is averaged over patches `[picture, token, dim]` gets the mean of the patches that are left, so that
        the average over all rows is theirs (and that of the tokens before them, where these are averaged, too)."""
        (state,) = self.states
        if state.valid is None:
            return out
        before, patches, valid = out[:, : self.tower.before], out[:, self.tower.before :], state.valid[..., None]
        wide = patches.to(torch.promote_types(patches.dtype, torch.float32))
        total, count = wide.masked_fill(~valid, 0).sum(dim=1, keepdim=True), valid.sum(dim=1, keepdim=True)
        if self.tower.averages_before:
            total, count = total + before.to(wide.dtype).sum(dim=1, keepdim=True), count + self.tower.before
        mean = total / count
        return torch.cat((before, torch.where(valid, patches, mean.to(patches.dtype))), dim=1)

    def hide(self, pool: Pool, keys: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a pool of attention over `keys` `[picture, token, dim]`, with padding hidden."""
        (state,) = self.states
        if state.valid is None:
            return kwargs
        visible = state.valid if keys.shape[1] == state.valid.shape[1] else self._visible(state)
        assert visible is not None
        if pool.hides == "key_padding_mask":
            return {**kwargs, pool.hides: ~visible}
        added = torch.zeros(visible.shape, dtype=keys.dtype, device=keys.device).masked_fill_(~visible, -torch.inf)
        return {**kwargs, pool.hides: added[:, None, None]}

    def close(self) -> None:
        """Whatever became of the pass, its mode is not left on."""
        if self.attention is not None:
            self.attention.__exit__(None, None, None)
            self.attention = None

    def end(self) -> None:
        """All blocks have run.

        Raises:
            UsageError: some have not, because they were replaced after wrapping.
        """
        self.over = True
        if self.entered != self.record.blocks:
            raise UsageError(
                f"{self.entered} of {self.record.blocks} blocks ran as {self.plan.recipe} knows them: a block was replaced "
                "after vlmprune.wrap, or the call ended early; call vlmprune.unwrap(model), and wrap the model again."
            )

    # -- looking ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        with Clock(what=what, device=self.record.tower.device) as clock:
            yield
        self.record.selection.append(clock)

    def _begin(self, hidden: Tensor) -> None:
        patches, found = self.grid[0] * self.grid[1], hidden.shape[1] - self.tower.before
        if found != patches:
            raise UsageError(
                f"expected {patches} patches ({self.grid[0]} × {self.grid[1]}) before the first block, found {found}: patch "
                "dropout is on in training; call model.eval(), or build the model with patch_dropout=0. Or the tower pads "
                "pictures (dynamic_img_pad): give them sides that are multiples of its patches."
            )
        self.begin([patches], hidden.shape[0], hidden.device)
        self.states[0].side = self.grid[1]

    def _watches(self, index: int, state: TowerState) -> bool:
        """Whether the attention of a block is looked at."""
        watching = self.pruner is not None and self.pruner.watches_block(index, self.last)
        in_tower = watching and index < self.last and state.cells.shape[1] > state.target
        return in_tower or bool(self._probes.get(index))

    def _see(self, index: int) -> Callable[[Tensor, Tensor, Tensor, float], None]:
        def see(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
            with self._timed("looking"), torch.no_grad():
                self.watch(index, query, key, value, scaling, self._probes.get(index, ()))

        return see

    def watch(self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, probes: Any = ()) -> None:
        of_block = [name for name in probes if name in FROM_BLOCK]
        super().watch(index, query, key, value, scaling, of_block)
        for name in set(probes) - set(of_block):  # [picture, patch, head, dim]
            whole = {"keys": key, "values": value}[name]
            self.states[0].carried[name] = whole[:, :, self.tower.before :].transpose(1, 2)

    def _with_rotary(self, state: TowerState, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a block, with the rotary embeddings of the patches that are left: per picture."""
        rotary = kwargs.get(self.tower.rotary or "")
        if rotary is None or not self.shortened:
            return dict(kwargs)
        cells = state.cells.to(rotary.device)
        # [patch, dim], or [head, patch, dim] where they differ by head, before they differ by picture
        own = rotary[cells][:, None] if rotary.ndim == 2 else rotary[:, cells].transpose(0, 1)
        return {**kwargs, str(self.tower.rotary): own}

    # -- dropping --------------------------------------------------------------------------------------------------------

    def _shorten(self, index: int, hidden: Tensor, state: TowerState) -> Tensor:
        before, patches, shortened = hidden[:, : self.tower.before], hidden[:, self.tower.before :], False
        if self.pruner is not None and index and (left := self.pruner.drop(index - 1, self.last, patches, state)) is not None:
            fuses = left[1] is not patches
            patches, shortened = self._apply(state, *left), True
            self._note(index, self.plan.inside, state, patches.detach() if fuses else None)
        for bound in self._running:
            if bound.stage.layer == index and bound.stage.site != "vision":
                chosen = choose(bound, self._keep[bound.number], patches, state, self._pictures)
                patches, shortened = self._apply(state, chosen.stays, chosen.patches, chosen.counts), True
                self._note(index, bound, state, patches.detach() if chosen.merges else None)
        return torch.cat((before, patches), dim=1) if shortened else hidden

    def _note(self, index: int, bound: BoundStage, state: TowerState, merged: Tensor | None = None) -> None:
        if state.valid is not None and not on_host(state.valid.any(dim=1).all()):
            raise UsageError(f"{bound.method.name} kept no patch of a picture, which then has no feature: keep at least one.")
        left = Left(index, bound.stage.layer, bound.label, bound.stage.site, state.cells, state.valid, merged)
        self.record.left.append(left)
