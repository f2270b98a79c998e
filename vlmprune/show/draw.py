"""Pictures with the kept patches drawn on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

KEPT = (255, 196, 0)
FADE = 0.78
"""How far dropped patches go towards white."""


def kept_patches(picture: Image.Image, grid: tuple[int, int], kept: Iterable[int], width: int = 384) -> Image.Image:
    """The picture with dropped patches faded and kept ones framed.

    Args:
        picture: what the model saw (cropped as its processor crops).
        grid: rows and columns of visual tokens.
        kept: raster indices of the kept tokens, 0 … rows · columns − 1.
        width: of the result, in pixels.
    """
    rows, columns = grid
    height = round(width * picture.height / picture.width)
    large = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    faded = Image.blend(large, Image.new("RGB", large.size, "white"), FADE)
    marks = ImageDraw.Draw(faded)
    for index in kept:
        row, column = divmod(int(index), columns)
        box = (column * width // columns, row * height // rows, (column + 1) * width // columns, (row + 1) * height // rows)
        faded.paste(large.crop(box), box[:2])
        marks.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=KEPT)
    return faded


def captioned(picture: Image.Image, lines: Sequence[tuple[str, str]]) -> Image.Image:
    """The picture over lines of text, each with its colour; long lines are broken."""
    font = ImageFont.load_default(size=15)
    characters = int(picture.width / font.getlength("n"))
    broken = [(part, colour) for text, colour in lines for part in wrap(text, characters) or [""]]
    line_height = 21
    sheet = Image.new("RGB", (picture.width, picture.height + line_height * len(broken) + 10), "white")
    sheet.paste(picture, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for number, (text, colour) in enumerate(broken):
        pen.text((4, picture.height + 5 + number * line_height), text, fill=colour, font=font)
    return sheet


def side_by_side(pictures: Sequence[Image.Image], gap: int = 12) -> Image.Image:
    """One row of pictures on white."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


def stacked(pictures: Sequence[Image.Image], gap: int = 12) -> Image.Image:
    """One column of pictures on white."""
    sheet = Image.new(
        "RGB", (max(p.width for p in pictures), sum(p.height for p in pictures) + gap * (len(pictures) - 1)), "white"
    )
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + gap
    return sheet
