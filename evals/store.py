"""Finished answers on disk: an interrupted evaluation goes on from them, and several processes share them.

A folder holds `settings.json` and files of JSON lines, `answers-0001.jsonl` and so on. Every process appends to a file of its
own, and a row counts from the moment it is on disk. A last line without its end was interrupted and does not count; no file is
ever rewritten. Reading merges all files by key, so that it does not matter which process answered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError, shown
from vlmprune.evals.files import created
from vlmprune.loading.outputs import make_folder

SETTINGS = "settings.json"
FILES = "answers-*.jsonl"
NOTHING = "nothing"
"""Stands for a setting that one side does not have."""
Key = tuple[str | int, ...]
Row = dict[str, Any]


class Store:
    """Rows by their keys, in memory and, if a folder is given, on disk.

    Rows with another `code` are left where they are and do not count: they are asked again.

    Args:
        folder: made if it does not exist; None keeps the rows in memory only.
        settings: everything beside the key and the code that a row depends on, versions of packages among it; plain data.
        code: hash of the code that gives the answers (`evals.fingerprints.code_fingerprint`).

    Attributes:
        stale: number of rows in the folder that other code gave.

    Raises:
        UsageError: the folder cannot be used, or holds answers of other settings; says which.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], code: str = "") -> None:
        self.stale = 0
        self._folder, self._code = folder, code
        self._rows: dict[Key, Row] = {}
        self._from: dict[Key, str] = {}  # the name of the file that a row was taken from
        self._claims: set[Key] = set()  # of other processes
        self._read: dict[Path, int] = {}  # bytes of complete lines
        self._file: FileIO | None = None
        self._own: set[Path] = set()
        if folder is not None:
            make_folder(folder)
            _agree(folder, settings)
            self.refresh()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._rows)

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def __getitem__(self, key: Key) -> Row:
        return self._rows[key]

    def get(self, key: Key) -> Row | None:
        """The row of a key, or None."""
        return self._rows.get(key)

    def add(self, key: Key, row: Mapping[str, Any]) -> None:
        """Keep one row: when this returns, it is on disk.

        Raises:
            UsageError: it cannot be written. What was added before is not lost.
        """
        self.add_all({key: row})

    def add_all(self, rows: Mapping[Key, Mapping[str, Any]]) -> None:
        """Keep several rows, with one wait for the disk; see `add`."""
        lines = [{"key": key, "code": self._code, "row": row} for key, row in rows.items()]
        self._append(lines, wait=True)
        name = "" if self._file is None else Path(self._file.name).name
        for key, row in rows.items():
            self._remember(key, dict(row), name)

    def claim(self, key: Key) -> None:
        """Tell the other processes that this one begins with a key; they take others first."""
        self._append([{"claim": key, "code": self._code}], wait=False)

    def to_do(self, keys: Iterable[Key]) -> Iterator[Key]:
        """Those of the keys that have no row, one after the other; the caller adds a row for each.

        Before each, the rows of other processes are read. What another one has begun comes last: where it is still at it by
        then, both give the same answer; where it was killed, this process takes its place.
        """
        keys = list(keys)
        for late in (False, True):
            for key in keys:
                if key in self._rows:
                    continue
                self.refresh()
                if key not in self._rows and (late or key not in self._claims):
                    self.claim(key)
                    yield key

    def refresh(self) -> None:
        """Read what other processes have written since the last time.

        Raises:
            UsageError: a line is damaged; says which.
        """
        if self._folder is None:
            return
        for path in sorted(self._folder.glob(FILES)):
            if path in self._own:
                continue
            start = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            for line in whole.splitlines():
                self._take(line, path)
            self._read[path] = start + len(whole)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's file. Adding opens another one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, line: bytes, path: Path) -> None:
        try:
            found = json.loads(line)
            key, current = tuple(found.get("key") or found["claim"]), found["code"] == self._code
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UsageError(
                f"{path} has a damaged line ({shown(line.decode(errors='replace'))}): delete this line; its answers are asked "
                "again, and all others are kept."
            ) from error
        if "row" not in found:
            if current:
                self._claims.add(key)
        elif current:
            self._remember(key, found["row"], path.name)
        else:
            self.stale += 1

    def _remember(self, key: Key, row: Row, name: str) -> None:
        if key not in self._rows or name < self._from[key]:  # of two, all processes take the same
            self._rows[key], self._from[key] = row, name

    def _append(self, lines: Iterable[Mapping[str, Any]], wait: bool) -> None:
        if self._folder is None:
            return
        left = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode())
        try:
            file = self._file or self._create(self._folder)
            while left:
                left = left[file.write(left) :]
            if wait:
                os.fsync(file.fileno())
        except OSError as error:
            self.close()  # its last line may be incomplete: whoever goes on starts another file
            raise UsageError(
                f"cannot write to {self._folder} ({error.strerror}): the {len(self)} finished parts are kept; free space on "
                "that disk or make it writable, then run the same command again."
            ) from error

    def _create(self, folder: Path) -> FileIO:
        number = 1 + len(list(folder.glob(FILES)))
        while True:
            path = folder / FILES.replace("*", f"{number:04d}")
            try:
                self._file = FileIO(path, "x")
            except FileExistsError:
                number += 1
                continue
            self._own.add(path)
            return self._file


def _agree(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings if the folder has none, or compare them with its.

    Raises:
        UsageError: they differ, or are missing although there are answers.
    """
    path, wanted = folder / SETTINGS, json.dumps(settings, indent=1, sort_keys=True)
    answers = next(folder.glob(FILES), None)  # looked for first: whoever writes answers has written settings before
    if not path.exists():
        if answers is not None:
            raise UsageError(
                f"{folder} holds answers but no {SETTINGS}, which says what was asked: choose another folder, or delete this "
                "one."
            )
        if created(path, wanted + "\n"):
            return
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: choose another folder, or delete this one.") from error
    if differing := difference(found, json.loads(wanted)):
        raise UsageError(
            f"{folder} holds answers of other settings: {'; '.join(differing)}. Choose another folder, or delete this one."
        )


def difference(there: Any, here: Any, name: str = "settings") -> list[str]:
    """Where two settings differ, as parts of a sentence; empty if they are equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            part
            for key in sorted({*there, *here})
            for part in difference(
                there.get(key, NOTHING), here.get(key, NOTHING), key if name == "settings" else f"{name}.{key}"
            )
        ]
    if there == here:
        return []
    one, other = (NOTHING if value == NOTHING else shown(value) for value in (there, here))
    return [f"{name} {one} there, {other} here"]
