"""The designed code of a visual token: which properties each patch encodes, and in which direction of the embedding.

Every property has its own direction in the language model's embedding space, so that a linear map reads it. Coordinates are
linear too, so that a comparison of two objects is a subtraction. A patch encodes only what is near it:

* patches on an object encode that there is an object, and its colour;
* patches near its centre (`CORE_REACH`) also encode its shape and the place of its centre;
* only the patch with the centre pixel has the flag that counting needs;
* a patch near a digit (`GLYPH_REACH`) encodes that digit and its place in the number, not the other digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmprune.tiny.questions import COLUMNS, ROWS, third
from vlmprune.tiny.scenes import (
    COLOURS,
    COVERED,
    GRID,
    PATCH,
    SHAPES,
    SIZE,
    Object,
    Scene,
    coverage,
    patch_centres,
)

SCALE = 4.0
"""Length of one code direction in the embedding."""
COORDINATE_GAIN = 1.5
THIRD_GAIN = 0.7
CORE_REACH = 7.5
"""A patch encodes the whole object if their centres are at most this many pixels apart."""
GLYPH_REACH = 6.0
"""A patch encodes a digit if their centres are at most this many pixels apart in x and in y."""
DIGIT_SLOTS = 3


def _layout() -> dict[str, slice]:
    widths = {
        "background": 1, "object": 1, "sign": 1, "centre": 1, "colour": len(COLOURS), "shape": len(SHAPES),
        "xy": 2, "column": len(COLUMNS), "row": len(ROWS), "digits": DIGIT_SLOTS * 10,
    }  # fmt: skip
    stops = np.cumsum(list(widths.values()))
    return {name: slice(int(stop) - width, int(stop)) for (name, width), stop in zip(widths.items(), stops, strict=True)}


FIELDS: dict[str, slice] = _layout()
WIDTH = max(field.stop for field in FIELDS.values())


def directions(embedding: int) -> Tensor:
    """Orthonormal directions of the code's properties: `[WIDTH, embedding]`, the same on every machine and run."""
    gaussian = np.random.default_rng(20_261_122).standard_normal((embedding, WIDTH))
    return torch.from_numpy(np.linalg.qr(gaussian)[0].T.astype(np.float32).copy())


@dataclass(frozen=True)
class Target:
    """The code that the patches of one picture should have; `P` patches.

    Attributes:
        code: `[P, WIDTH]` float.
        object_of: `[P]` index of the object that a patch belongs to, or −1.
        core: `[P]` bool, patches that encode the whole object.
        centre: `[P]` bool, patches with the centre pixel of an object.
        slots: `[P, 3]` digit in each slot of the number, or −1.
        glyph: `[P]` digit nearest to the patch's centre, or −1.
        clear: `[P]` bool, False where a patch contains only a few pixels of something.
    """

    code: np.ndarray
    object_of: np.ndarray
    core: np.ndarray
    centre: np.ndarray
    slots: np.ndarray
    glyph: np.ndarray
    clear: np.ndarray


_CENTRES = patch_centres()


def target(scene: Scene) -> Target:
    """The code of every patch of a scene."""
    patches = GRID * GRID
    code = np.zeros((patches, WIDTH), np.float32)
    object_of = np.full(patches, -1)
    core = np.zeros(patches, bool)
    centre = np.zeros(patches, bool)
    slots = np.full((patches, DIGIT_SLOTS), -1)
    glyph = np.full(patches, -1)
    discs, plates = coverage(scene.objects, scene.signs)

    if scene.objects:
        places = np.array([(thing.x, thing.y) for thing in scene.objects], np.float32)
        far = np.linalg.norm(_CENTRES[None] - places[:, None], axis=-1)
        nearest, patch = far.argmin(0), np.arange(patches)
        core = far[nearest, patch] <= CORE_REACH
        for thing in scene.objects:
            centre[thing.y // PATCH * GRID + thing.x // PATCH] = True
        core |= centre
        most = discs.argmax(0)
        object_of = np.where(core, nearest, np.where(discs[most, patch] >= COVERED, most, -1))
        for index, thing in enumerate(scene.objects):
            describe(code, thing, object_of == index, core & (object_of == index))
        code[centre, FIELDS["centre"]] = 1

    nearest_glyph = np.full(patches, np.inf)
    for sign in scene.signs:
        for slot, (digit, (left, top)) in enumerate(zip(sign.digits, sign.corners, strict=True)):
            middle = np.array([left + (sign.glyph[0] - 1) / 2, top + (sign.glyph[1] - 1) / 2])
            away = np.abs(_CENTRES - middle).max(1)
            slots[away <= GLYPH_REACH, slot] = int(digit)
            closer = away < np.minimum(nearest_glyph, PATCH)
            glyph[closer] = int(digit)
            nearest_glyph[closer] = away[closer]
    signed = (slots >= 0).any(1)
    code[signed, FIELDS["sign"]] = 1
    for slot in range(DIGIT_SLOTS):
        known = np.flatnonzero(slots[:, slot] >= 0)
        code[known, FIELDS["digits"].start + 10 * slot + slots[known, slot]] = 1

    empty = (object_of < 0) & ~signed
    code[empty, FIELDS["background"]] = 1
    clear = ~empty | ((discs.sum(0) + plates.sum(0)) == 0)
    return Target(code, object_of, core, centre, slots, glyph, clear)


def describe(code: np.ndarray, thing: Object, patches: np.ndarray, core: np.ndarray) -> None:
    """Write what is known about an object into the code `[P, WIDTH]` of its patches; `core` ones encode all of it."""
    code[patches, FIELDS["object"]] = 1
    code[patches, FIELDS["colour"].start + COLOURS.index(thing.colour)] = 1
    code[core, FIELDS["shape"].start + SHAPES.index(thing.shape)] = 1
    code[core, FIELDS["column"].start + third(thing.x)] = THIRD_GAIN
    code[core, FIELDS["row"].start + third(thing.y)] = THIRD_GAIN
    middle = (SIZE - 1) / 2
    code[core, FIELDS["xy"]] = COORDINATE_GAIN * (np.array([thing.x, thing.y]) - middle) / middle
