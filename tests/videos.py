"""Videos for tests: frames that are told apart by their colour, in files that PyAV encodes, and in folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, RATE = 80, 64, 10


def frame(number: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A plain frame whose red says its number (9 steps each), with a white square that moves to the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 2] = 9 * number, 60
    left = 4 * number % (width - 16)
    pixels[height // 2 :, left : left + 16] = 255
    return Image.fromarray(pixels)


def number_of(picture: Image.Image) -> int:
    """Which frame a decoded picture shows."""
    return round(picture.getpixel((picture.width // 2, 4))[0] / 9)


def folder(path: Path, count: int = 6, **size: int) -> Path:
    """Frames as pictures, whose names sort as text in another order than as numbers."""
    path.mkdir()
    for number in range(count):
        frame(number, **size).save(path / f"frame{number + 7}.png")
    (path / "notes.txt").write_text("no picture")
    return path


def file(path: Path, count: int = 25, codec: str = "mpeg4", form: str | None = None, width: int = WIDTH) -> Path:
    """An encoded video."""
    import av

    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, HEIGHT, "yuv420p", 4_000_000
        for number in range(count):
            for packet in stream.encode(av.VideoFrame.from_image(frame(number, width))):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def sound(path: Path) -> Path:
    """A file with sound and no pictures."""
    import wave

    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(b"\0\0" * 800)
    return path
