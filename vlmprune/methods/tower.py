"""What a pruning method is that works inside the vision tower: it watches blocks, and drops patches between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmprune.methods.base import Pruner
from vlmprune.view import PROVIDED, Probe, TowerFacts


@dataclass(frozen=True, eq=False)
class Block:
    """The attention of one block of the vision tower, as a method sees it.

    Attributes:
        index: number of the block; `last` is the block whose output feeds the projector.
        query, key, value: `[crop, head, token, dim]`, after rotary embedding where the tower has one. With `cls`, token 0 is
            the CLS token. A picture that is not cut up is its own only crop.
        scaling: factor on the scores.
        cls: whether the tower has a CLS token.
        valid: `[crop, token]` bool, False on padding of a crop that kept fewer tokens than another; None if all are real.
    """

    index: int
    last: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    cls: bool
    valid: Tensor | None


@dataclass(eq=False)
class TowerState:
    """What a tower method carries from block to block, for some crops of one size.

    Attributes:
        facts: traits of the tower.
        target: patches that each crop shall have in the end.
        cells: `[crop, patch]` cell of every patch that is left; `side` × `side` of them at first.
        side: rows, and columns, of a crop.
        valid: `[crop, patch]` bool, or None.
        carried: what was recorded of each patch, `[crop, patch, …]`: probes, and the method's own values; it is shortened
            together with the patches.
    """

    facts: TowerFacts
    target: int
    cells: Tensor
    side: int
    valid: Tensor | None = None
    carried: dict[str, Tensor] = field(default_factory=dict)

    def on_raster(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """`patches` `[crop, patch, dim]` in their cells `[crop, side², dim]`, a new tensor; and which cells have one, bool."""
        there = torch.ones_like(self.cells, dtype=torch.bool) if self.valid is None else self.valid
        cells = patches.new_zeros(len(patches), self.side**2, patches.shape[-1])
        cells = cells.scatter(1, self.cells[..., None].expand_as(patches), patches)  # padding: cells that have none
        return cells, there.new_zeros(cells.shape[:2]).scatter(1, self.cells, there)

    def off_raster(self, cells: Tensor) -> Tensor:
        """`[crop, patch, …]` of the patches that are left, from `[crop, side², …]`."""
        return cells[torch.arange(len(cells), device=cells.device)[:, None], self.cells]


class TowerPruner(Pruner):
    """A method that watches blocks of the vision tower, and may drop patches between them.

    Class attributes:
        chooses_in_tower: how it decides there, as `chooses`.
        watches: what it looks at in the tower, in the words of the README's table.
        provides: the probe that it makes there, or None: `watch` records it for every patch under the probe's name in
            `TowerState.carried`. Where a stage lists that probe in its `needs`, blocks are watched even if none drops patches.
    """

    in_tower = True
    _renamed = {**Pruner._renamed, "cut": "drop"}  # noqa: RUF012
    watches: ClassVar[str]
    chooses_in_tower: ClassVar[str] = "decides between blocks"
    provides: ClassVar[Probe | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.provides is not None:
            PROVIDED[cls.provides.name] = cls.provides

    def watches_block(self, index: int, last: int) -> bool:
        """Whether `watch` has to be called for block `index`; `last` is the block whose output feeds the projector."""
        return True

    def watch(self, block: Block, state: TowerState) -> None:
        """Look at a block's attention."""

    def drop(self, index: int, last: int, hidden: Tensor, state: TowerState) -> tuple[Tensor, Tensor] | None:
        """Decide after block `index`, from the patches `[crop, patch, dim]` that leave it.

        Returns:
            `[crop, patch]` bool, True where a patch stays, and the patches, with merged ones in their places; or None to keep
            all of them as they are.
        """
        raise NotImplementedError
