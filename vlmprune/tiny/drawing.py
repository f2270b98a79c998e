"""Pixels of a scene: cluttered backgrounds, coloured shapes and signs with digits.

Shapes and digits are small anti-aliased masks, which are computed once. A scene then takes well under a millisecond, and
training draws every picture when it needs it instead of storing a data set.
"""

from __future__ import annotations

import random
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 96
"""Width and height of every picture in pixels."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (40, 160, 50),
    "blue": (40, 70, 215),
    "yellow": (235, 215, 40),
    "purple": (130, 45, 165),
    "orange": (240, 130, 25),
    "cyan": (50, 205, 215),
    "pink": (245, 140, 190),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")

GLYPH_SIZES: tuple[tuple[int, int], ...] = ((5, 7), (6, 8))
"""Width and height in pixels of a digit, small enough to fit into one 8x8 patch when it happens to be aligned."""

_FONT = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 00100 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}
_SUPERSAMPLING = 4
_JITTER = 16
_NOISE_CELLS = 6


@cache
def shape_mask(shape: str, radius: int) -> np.ndarray:
    """Coverage in [0, 1] of a shape with the given radius: `[2 * radius + 1, 2 * radius + 1, 1]`, read-only."""
    side = (2 * radius + 1) * _SUPERSAMPLING
    canvas = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(canvas)
    middle = (side - 1) / 2
    reach = radius * _SUPERSAMPLING

    def polygon(points: list[tuple[float, float]]) -> None:
        pen.polygon([(middle + reach * x, middle + reach * y) for x, y in points], fill=255)

    def disc(scale: float, fill: int) -> None:
        pen.ellipse([middle - reach * scale, middle - reach * scale, middle + reach * scale, middle + reach * scale], fill=fill)

    if shape == "circle":
        disc(0.95, 255)
    elif shape == "ring":
        disc(1.0, 255)
        disc(0.52, 0)
    elif shape == "square":
        polygon([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)])
    elif shape == "triangle":
        polygon([(0, -1.0), (0.98, 0.8), (-0.98, 0.8)])
    elif shape == "cross":
        arm = 0.32
        polygon([(-1, -arm), (1, -arm), (1, arm), (-1, arm)])
        polygon([(-arm, -1), (arm, -1), (arm, 1), (-arm, 1)])
    elif shape == "star":
        angles = np.pi * np.arange(10) / 5 - np.pi / 2
        lengths = np.where(np.arange(10) % 2 == 0, 1.08, 0.46)
        polygon([(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(lengths, angles, strict=True)])
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    small = canvas.resize((2 * radius + 1, 2 * radius + 1), Image.Resampling.BOX)
    mask = np.asarray(small, np.float32)[..., None] / 255
    mask.setflags(write=False)
    return mask


@cache
def glyph_mask(digit: str, size: tuple[int, int]) -> np.ndarray:
    """Ink in [0, 1] of one digit at `size = (width, height)`: `[height, width, 1]`, read-only."""
    rows = [[255 * int(bit) for bit in row] for row in _FONT[digit].split()]
    bitmap = Image.fromarray(np.array(rows, np.uint8))
    mask = np.asarray(bitmap.resize(size, Image.Resampling.BILINEAR), np.float32)[..., None] / 255
    mask.setflags(write=False)
    return mask


@lru_cache(maxsize=1)
def _upscaling() -> np.ndarray:
    """Linear interpolation from a coarse noise grid to pixels: `[SIZE, _NOISE_CELLS]`."""
    at = np.linspace(0, _NOISE_CELLS - 1, SIZE)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(_NOISE_CELLS)[None])).astype(np.float32)


def background(rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """A grey, softly varying surface with muted strokes and dots: float32 `[SIZE, SIZE, 3]` in 0..255."""
    grey = rng.uniform(70, 190)
    tint = np.array([rng.gauss(0, 8) for _ in range(3)], np.float32)
    coarse = noise.standard_normal((3, _NOISE_CELLS, _NOISE_CELLS), np.float32) * 14
    up = _upscaling()
    surface = (up @ coarse @ up.T).transpose(1, 2, 0) + (grey + tint)
    canvas = Image.fromarray(np.clip(surface, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(6, 15)):
        shade = grey + rng.uniform(-60, 60)
        ink = tuple(int(min(255, max(0, shade + rng.gauss(0, 8)))) for _ in range(3))
        x, y = rng.uniform(0, SIZE), rng.uniform(0, SIZE)
        if rng.random() < 0.6:
            pen.line([x, y, x + rng.uniform(-30, 30), y + rng.uniform(-30, 30)], fill=ink, width=rng.randint(1, 2))
        else:
            r = rng.uniform(1, 2.5)
            pen.ellipse([x - r, y - r, x + r, y + r], fill=ink)
    return np.asarray(canvas, np.float32).copy()


def paint_shape(canvas: np.ndarray, shape: str, colour: str, x: int, y: int, radius: int, rng: random.Random) -> None:
    """Paint a shape centred on pixel `(x, y)` into the canvas, its colour slightly off the palette's."""
    mask = shape_mask(shape, radius)
    ink = np.array([c + rng.uniform(-_JITTER, _JITTER) for c in PALETTE[colour]], np.float32)
    area = canvas[y - radius : y + radius + 1, x - radius : x + radius + 1]
    area += mask * (ink - area)


def paint_sign(
    canvas: np.ndarray,
    box: tuple[int, int, int, int],
    digits: str,
    corners: tuple[tuple[int, int], ...],
    glyph: tuple[int, int],
    rng: random.Random,
) -> None:
    """Paint a white plate over `box = (left, top, right, bottom)` and a dark digit at each top-left corner."""
    left, top, right, bottom = box
    canvas[top:bottom, left:right] = rng.uniform(225, 255)
    ink = rng.uniform(0, 55)
    for digit, (x, y) in zip(digits, corners, strict=True):
        area = canvas[y : y + glyph[1], x : x + glyph[0]]
        area += glyph_mask(digit, glyph) * (ink - area)


def develop(canvas: np.ndarray, noise: np.random.Generator) -> Image.Image:
    """Add pixel noise and round to an 8-bit RGB picture."""
    grain = noise.standard_normal(canvas.shape, np.float32) * 4
    return Image.fromarray(np.clip(canvas + grain, 0, 255).astype(np.uint8))
