"""EViT. Liang et al., ICLR 2022, arXiv:2202.07800, sections 3.2 and 3.3. Attentive patches stay, the others are fused.

    a = mean_h A^h[CLS, ·]                 attention of the CLS token to the patches, in the block
    n ← round( n · (K / n)^(1/r) )         patches that leave it; r blocks of the schedule are left, this one among them
    x_f = Σ a_i x_i                        over the patches that do not stay: one more patch (`fuse`)

How many patches leave each block is fixed beforehand, so that the savings are. The paper drops at three blocks, a quarter, half
and three quarters into the tower (3, 6 and 9 of 12), the same share at each, 0.7 by default; so K is 0.7³ of all.

Differs from the paper: no training; K counts all patches that leave the tower, the fused one among them (official: it comes on
top, and ⌈0.7 n⌉ of those that are left stay at each block); patches are dropped behind a block (official: between the attention
and the MLP of the same block); the fused patch takes the place of the highest patch that it stands for (official: the end);
fuse="mean" divides by Σ a_i, fuse="no" drops them; a is fp32 (official: the tower's dtype), and a constant for gradients. On
LLaVA-NeXT each crop is decided separately: K/2 of each leave the tower (1¼ of a fraction), and the language model keeps K of
the picture, shared among its crops, by their attention in the block that feeds the projector; slightly fewer if un-padding
drops many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlmprune.errors import UsageError, shown
from vlmprune.kernels.attention_mass import attention_mass
from vlmprune.methods.base import alive_top, top
from vlmprune.methods.parameters import choice
from vlmprune.methods.tower import Block, TowerPruner, TowerState
from vlmprune.schedule import Budget, Schedule, Stage
from vlmprune.view import TowerFacts, View

ATTENTION = "attention of CLS"
"""What is carried of each patch from the attention of a block to its end."""


@dataclass(frozen=True, kw_only=True)
class EViT(TowerPruner):
    """Keep what the CLS token attends to, behind some blocks of the vision tower: the savings are known beforehand.

    Args:
        blocks: numbers of the blocks behind which patches are dropped, as 3, "3|6|9" or [3, 6, 9]; a quarter, half and three
            quarters into the tower if empty.
        fuse: what becomes of the patches that do not stay: one patch, their sum weighted by attention ("sum", the paper's), or
            their mean weighted so ("mean"), or nothing ("no").
    """

    name = "evit"
    paper = "arXiv:2202.07800 (ICLR 2022)"
    note = "no training; drops behind blocks; the fused patch is counted"
    needs = frozenset({"attention_from_cls"})
    watches = "attention of the tower's CLS token"
    default = Schedule((Stage(0, Budget(fraction=0.343), "vision"),))
    chooses = "keeps what the CLS token attends to"
    chooses_in_tower = "keeps what the CLS token attends to, behind fixed blocks"
    per_crop = True

    blocks: str = ""
    fuse: Literal["sum", "mean", "no"] = choice("sum", "mean", "no")

    def validate(self) -> None:
        object.__setattr__(self, "blocks", "|".join(map(str, _numbers(self.blocks))))
        if len(self.stages) > 1 or self.stages[0].site != "vision":
            raise UsageError(
                "evit drops patches inside the vision tower, found a stage of the language model: leave layer out, and say "
                "behind which blocks, for example evit:fraction=0.25,blocks=3|6|9."
            )

    def variant(self, facts: TowerFacts) -> str:
        return "per crop" if facts.crops else ""

    def plan(self, facts: TowerFacts) -> Schedule:
        super().plan(facts)
        given = _numbers(self.blocks)
        if facts.blocks > 1 and given and given[-1] >= facts.blocks - 1:
            raise UsageError(
                f"evit: behind block {given[-1]} nothing is left to save, because the features of this vision tower are taken "
                f"from block {facts.blocks - 1}, found blocks={self.blocks}: name blocks from 0 to {facts.blocks - 2}."
            )
        (stage,) = self.stages
        if not facts.crops:
            return Schedule((stage,))
        return Schedule((Stage(0, stage.budget.scaled(0.5, 1.25), "vision"), Stage(0, stage.budget)))

    # -- in the tower ----------------------------------------------------------------------------------------------------

    def watches_block(self, index: int, last: int) -> bool:
        return index in self._chosen(last)

    def watch(self, block: Block, state: TowerState) -> None:
        if self.watches_block(block.index, block.last):
            visible = None if block.valid is None else block.valid[:, None]
            attention = attention_mass(block.query[:, :, :1], block.key, block.scaling, visible)
            state.carried[ATTENTION] = attention[:, :, 1:].mean(dim=1)  # over heads

    def drop(self, index: int, last: int, hidden: Tensor, state: TowerState) -> tuple[Tensor, Tensor] | None:
        chosen, patches = self._chosen(last), hidden.shape[1]
        if index not in chosen or patches <= state.target:
            return None
        present = torch.full(hidden.shape[:1], patches, device=hidden.device) if state.valid is None else state.valid.sum(dim=1)
        steps = len(chosen) - chosen.index(index)
        share = (state.target / present.double()) ** (1 / steps)
        left = (present * share).round().long().minimum(present)
        attention = state.carried.pop(ATTENTION)
        stays = alive_top(attention, left, state.valid)
        if self.fuse == "no":
            return stays, hidden
        attentive = alive_top(attention, (left - 1).clamp_min(1), state.valid)
        weight = attention.masked_fill(attentive if state.valid is None else attentive | ~state.valid, 0)
        if self.fuse == "mean":
            weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        fused = (weight[:, None] @ hidden.to(weight.dtype)).to(hidden.dtype)  # [crop, 1, dim]
        place = stays & ~attentive & (left < present)[:, None]  # where all stay, nothing is fused
        return stays, torch.where(place[..., None], fused, hidden)

    def _chosen(self, last: int) -> Sequence[int]:
        """The blocks behind which patches are dropped; the features are those of block `last`."""
        return _numbers(self.blocks) or sorted({(last + 1) * quarters // 4 for quarters in (1, 2, 3)} - {last})

    # -- before the language model, for pictures that are cut up ---------------------------------------------------------

    def select(self, see: View, keep: int) -> Tensor:
        return top(self.scores(see), keep)

    def scores(self, see: View) -> Tensor:
        return see.attention_from_cls.mean(dim=1)  # over heads


def _numbers(given: Any) -> list[int]:
    """Numbers of blocks, rising.

    Raises:
        UsageError: something else than whole numbers, or one of them twice.
    """
    parts = given.split("|") if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    found = [int(part) for part in parts if str(part).strip().isdecimal()]
    if given != "" and (not parts or len(found) < len(parts) or len(set(found)) < len(found)):
        raise UsageError(f"evit: blocks must be different whole numbers >= 0, for example 3|6|9, found {shown(given)}.")
    return sorted(found)
