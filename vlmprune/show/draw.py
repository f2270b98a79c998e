"""Pictures with their kept patches, captions, and sheets of several pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

KEPT = (255, 196, 0)
"""Colour of the frame around a kept patch."""
FADE = 0.78
"""How far dropped patches fade to white: 0 is not at all, 1 is white."""
FONT, LINE = 15, 21
"""Sizes of a caption's letters and lines, in pixels."""


def kept_patches(picture: Image.Image, grid: tuple[int, int], kept: Iterable[int], width: int = 384) -> Image.Image:
    """The picture with its kept patches framed and its dropped ones faded.

    Args:
        picture: as the model saw it, cropped by its processor.
        grid: rows and columns of the raster of patches.
        kept: raster numbers of the kept patches, from 0 to rows · columns − 1.
        width: of the result, in pixels.
    """
    rows, columns = grid
    height = round(width * picture.height / picture.width)
    large = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    faded = Image.blend(large, Image.new("RGB", large.size, "white"), FADE)
    pen = ImageDraw.Draw(faded)
    for cell in kept:
        row, column = divmod(int(cell), columns)
        box = (column * width // columns, row * height // rows, (column + 1) * width // columns, (row + 1) * height // rows)
        faded.paste(large.crop(box), box[:2])
        pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=KEPT)
    return faded


def captioned(picture: Image.Image, lines: Sequence[tuple[str, str]]) -> Image.Image:
    """The picture with lines of text below it, each a text and its colour; long ones are wrapped."""
    font = ImageFont.load_default(size=FONT)
    characters = int(picture.width / font.getlength("n"))
    wrapped = [(part, colour) for text, colour in lines for part in wrap(text, characters) or [""]]
    sheet = Image.new("RGB", (picture.width, picture.height + LINE * len(wrapped) + 10), "white")
    sheet.paste(picture, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for number, (text, colour) in enumerate(wrapped):
        pen.text((4, picture.height + 5 + number * LINE), text, fill=colour, font=font)
    return sheet


def side_by_side(pictures: Sequence[Image.Image], gap: int = 12) -> Image.Image:
    """One row of pictures on white, `gap` pixels apart."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet


def stacked(pictures: Sequence[Image.Image], gap: int = 12) -> Image.Image:
    """One column of pictures on white, `gap` pixels apart."""
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (max(picture.width for picture in pictures), height), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + gap
    return sheet
