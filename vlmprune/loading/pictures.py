"""Read a picture as `load_image` of transformers does (upright, RGB, 8 bits), and report what was lost on the way."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterable
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmprune.errors import UsageError, first_line

WIDE = ("I", "F")
"""First letters of the modes of Pillow with one channel of more than 8 bits: `I`, `I;16`, `F`, …"""

SCHEMES = ("http", "https", "ftp", "s3", "gs", "hf", "data", "file")


def open_picture(path: str | Path, report: Callable[[str], object] = warnings.warn) -> Image.Image:
    """Read a picture: upright RGB, 8 bits per channel, equal to `transformers.image_utils.load_image(path)`.

    Args:
        path: of the file.
        report: called with one sentence for every loss: depth, transparency, further frames, a colour profile.

    Raises:
        UsageError: there is no such file, or it cannot be read as a picture; says why.
    """
    scheme, _, rest = str(path).partition(":")
    if scheme.lower() in SCHEMES:
        slashes = "" if scheme.lower() == "data" else "//"  # `Path` drops one of them
        address = f"{scheme}:{slashes}{rest.lstrip('/')}"
        address = address if len(address) <= 80 else address[:77] + "…"
        raise UsageError(f"{address} is an address: download the picture and give the path of the file.")
    path = Path(path).expanduser()
    if path.is_dir():
        raise UsageError(f"there is no picture at {path}: it is a folder, give the path of an image file.")
    if not path.exists():
        raise UsageError(f"there is no picture at {path}: give the path of an image file.")
    try:
        with path.open("rb") as file:
            return _read(file, str(path), report)
    except PermissionError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): change its permissions.") from error


def decode_picture(data: bytes, name: str, report: Callable[[str], object] = warnings.warn) -> Image.Image:
    """A picture from the bytes of a file, as a dataset holds them: the same as `open_picture` reads.

    Raises:
        UsageError: they cannot be read as a picture; says why.
    """
    return _read(BytesIO(data), name, report)


def _read(file: BinaryIO, name: str, report: Callable[[str], object]) -> Image.Image:
    """A picture from an open file; `name` is for sentences."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about EXIF data, palettes and size; `_losses` reports what matters
            with Image.open(file) as stored:
                depth = _bits(stored, file)  # Pillow forgets it once the pixels are read
                upright = ImageOps.exif_transpose(stored)
                image = upright.convert("RGB")
                losses = list(_losses(stored, upright, image, depth))
    except Image.DecompressionBombError as error:
        raise UsageError(
            f"{name} has too many pixels to be read (more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,}): make it smaller."
        ) from error
    except UnidentifiedImageError as error:
        what = "is not a picture that can be read" if file.seek(0, SEEK_END) else "is empty"
        raise UsageError(f"{name} {what}: give a PNG, a JPEG or another format that Pillow can read.") from error
    except PermissionError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, struct.error) as error:
        raise UsageError(
            f"{name} is not a picture that can be read ({first_line(error)}): it is cut off or damaged."
        ) from error
    for loss in losses:
        report(f"{name}: {loss}.")
    return image


def summary(notes: Iterable[str]) -> list[str]:
    """The sentences about several pictures, with equal ones put together."""
    named: dict[str, list[str]] = {}
    for note in notes:
        path, _, loss = note.partition(": ")
        named.setdefault(loss, []).append(path)
    return [
        f"{paths[0]}: {loss}" if len(paths) == 1 else f"{len(paths)} pictures, the first of them {paths[0]}: {loss}"
        for loss, paths in named.items()
    ]


def _bits(stored: Image.Image, file: BinaryIO) -> int:
    """Bits per channel in the file.

    Pillow reads colours of more than 8 bits as 8 bits, and has no attribute for the depth in the file. It is found in the
    arguments of Pillow's decoder, in the tags, or in the first bytes of the file.
    """
    tiles = getattr(stored, "tile", ())
    if stored.format == "TIFF":
        return max(stored.tag_v2.get(258, (8,)))  # type: ignore[attr-defined]  # BitsPerSample
    if stored.format == "PPM":
        return max(
            (tile.args[-1].bit_length() for tile in tiles if tile.codec_name.startswith("ppm") and tile.args[-1]), default=8
        )
    if stored.format in ("JPEG2000", "AVIF"):
        place = file.tell()
        file.seek(0)
        head = file.read(1 << 16)
        file.seek(place)
        return _bits_in_head(head)
    return 16 if any(";16" in str(tile) or tile.codec_name == "SGI16" for tile in tiles) else 8


def _bits_in_head(head: bytes) -> int:
    """Bits per channel of a JPEG 2000 (first component in its segment SIZ) or of an AVIF (its box `av1C`)."""
    if (start := head.find(b"\xff\x4f\xff\x51")) >= 0 and len(head) > start + 42:
        return (head[start + 42] & 0x7F) + 1
    if (start := head.find(b"av1C")) >= 0 and len(head) > start + 6:
        high, twelve = head[start + 6] & 0x40, head[start + 6] & 0x20
        return 12 if high and twelve else 10 if high else 8
    return 8


def _losses(stored: Image.Image, upright: Image.Image, image: Image.Image, depth: int) -> Iterable[str]:
    """A sentence for everything in the file that `image` does not hold."""
    if upright.mode.startswith(WIDE):
        before = np.asarray(upright).astype(np.float64)
        after = np.asarray(image)[..., 0].astype(np.float64)
        changed = float((before != after).mean())
        if changed:
            low, high = (f"{value:.6g}" for value in (np.nanmin(before), np.nanmax(before)))
            kind = "floating-point values" if upright.mode == "F" else "values of more than 8 bits"
            yield (
                f"it has {kind} from {low} to {high}; they were clipped to whole numbers in 0 to 255, which changed "
                f"{changed:.1%} of them (as transformers' load_image does): scale it to 8 bits for another result"
            )
    elif depth > 8:
        yield f"it has {depth} bits per channel, of which 8 were kept (as transformers' load_image does)"
    if upright.has_transparency_data:
        alpha = np.asarray(upright.convert("RGBA"))[..., 3]
        clear = float((alpha < 255).mean())
        if clear:
            yield (
                f"{clear:.1%} of its pixels are transparent; transparency was dropped and the colours beneath it are seen "
                "(as transformers' load_image does): put it on a background for another result"
            )
    frames = getattr(stored, "n_frames", 1)
    if frames > 1 and stored.format != "MPO":  # further frames of a phone's MPO are depth maps or previews of the same photo
        yield f"it has {frames} frames or pages; the first is used"
    if upright.mode in ("CMYK", "LAB"):
        yield f"its {upright.mode} colours were made RGB without their colour profile (as transformers' load_image does)"
