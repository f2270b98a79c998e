"""Pictures for models of pictures and texts: a folder for each class, or a file with captions.

folder/CLASS/picture.jpg      as ImageNet has them. The class is called as its folder, "_" read as a space; or as
                              folder/classes.json says, {"n01440764": "tench", …}
folder/captions.jsonl         {"image": "picture.jpg", "captions": ["a dog in the snow", …]} in each line. Lines about the same
                              picture (one for each caption) are put together
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError, first_line, shown

CAPTIONS, CLASSES = "captions.jsonl", "classes.json"
ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
QUESTIONS = "questions.jsonl"


@dataclass(frozen=True)
class PictureSet:
    """Pictures with their classes, or with their captions.

    Attributes:
        folder: where they are.
        paths: of the pictures.
        classes: names of the classes; empty for captions.
        labels: `[picture]` number of each picture's class; empty for captions.
        captions: of each picture; empty for classes.
    """

    folder: Path
    paths: tuple[Path, ...]
    classes: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    captions: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        """A hash of names, sizes, classes and captions."""
        digest = blake2b(digest_size=6)
        for path in self.paths:
            digest.update(f"{path.relative_to(self.folder)} {path.stat().st_size}\n".encode())
        digest.update(json.dumps([self.classes, self.labels, self.captions]).encode())
        return digest.hexdigest()

    def first(self, count: int | None) -> PictureSet:
        """So many of them, drawn with a fixed seed; all if None."""
        if count is None or count >= len(self):
            return self
        import numpy as np

        chosen = sorted(np.random.default_rng(0).permutation(len(self))[:count].tolist())
        pick = lambda values: tuple(values[index] for index in chosen) if values else ()  # noqa: E731
        return PictureSet(self.folder, pick(self.paths), self.classes, pick(self.labels), pick(self.captions))


def is_picture_set(name: str | None) -> bool:
    """Whether the name of data is a folder with pictures by class, or with captions; without reading a picture."""
    folder = Path(name or "").expanduser()
    if name is None or not folder.is_dir() or (folder / QUESTIONS).exists():
        return False
    return (folder / CAPTIONS).is_file() or any(_pictures(one) for one in folder.iterdir() if one.is_dir())


def open_pictures(name: str, count: int | None = None) -> PictureSet:
    """The pictures of a folder.

    Args:
        name: the folder.
        count: how many to use, drawn with a fixed seed; all if None.

    Raises:
        UsageError: there is no such folder, it holds no pictures, or its captions or names of classes cannot be read.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UsageError(f"no pictures at {name!r}: there is no such folder; give one with a folder for each class.")
    found = _with_captions(folder) if (folder / CAPTIONS).is_file() else _by_class(folder)
    return found.first(count)


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())


def _by_class(folder: Path) -> PictureSet:
    found = {one.name: pictures for one in sorted(folder.iterdir()) if one.is_dir() and (pictures := _pictures(one))}
    if len(found) < 2:
        raise UsageError(
            f"{folder} holds pictures of {len(found)} classes: give a folder with a folder of pictures for each class (at "
            f"least two), or with {CAPTIONS}."
        )
    names = _names(folder / CLASSES, list(found))
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise UsageError(f"two classes in {folder} are called {twice!r}: give each a name of its own in {CLASSES}.")
    pairs = [(path, number) for number, pictures in enumerate(found.values()) for path in pictures]
    paths, labels = zip(*pairs, strict=True)
    return PictureSet(folder, paths, tuple(names), labels)


def _names(file: Path, folders: Sequence[str]) -> list[str]:
    """Names of classes, by those of their folders."""
    if not file.is_file():
        return [folder.replace("_", " ") for folder in folders]
    given = _json(file, file.read_text(encoding="utf-8"))
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given.values()):
        raise UsageError(f'{file} must hold the names of classes by their folders, {{"n01440764": "tench"}}: {shown(given)}.')
    if missing := [folder for folder in folders if folder not in given]:
        raise UsageError(f"{file} has no name for {len(missing)} folders (such as {missing[0]!r}): add them.")
    return [given[folder] for folder in folders]


def _with_captions(folder: Path) -> PictureSet:
    file, captions = folder / CAPTIONS, dict[Path, list[str]]()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        entry = _json(file, line, f", line {number}")
        texts: Any = entry.get("captions") if isinstance(entry, dict) else None
        texts = [texts] if isinstance(texts, str) else texts
        good = isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
        if not good or not isinstance(entry.get("image"), str):
            raise UsageError(
                f'{file}, line {number} must be {{"image": "picture.jpg", "captions": ["…"]}}, found {shown(entry)}.'
            )
        path = folder / entry["image"]
        if not path.is_file():
            raise UsageError(f"{file}, line {number}: there is no picture at {path}.")
        captions.setdefault(path, []).extend(texts)
    if len(captions) < 2:
        raise UsageError(f"{file} names {len(captions)} pictures: retrieval needs at least two.")
    return PictureSet(folder, tuple(captions), captions=tuple(map(tuple, captions.values())))


def _json(file: Path, text: str, where: str = "") -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{file}{where} is no JSON ({first_line(error)}): correct it.") from error
