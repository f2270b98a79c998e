"""Pictures reach a model as transformers' own `load_image` reads them, and what their values lost is said."""

from __future__ import annotations

import json
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image
from typer.testing import CliRunner

import vlmprune as vp
from vlmprune.cli import app
from vlmprune.evals.questions import open_questions
from vlmprune.loading.pictures import _bits_in_head, open_picture, summary
from vlmprune.tiny.scenes import make_scene

ORIENTATION = 0x0112
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_90",
    7: "TRANSVERSE",
    8: "ROTATE_270",
}
"""How a camera stores a picture that must be turned back: by EXIF orientation, the inverse of what a viewer does."""


def scene() -> Image.Image:
    return make_scene(3).image.crop((0, 0, 96, 64))


def stored_on_its_side(path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    scene().transpose(Image.Transpose[TURNS[orientation]]).save(path, exif=exif)
    return path


def png(values: np.ndarray, colour: int) -> bytes:
    """A PNG with 16 bits per channel, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


PORTABLE = {
    "PPM 16": (65535, True),
    "PPM 10": (1023, True),
    "plain PPM 16": (65535, False),
    "PPM 4": (15, True),
    "PPM 8": (255, True),
}
FORMATS = {"TIFF 8": ".tiff", "JPEG 2000": ".jp2", "AVIF": ".avif"}


def portable(most: int, binary: bool) -> bytes:
    """A PPM of 3 × 2 pixels with values up to `most`, which Pillow writes with 8 bits only."""
    values = np.linspace(0, most, 18).astype(int)
    head = f"P{6 if binary else 3}\n3 2\n{most}\n".encode()
    if not binary:
        return head + " ".join(map(str, values)).encode() + b"\n"
    return head + values.astype(">u2" if most > 255 else "u1").tobytes()


def tiff(values: np.ndarray, planes: bool) -> bytes:
    """A TIFF with 16 bits of three channels, pixel by pixel or in planes, which Pillow cannot write."""
    height, width, _ = values.shape
    data = (values.transpose(2, 0, 1) if planes else values).astype("<u2").tobytes()
    strips = 3 if planes else 1
    size, after = len(data) // strips, 8 + len(data)
    offsets, counts = [8 + size * strip for strip in range(strips)], [size] * strips
    entries = [(256, 4, [width]), (257, 4, [height]), (258, 3, [16] * 3), (259, 3, [1]), (262, 3, [2]), (273, 4, offsets)]
    entries += [(277, 3, [3]), (278, 4, [height]), (279, 4, counts), (284, 3, [2 if planes else 1])]
    directory, extra = struct.pack("<H", len(entries)), b""
    behind = after + 2 + 12 * len(entries) + 4
    for tag, kind, given in entries:
        packed = struct.pack("<" + {3: "H", 4: "I"}[kind] * len(given), *given)
        if len(packed) > 4:
            place, extra = struct.pack("<I", behind + len(extra)), extra + packed
        else:
            place = packed.ljust(4, b"\0")
        directory += struct.pack("<HHI", tag, kind, len(given)) + place
    return b"II*\0" + struct.pack("<I", after) + data + directory + b"\0" * 4 + extra


def write(folder, kind):
    """One picture of each kind."""
    ramp = np.arange(64 * 48).reshape(48, 64)
    path = folder / f"{kind}.png"
    if kind == "exif":
        return stored_on_its_side(folder / "phone.jpg", 6)
    if kind == "png with exif":
        return stored_on_its_side(path, 8)
    if kind == "grey 16":
        Image.fromarray((ramp * 20).astype(np.uint16)).save(path)
    elif kind == "colour 16":
        path.write_bytes(png(np.stack([ramp, ramp * 20, 60000 - ramp], axis=-1), 2))
    elif kind == "colour 16 and alpha":
        path.write_bytes(png(np.stack([ramp, ramp * 20, 60000 - ramp, ramp * 20], axis=-1), 6))
    elif kind == "float":
        path = path.with_suffix(".tiff")
        Image.fromarray((ramp / ramp.max()).astype(np.float32)).save(path)
    elif kind == "whole 32":
        path = path.with_suffix(".tiff")
        Image.fromarray((ramp * 300 - 1000).astype(np.int32)).save(path)
    elif kind == "alpha":
        made = scene().convert("RGBA")
        made.putalpha(Image.fromarray((ramp % 256).astype(np.uint8)).resize(made.size))
        made.save(path)
    elif kind == "opaque alpha":
        scene().convert("RGBA").save(path)
    elif kind == "grey and alpha":
        Image.merge("LA", (scene().convert("L"), Image.new("L", scene().size, 128))).save(path)
    elif kind == "palette":
        scene().quantize(16).save(path)
    elif kind == "transparent palette":
        scene().quantize(16).save(path, transparency=0)
    elif kind == "transparent palette, by bytes":
        scene().quantize(16).save(path, transparency=bytes([0, 128, 255]))
    elif kind == "bilevel":
        scene().convert("1").save(path)
    elif kind == "CMYK":
        path = path.with_suffix(".jpg")
        scene().convert("CMYK").save(path)
    elif kind == "animation":
        path = path.with_suffix(".gif")
        scene().save(
            path, save_all=True, append_images=[Image.new("RGB", scene().size, colour) for colour in ("red", "blue", "green")]
        )
    elif kind == "pages":
        path = path.with_suffix(".tiff")
        scene().save(path, save_all=True, append_images=[Image.new("RGB", (30, 30), "red")])
    elif kind in PORTABLE:
        path = path.with_suffix(".ppm")
        path.write_bytes(portable(*PORTABLE[kind]))
    elif kind == "SGI 16":
        path = path.with_suffix(".sgi")
        planes = ramp[None].repeat(3, 0).astype(">u2")  # Pillow writes 16 bits of one channel only
        head = struct.pack(">HBBHHHHii", 474, 0, 2, 3, 64, 48, 3, 0, 65535)
        path.write_bytes(head.ljust(512, b"\0") + planes.tobytes())
    elif kind.startswith("TIFF 16"):
        path = path.with_suffix(".tiff")
        path.write_bytes(tiff(np.stack([ramp, ramp * 20, 60000 - ramp], axis=-1), "planes" in kind))
    elif kind in FORMATS:
        path = path.with_suffix(FORMATS[kind])
        scene().save(path)
    elif kind == "plain":
        scene().save(path)
    return path


NOTES = {
    "plain": None,
    "exif": None,
    "png with exif": None,
    "grey 16": "values of more than 8 bits from 0 to 61420; they were clipped to whole numbers in 0 to 255",
    "colour 16": "it has 16 bits per channel, of which 8 were kept",
    "PPM 16": "it has 16 bits per channel, of which 8 were kept",
    "PPM 10": "it has 10 bits per channel, of which 8 were kept",
    "plain PPM 16": "it has 16 bits per channel, of which 8 were kept",
    "PPM 4": None,
    "PPM 8": None,
    "SGI 16": "it has 16 bits per channel, of which 8 were kept",
    "TIFF 16": "it has 16 bits per channel, of which 8 were kept",
    "TIFF 16 in planes": "it has 16 bits per channel, of which 8 were kept",
    "TIFF 8": None,
    "JPEG 2000": None,
    "AVIF": None,
    "colour 16 and alpha": "of its pixels are transparent; transparency was dropped",
    "float": "floating-point values from 0 to 1; they were clipped",
    "whole 32": "values of more than 8 bits from -1000 to",
    "alpha": "of its pixels are transparent",
    "opaque alpha": None,
    "grey and alpha": "100.0% of its pixels are transparent",
    "palette": None,
    "transparent palette": "of its pixels are transparent",
    "transparent palette, by bytes": "of its pixels are transparent",
    "bilevel": None,
    "CMYK": "its CMYK colours were made RGB",
    "animation": "it has 4 frames or pages; the first is used",
    "pages": "it has 2 frames or pages; the first is used",
}


@pytest.mark.parametrize("kind", NOTES)
def test_what_is_read_and_what_is_said(tmp_path, kind):
    """Red: EXIF is not looked at; or values are clipped, scaled or dropped in silence."""
    path = write(tmp_path, kind)
    notes = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        picture = open_picture(path, notes.append)
    assert not warned, "what is to be said is in the notes"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(np.asarray(picture), np.asarray(load_image(str(path))))
    assert picture.mode == "RGB"
    if NOTES[kind] is None:
        assert notes == []
    else:
        assert NOTES[kind] in " ".join(notes)
        assert all(note.startswith(f"{path}: it") or "pixels" in note for note in notes)


@pytest.mark.parametrize(
    ("ending", "mark", "place", "byte", "bits"),
    [(".jp2", b"\xff\x4f\xff\x51", 42, 11, 12), (".avif", b"av1C", 6, 0x40, 10)],
)
def test_more_than_8_bits_in_compressed_colour(tmp_path, ending, mark, place, byte, bits):
    """Pillow writes 8 bits only, so the byte that says so is changed."""
    path = tmp_path / f"deep{ending}"
    scene().save(path)
    content = bytearray(path.read_bytes())
    assert _bits_in_head(bytes(content)) == 8
    content[content.index(mark) + place] = byte
    assert _bits_in_head(bytes(content)) == bits


@pytest.mark.parametrize("orientation", TURNS)
def test_every_orientation(tmp_path, orientation):
    path = stored_on_its_side(tmp_path / "phone.png", orientation)
    assert np.array_equal(np.asarray(open_picture(path)), np.asarray(scene()))


def test_notes_are_warnings_where_nobody_listens(tmp_path):
    with pytest.warns(UserWarning, match="clipped to whole numbers"):
        open_picture(write(tmp_path, "grey 16"))


def test_notes_on_many_pictures():
    """Red: a thousand pictures of one kind fill the screen."""
    notes = ["a.png: it is grey.", "b.png: it is grey.", "c.png: it has 2 frames."]
    assert summary(notes) == ["2 pictures, the first of them a.png: it is grey.", "c.png: it has 2 frames."]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.png", b"", "is empty"),
        ("text.png", b"no picture", "is not a picture that can be read: give a PNG, a JPEG"),
        ("vector.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "another format that Pillow can read"),
        ("cut.png", "cut", "it is cut off or damaged"),
        ("huge.png", "huge", "too many pixels to be read (more than 178,956,970)"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, sentence):
    """Red: a picture that is too large, or empty, is said to be no picture."""
    path = tmp_path / name
    if content == "cut":
        write(tmp_path, "plain")
        content = (tmp_path / "plain.png").read_bytes()[:600]
    elif content == "huge":
        content = png(np.zeros((1, 1, 3)), 2).replace(struct.pack(">II", 1, 1), struct.pack(">II", 60000, 60000), 1)
        head = content[12:29]
        content = content[:29] + struct.pack(">I", zlib.crc32(head)) + content[33:]
    path.write_bytes(content)
    with pytest.raises(vp.UsageError) as error:
        open_picture(path)
    assert sentence in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_file(tmp_path):
    for path, sentence in (
        (tmp_path, "it is a folder"),
        (tmp_path / "nowhere.png", "give the path of an image file"),
        ("https://example.org/cat.jpg", "^https://example.org/cat.jpg is an address: download the picture"),
        (Path("https://example.org/cat.jpg"), "^https://example.org/cat.jpg is an address"),
        ("data:image/png;base64,AAAA", "^data:image/png;base64,AAAA is an address"),
    ):
        with pytest.raises(vp.UsageError, match=sentence):
            open_picture(path)


def test_a_picture_at_home(tmp_path, monkeypatch):
    """Red: "~" is taken for a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "plain")
    assert open_picture("~/plain.png").size == scene().size


# -- every command reads them so -------------------------------------------------------------------------------------------


@pytest.fixture
def sideways(tmp_path):
    """A scene that a phone stored on its side, and a question whose answer depends on it."""
    made = make_scene(1)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    made.image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    made.image.save(tmp_path / "upright.png")
    return tmp_path


def ask(path, *more):
    arguments = ["run", "--model", "tiny", "--image", str(path), "--prompt", "how many circles are there ?", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "3", *more])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def test_run_sees_the_upright_picture(sideways):
    """Red: `run` gives the model the picture on its side."""
    first, _ = ask(sideways / "phone.png", "--draw", str(sideways / "a.png"))
    second, _ = ask(sideways / "upright.png", "--draw", str(sideways / "b.png"))
    assert first == {**second, "picture": first["picture"]}
    assert (sideways / "a.png").read_bytes() == (sideways / "b.png").read_bytes()


def test_run_says_what_a_picture_lost(tmp_path):
    """Red: a 16-bit picture is white in silence."""
    answer, said = ask(write(tmp_path, "grey 16"))
    assert "clipped to whole numbers" in answer["picture"]["notes"][0]
    assert "vlmprune: note: " in said
    assert "clipped to whole numbers" in said


def test_view_sees_the_upright_picture(sideways, monkeypatch):
    from vlmprune.evals import sink_view

    shown = []
    monkeypatch.setattr(sink_view, "draw", lambda found, seen, *more: shown.append(np.asarray(seen)))
    for name in ("phone.png", "upright.png"):
        result = CliRunner().invoke(app, ["view", "--image", str(sideways / name), "--prompt", "how many circles are there ?"])
        assert result.exit_code == 0, result.output
    assert np.array_equal(*shown)


@pytest.mark.parametrize("command", ["horizon", "tune"])
def test_calibration_sees_the_upright_picture(sideways, command):
    """Red: `horizon` or `tune` reads pictures another way than `run`, or does not say what they lost."""
    found = {}
    for name in ("phone.png", "upright.png"):
        folder = sideways / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes((sideways / name).read_bytes())
        grey = write(folder, "grey 16").name
        lines = [{"image": image, "question": "how many circles are there ?", "answer": "1"} for image in (name, grey)]
        (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        more = ["--layer", "2", "--window", "6"] if command == "horizon" else ["--method", "adaptinfer", "--fraction", "0.5"]
        result = CliRunner().invoke(app, [command, "--data", str(folder), *more, "--json"])
        assert result.exit_code == 0, result.output
        assert f"vlmprune: note: {folder / grey}: it has values of more than 8 bits" in result.stderr
        (note,) = json.loads(result.stdout)["notes"]
        assert "more than 8 bits" in note
        found[name] = json.loads(result.stdout.replace(str(folder), "").replace(name, ""))
    strip = lambda data: {key: value for key, value in data.items() if key not in ("data", "notes", "date")}  # noqa: E731
    assert strip(found["phone.png"]) == strip(found["upright.png"])


def test_calibration_refuses_a_broken_picture_before_the_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "questions.jsonl").write_text('{"image": "a.png", "question": "what ?", "answer": "1"}')
    monkeypatch.setattr("vlmprune.loading.models.open_model", lambda *arguments: pytest.fail("the model was loaded"))
    result = CliRunner().invoke(app, ["horizon", "--data", str(tmp_path)])
    assert isinstance(result.exception, vp.UsageError)
    assert "a.png is not a picture" in str(result.exception)
    assert open_questions("scenes", 2).notes == ()
