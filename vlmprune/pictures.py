"""Reading a picture as transformers' own `load_image` does (turned upright, then RGB), and saying what that changed."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmprune.errors import UsageError, first_line

WIDE = ("I", "F")
"""Modes of Pillow with one channel of more than 8 bits; `I;16` and its kin begin with one of them."""


def open_picture(path: str | Path, tell: Callable[[str], object] = warnings.warn) -> Image.Image:
    """Read a picture: upright RGB, 8 bits per channel, equal to `transformers.image_utils.load_image(path)`.

    Args:
        path: of the file.
        tell: called with one sentence for everything that its values lost on the way.

    Raises:
        UsageError: there is no such file, or it is no picture that can be read; says why.
    """
    path = Path(path)
    if path.parts[:1] in (("http:",), ("https:",), ("data:",)):
        raise UsageError(f"{path} is an address: download the picture and give the path of the file.")
    if path.is_dir():
        raise UsageError(f"there is no picture at {path}: it is a folder, give the path of an image file.")
    if not path.exists():
        raise UsageError(f"there is no picture at {path}: give the path of an image file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on damaged EXIF data, palettes and size; what matters is in the notes
            with Image.open(path) as stored:
                depth = _bits(stored)  # only known before the pixels are read
                upright = ImageOps.exif_transpose(stored)
                image = upright.convert("RGB")
                losses = list(_losses(stored, upright, image, depth))
    except Image.DecompressionBombError as error:
        raise UsageError(
            f"{path} has too many pixels to be read (more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,}): make it smaller."
        ) from error
    except UnidentifiedImageError as error:
        what = "is empty" if not path.stat().st_size else "is not a picture that can be read"
        raise UsageError(f"{path} {what}: give a PNG, JPEG or another format that Pillow knows.") from error
    except PermissionError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): change its permissions.") from error
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, struct.error) as error:
        raise UsageError(
            f"{path} is not a picture that can be read ({first_line(error)}): it is cut off or damaged."
        ) from error
    for loss in losses:
        tell(f"{path}: {loss}.")
    return image


def summary(notes: Iterable[str]) -> list[str]:
    """The sentences on several pictures, equal ones together."""
    named: dict[str, list[str]] = {}
    for note in notes:
        path, _, loss = note.partition(": ")
        named.setdefault(loss, []).append(path)
    return [
        f"{paths[0]}: {loss}" if len(paths) == 1 else f"{len(paths)} pictures, the first of them {paths[0]}: {loss}"
        for loss, paths in named.items()
    ]


def _bits(stored: Image.Image) -> int:
    """Bits per channel in the file; Pillow reads 16-bit colour as 8 bits, and only its raw mode tells."""
    return 16 if any(";16" in str(tile) for tile in getattr(stored, "tile", ())) else 8


def _losses(stored: Image.Image, upright: Image.Image, image: Image.Image, depth: int) -> Iterable[str]:
    """What of the picture is not in `image`."""
    if upright.mode.startswith(WIDE):
        before = np.asarray(upright).astype(np.float64)
        after = np.asarray(image)[..., 0].astype(np.float64)
        changed = float((before != after).mean())
        if changed:
            low, high = (f"{value:.6g}" for value in (np.nanmin(before), np.nanmax(before)))
            kind = "floating-point values" if upright.mode == "F" else "values of more than 8 bits"
            yield (
                f"it has {kind} from {low} to {high}; they were cut to whole numbers in 0 to 255, which changed "
                f"{changed:.1%} of them (as transformers' load_image does): scale it to 8 bits for another result"
            )
    elif depth > 8:
        yield "it has 16 bits per channel; the lower 8 were dropped (as transformers' load_image does)"
    if upright.has_transparency_data:
        alpha = np.asarray(upright.convert("RGBA"))[..., 3]
        clear = float((alpha < 255).mean())
        if clear:
            yield (
                f"{clear:.1%} of its pixels are transparent; transparency was dropped and the colours beneath it are seen "
                "(as transformers' load_image does): put it on a background for another result"
            )
    frames = getattr(stored, "n_frames", 1)
    if frames > 1 and stored.format != "MPO":  # what a phone's MPO holds beside the photo is no other picture
        yield f"it has {frames} frames or pages; the first is used"
    if upright.mode in ("CMYK", "LAB"):
        yield f"its {upright.mode} colours were made RGB without their colour profile (as transformers' load_image does)"
