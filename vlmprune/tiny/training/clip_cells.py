"""The designed code (`vlmprune.tiny.training.code`) of the visual tokens of a clip, each of which is a cell of 2x2 patches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmprune.tiny.clip_model import CELLS, POOL
from vlmprune.tiny.scenes import COVERED, PATCH, Object, coverage
from vlmprune.tiny.training.code import FIELDS, WIDTH, describe

SIDE = POOL * PATCH
"""Side of a cell in pixels."""
REACH = 10.0
"""A cell encodes the whole object if their centres are at most this many pixels apart."""


@dataclass(frozen=True)
class CellTarget:
    """The code that the cells of one frame should have; `C` cells.

    Attributes:
        code: `[C, WIDTH]` float.
        object_of: `[C]` index of the object that a cell belongs to, or -1.
        core: `[C]` bool, cells that encode the whole object.
        centre: `[C]` bool, cells with the centre pixel of an object.
        clear: `[C]` bool, False where a cell contains only a few pixels of something.
    """

    code: np.ndarray
    object_of: np.ndarray
    core: np.ndarray
    centre: np.ndarray
    clear: np.ndarray


def _cell_centres() -> np.ndarray:
    line = np.arange(CELLS, dtype=np.float32) * SIDE + (SIDE - 1) / 2
    return np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)


_CENTRES = _cell_centres()


def cell_target(objects: tuple[Object, ...]) -> CellTarget:
    """The code of every cell of a frame with these objects."""
    cells = CELLS * CELLS
    code = np.zeros((cells, WIDTH), np.float32)
    object_of = np.full(cells, -1)
    core, centre = np.zeros(cells, bool), np.zeros(cells, bool)
    patches, _ = coverage(objects, ())
    discs = patches.reshape(-1, CELLS, POOL, CELLS, POOL).sum((2, 4)).reshape(-1, cells)
    if objects:
        places = np.array([(thing.x, thing.y) for thing in objects], np.float32)
        far = np.linalg.norm(_CENTRES[None] - places[:, None], axis=-1)
        nearest, cell = far.argmin(0), np.arange(cells)
        core = far[nearest, cell] <= REACH
        owner = np.where(core, nearest, -1)
        for index, thing in enumerate(objects):
            own = thing.y // SIDE * CELLS + thing.x // SIDE
            centre[own] = core[own] = True
            owner[own] = index
        most = discs.argmax(0)
        object_of = np.where(core, owner, np.where(discs[most, cell] >= COVERED, most, -1))
        for index, thing in enumerate(objects):
            describe(code, thing, object_of == index, core & (object_of == index))
        code[centre, FIELDS["centre"]] = 1
    empty = object_of < 0
    code[empty, FIELDS["background"]] = 1
    return CellTarget(code, object_of, core, centre, ~empty | (discs.sum(0) == 0))
