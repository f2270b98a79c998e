"""Synthetic pictures of three kinds: a page of text, a screenshot with windows, and a textured picture without flat areas.

They are drawn from a seed, with Pillow's own font, and are for measuring what a method does to such pictures: nothing was
trained on them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WORDS = ("tokens", "that", "nobody", "needs", "cost", "as", "much", "as", "those", "that", "everybody", "reads", "a", "page")
INK, PAPER = (20, 20, 20), (255, 255, 255)
GREY, BLUE, PALE = (96, 100, 108), (40, 88, 168), (236, 240, 246)


def document(width: int, height: int, seed: int = 0) -> Image.Image:
    """Black text on white paper: a title, paragraphs of ragged lines, and margins of an eighth of the width."""
    random = np.random.default_rng(seed)
    page = Image.new("RGB", (width, height), PAPER)
    draw, margin, size = ImageDraw.Draw(page), width // 8, max(height // 48, 8)
    _line(draw, random, margin, margin, width - margin, 2 * size)
    top = margin + 4 * size
    while top < height - margin - size:
        for _ in range(int(random.integers(2, 6))):
            if top < height - margin - size:
                _line(draw, random, margin, top, int(random.integers(width // 2, width - margin)), size)
            top += 2 * size
        top += 2 * size
    return page


def screenshot(width: int, height: int, seed: int = 0) -> Image.Image:
    """A desktop of one colour with a task bar, and two windows with title bars, side bars and a few lines of text."""
    random = np.random.default_rng(seed)
    screen = Image.new("RGB", (width, height), BLUE)
    draw, size = ImageDraw.Draw(screen), max(height // 40, 8)
    draw.rectangle((0, height - 2 * size, width, height), fill=GREY)
    for number in range(2):
        left, top = int(width * (0.06 + 0.3 * number)), int(height * (0.08 + 0.24 * number))
        right, bottom = min(left + width * 11 // 20, width - 1), min(top + height * 11 // 20, height - 3 * size)
        draw.rectangle((left, top, right, bottom), fill=PAPER, outline=INK)
        draw.rectangle((left, top, right, top + 2 * size), fill=GREY)
        draw.rectangle((left, top + 2 * size, left + (right - left) // 5, bottom), fill=PALE)
        text = left + (right - left) // 4
        for line in range(int(random.integers(3, 6))):
            end = int(random.integers((text + right) // 2, right))
            _line(draw, random, text, top + (3 + 2 * line) * size, end - size, size)
    return screen


def texture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with fine grain, as in a photograph: no two patches are alike."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (9, 9, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    grain = random.normal(0, 6, (height, width, 3))
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


KINDS: dict[str, Callable[[int, int, int], Image.Image]] = {
    "document": document,
    "screenshot": screenshot,
    "texture": texture,
}
"""What draws a picture of a width, a height and a seed, by kind."""


def _line(draw: ImageDraw.ImageDraw, random: np.random.Generator, left: int, top: int, right: int, size: int) -> None:
    """One line of words in letters `size` pixels high, no further than `right`."""
    font = ImageFont.load_default(size)
    at = float(left)
    while True:
        word = str(random.choice(WORDS)) + " "
        length = draw.textlength(word, font=font)
        if at + length > right:
            return
        draw.text((at, top), word, fill=INK, font=font)
        at += length
