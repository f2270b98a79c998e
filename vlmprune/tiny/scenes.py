"""Drawn scenes: a few coloured shapes and a sign on clutter, with questions and their answers.

A scene depends only on its integer seed. Training draws seeds below `TRAINING_SEEDS`, held-out splits have seeds above it, so
that no training picture is an evaluation picture.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlmprune.tiny import drawing
from vlmprune.tiny.drawing import GLYPH_SIZES, PALETTE, SHAPES, SIZE
from vlmprune.tiny.questions import SKILLS, Question, ask_each_skill

__all__ = [
    "COLOURS", "GRID", "PATCH", "SHAPES", "SIZE", "SKILLS", "SPLITS", "TRAINING_SEEDS",
    "Object", "Question", "Scene", "Sign", "held_out", "make_scene",
]  # fmt: skip

COLOURS: tuple[str, ...] = tuple(PALETTE)
PATCH = 8
"""Side of one visual token's patch in pixels."""
GRID = SIZE // PATCH
"""Patches per side; a picture becomes `GRID * GRID` visual tokens in row-major order."""

TRAINING_SEEDS = 1 << 59
SPLITS: dict[str, int] = {"dev": 1 << 60, "test": 1 << 61}
"""First seed of each held-out split: choose a recipe on `dev`, report on `test`."""

RADII = range(6, 10)
_MARGIN = 1
COVERED = 12
"""A patch shows an object or a sign if it has at least this many pixels of the disc or plate."""


@dataclass(frozen=True)
class Object:
    """A coloured shape; `x` and `y` are its centre in pixels from the top left."""

    shape: str
    colour: str
    x: int
    y: int
    radius: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Sign:
    """A plate with three digits; `box` is (left, top, right, bottom), `corners` the digits' top-left pixels."""

    digits: str
    box: tuple[int, int, int, int]
    corners: tuple[tuple[int, int], ...]
    glyph: tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """How crowded a scene is: lowest and highest number of objects, number of signs, and probability of each sign."""

    objects: tuple[int, int] = (2, 6)
    signs: int = 1
    sign_probability: float = 0.9


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, what is in it, and questions about it."""

    image: Image.Image
    objects: tuple[Object, ...]
    signs: tuple[Sign, ...]
    questions: tuple[Question, ...]
    seed: int

    @property
    def sign(self) -> Sign | None:
        """The sign of an ordinary scene (there is at most one)."""
        return self.signs[0] if self.signs else None

    def patch_kinds(self) -> np.ndarray:
        """Per patch 0 for background, 1 for an object, 2 for a sign: int8 `[GRID * GRID]`."""
        objects, signs = coverage(self.objects, self.signs)
        kinds = np.zeros(GRID * GRID, np.int8)
        kinds[(objects >= COVERED).any(0)] = 1
        kinds[(signs >= COVERED).any(0)] = 2
        return kinds


def patch_centres() -> np.ndarray:
    """Pixel coordinates (x, y) of every patch centre: float32 `[GRID * GRID, 2]`."""
    line = np.arange(GRID, dtype=np.float32) * PATCH + (PATCH - 1) / 2
    return np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)


_PIXELS = np.arange(SIZE)


def _by_patch(pixels: np.ndarray) -> np.ndarray:
    """Number of set pixels per patch: bool `[SIZE, SIZE]` -> int `[GRID * GRID]`."""
    return pixels.reshape(GRID, PATCH, GRID, PATCH).sum((1, 3)).reshape(-1)


def coverage(objects: tuple[Object, ...], signs: tuple[Sign, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of each patch inside each object's disc and each sign's plate: `[objects, P]` and `[signs, P]`."""
    discs = np.zeros((len(objects), GRID * GRID), np.int64)
    for row, thing in enumerate(objects):
        across = (_PIXELS - thing.x) ** 2
        down = (_PIXELS - thing.y) ** 2
        discs[row] = _by_patch(across[None] + down[:, None] <= thing.radius**2)
    plates = np.zeros((len(signs), GRID * GRID), np.int64)
    for row, sign in enumerate(signs):
        left, top, right, bottom = sign.box
        across = np.bincount(np.arange(left, right) // PATCH, minlength=GRID)
        down = np.bincount(np.arange(top, bottom) // PATCH, minlength=GRID)
        plates[row] = (down[:, None] * across[None]).reshape(-1)
    return discs, plates


def _place_sign(rng: random.Random, others: list[Sign]) -> Sign | None:
    """A sign at any pixel position, at least a patch away from other signs."""
    width, height = glyph = rng.choice(GLYPH_SIZES)
    gap, pad = rng.randint(1, 2), rng.randint(2, 3)
    plate = (3 * width + 2 * gap + 2 * pad, height + 2 * pad)
    for _ in range(20):
        left, top = rng.randint(2, SIZE - 2 - plate[0]), rng.randint(2, SIZE - 2 - plate[1])
        box = (left, top, left + plate[0], top + plate[1])
        apart = (max(box[0] - o.box[2], o.box[0] - box[2], box[1] - o.box[3], o.box[1] - box[3]) for o in others)
        if all(distance >= PATCH for distance in apart):
            corners = tuple((left + pad + slot * (width + gap), top + pad) for slot in range(3))
            return Sign("".join(rng.choices("0123456789", k=3)), box, corners, glyph)
    return None


def _place_object(rng: random.Random, shape: str, colour: str, others: list[Object], signs: list[Sign]) -> Object | None:
    """An object at any pixel position that touches no other object and no sign."""
    radius = rng.choice(RADII)
    low, high = radius + _MARGIN, SIZE - 1 - radius - _MARGIN
    for _ in range(25):
        x, y = rng.randint(low, high), rng.randint(low, high)
        if any((x - o.x) ** 2 + (y - o.y) ** 2 < (radius + o.radius + 2) ** 2 for o in others):
            continue
        reach = radius + 2
        if any(s.box[0] - reach < x < s.box[2] + reach and s.box[1] - reach < y < s.box[3] + reach for s in signs):
            continue
        return Object(shape, colour, x, y, radius)
    return None


def _some(values: tuple[str, ...], rng: random.Random) -> list[str]:
    """Half of the time all values, else two or three: repeated attributes make counting and negatives hard."""
    return rng.sample(values, rng.randint(2, 3)) if rng.random() < 0.5 else list(values)


def compose(seed: int, layout: Layout = Layout()) -> Scene:
    """Draw the scene of a seed, without questions."""
    rng = random.Random(seed)
    noise = np.random.default_rng(seed)
    signs: list[Sign] = []
    for _ in range(layout.signs):
        if rng.random() < layout.sign_probability and (sign := _place_sign(rng, signs)):
            signs.append(sign)
    colours, shapes = _some(COLOURS, rng), _some(SHAPES, rng)
    objects: list[Object] = []
    for _ in range(rng.randint(*layout.objects)):
        if thing := _place_object(rng, rng.choice(shapes), rng.choice(colours), objects, signs):
            objects.append(thing)

    canvas = drawing.background(rng, noise)
    for sign in signs:
        drawing.paint_sign(canvas, sign.box, sign.digits, sign.corners, sign.glyph, rng)
    for thing in objects:
        drawing.paint_shape(canvas, thing.shape, thing.colour, thing.x, thing.y, thing.radius, rng)
    return Scene(drawing.develop(canvas, noise), tuple(objects), tuple(signs), (), seed)


def make_scene(seed: int) -> Scene:
    """The scene of a seed with up to two questions for every skill that the scene allows."""
    scene = compose(seed)
    questions = ask_each_skill(scene.objects, scene.sign, random.Random(seed ^ 0x51), per_skill=2)
    return Scene(scene.image, scene.objects, scene.signs, questions, seed)


def held_out(n: int, split: str = "test") -> Iterator[Scene]:
    """The first `n` scenes of a held-out split."""
    first = SPLITS[split]
    return (make_scene(first + index) for index in range(n))
