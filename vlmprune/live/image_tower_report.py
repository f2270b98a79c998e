"""What happened in one pass through an image tower, and what people read of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from vlmprune.cost import LayerShape
from vlmprune.device import on_host
from vlmprune.errors import UsageError
from vlmprune.live.record import Clock, Kept
from vlmprune.live.report import StageReport
from vlmprune.schedule import Site
from vlmprune.show import units


@dataclass(frozen=True, eq=False)
class Left:
    """What is left of all pictures from one block on.

    Attributes:
        block: first block that computes these patches only.
        layer, method, site: of the stage, as in `Kept`.
        cells: `[picture, patch]` the patches that are left, as indices in the picture's raster.
        valid: `[picture, patch]` bool, False on padding of a picture that kept fewer than another; None if there is none.
        features: `[picture, patch, dim]` what enters the block, where the stage merged; else None.
    """

    block: int
    layer: int
    method: str
    site: Site
    cells: Tensor
    valid: Tensor | None
    features: Tensor | None = None

    def of_pictures(self, x: Tensor) -> list[Tensor]:
        """`[kept, …]` of each picture, of `[picture, patch, …]`."""
        if self.valid is None:
            return list(x)
        return [own[valid] for own, valid in zip(x, self.valid, strict=True)]

    def counts(self) -> list[int]:
        """How many patches of each picture are left. Waits for the device if they differ."""
        pictures, patches = self.cells.shape
        return [patches] * pictures if self.valid is None else on_host(self.valid.sum(dim=1)).tolist()


@dataclass(eq=False)
class TowerRecord:
    """One pass through an image tower.

    Attributes:
        pictures, patches: how many there are, and patches of each at first.
        before: tokens before the patches.
        shape: sizes of a block.
        blocks: how many there are.
        left: what is left, each time that patches were dropped.
        tower: the time of the whole pass.
        selection: the parts of it that looking, choosing and dropping took.
    """

    pictures: int
    patches: int
    before: int
    shape: LayerShape
    blocks: int
    left: list[Left] = field(default_factory=list)
    tower: Clock = field(default_factory=Clock)
    selection: list[Clock] = field(default_factory=list)

    @cached_property
    def kept(self) -> list[Kept]:
        """What each stage kept of each picture; of a method that drops between several blocks, what it kept in the end."""
        last = {(left.site, left.layer, left.method): left for left in self.left}
        found = []
        for left in last.values():
            merged = [None] * self.pictures if left.features is None else left.of_pictures(left.features)
            for picture, (index, features) in enumerate(zip(left.of_pictures(left.cells), merged, strict=True)):
                found.append(Kept(left.layer, left.method, left.site, picture, 0, self.patches, index, features))
        return found

    @property
    def entering(self) -> list[int]:
        """Rows of each picture that enter each block: tokens before the patches, patches, and padding."""
        rows, here = [], self.patches
        for block in range(self.blocks):
            here = next((left.cells.shape[1] for left in reversed(self.left) if left.block == block), here)
            rows.append(self.before + here)
        return rows


@dataclass(frozen=True)
class TowerReport:
    """The last pass through an image tower in numbers; `print` shows them as a table.

    FLOPs are those of the blocks, by the formulas of `vlmprune.cost` for layers, for all pictures; padding that is computed
    counts. Patch embedding, pooling and projection are not counted.

    Attributes:
        recipe: as a string.
        pictures, patches: how many there were, and patches of each.
        stages: what every stage kept.
        patches_by_block: patches that enter each block, the mean over pictures.
        entering: rows of a picture that each block computes: the same and its tokens before the patches, and padding.
        flops, flops_unpruned: floating point operations, with and without the recipe.
        tower_ms: time in the tower, in milliseconds.
        selection_ms: the part of it that looking, choosing and dropping took.
    """

    recipe: str
    pictures: int
    patches: int
    stages: tuple[StageReport, ...]
    patches_by_block: tuple[float, ...]
    entering: tuple[int, ...]
    flops: int
    flops_unpruned: int
    tower_ms: float
    selection_ms: float

    @staticmethod
    def of(record: TowerRecord, recipe: str) -> TowerReport:
        """The report of a record. Waits for the device."""
        stages: dict[tuple[Site, int, str], list[Kept]] = {}
        for kept in record.kept:
            stages.setdefault((kept.site, kept.layer, kept.method), []).append(kept)
        by_block, here = [], float(record.patches)
        means = {left.block: sum(left.counts()) / record.pictures for left in record.left}
        for block in range(record.blocks):
            here = means.get(block, here)
            by_block.append(here)
        full = record.before + record.patches
        return TowerReport(
            recipe=recipe,
            pictures=record.pictures,
            patches=record.patches,
            stages=tuple(
                StageReport(layer, method, site, tuple(len(k.index) for k in kept), tuple(k.original for k in kept))
                for (site, layer, method), kept in stages.items()
            ),
            patches_by_block=tuple(by_block),
            entering=tuple(record.entering),
            flops=record.pictures * sum(record.shape.flops(rows, rows) for rows in record.entering),
            flops_unpruned=record.pictures * record.blocks * record.shape.flops(full, full),
            tower_ms=record.tower.ms,
            selection_ms=sum(clock.ms for clock in record.selection),
        )

    def rows(self) -> list[tuple[str, str]]:
        """The report as lines, each a label and a text."""
        return [
            ("recipe", self.recipe),
            ("pictures", f"{self.pictures}, {self.patches} patches each"),
            *((f"kept {_place(s)} ({s.method})", _range(s.kept, self.patches)) for s in self.stages),
            ("patches by block", _runs(self.patches_by_block)),
            ("FLOPs of the blocks", units.share(self.flops, self.flops_unpruned, units.operations)),
            (
                "time in the tower",
                f"{units.duration(self.tower_ms)}, including {units.duration(self.selection_ms)} for choosing and dropping "
                "patches",
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, texts, dicts and lists, for JSON: FLOPs and milliseconds."""
        return units.plain(asdict(self))

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        return "\n".join(f"{label:<{width}}  {value}" for label, value in self.rows())


def _place(stage: StageReport) -> str:
    """Where a stage drops patches, in words."""
    if stage.site == "vision":
        return "between blocks"
    return f"before block {stage.layer}" if stage.layer else "before the first block"


def _range(kept: Sequence[int], patches: int) -> str:
    fewest, most = min(kept), max(kept)
    return f"{fewest} of {patches}" if fewest == most else f"{fewest} to {most} of {patches}"


def _runs(counts: Sequence[float]) -> str:
    """Equal neighbours in one: "196 (0–3), 49 (4–11)"."""
    found: list[tuple[float, list[int]]] = []
    for block, count in enumerate(counts):
        if found and found[-1][0] == count:
            found[-1][1].append(block)
        else:
            found.append((count, [block]))
    return ", ".join(f"{count:g} ({units.spans(blocks)})" for count, blocks in found)


def no_pass() -> UsageError:
    """The error where the caller ran no picture under the recipe."""
    return UsageError(
        "nothing to report here: this thread (or this override block) has not encoded a picture, or did so with the recipe "
        "switched off; encode one with the wrapped model first, or ask in the thread that did."
    )
