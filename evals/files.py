"""Files that are there whole or not at all, also where several processes write, and where a disk is full."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from vlmprune.errors import UsageError


@contextmanager
def written_whole(path: Path, publish: Callable[[Path, Path], None] = os.replace) -> Iterator[Path]:
    """Write a file beside `path`, and give it its name when it is complete.

    Args:
        path: the file; its folder exists. An older one stays as it is until the new one is complete.
        publish: gives the file its name.

    Yields:
        The path to write to, with the same ending.

    Raises:
        UsageError: it cannot be written, for example because the disk is full.
    """
    draft = path.with_name(f".{path.stem}-{uuid4().hex}{path.suffix}")
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        publish(draft, path)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        draft.unlink(missing_ok=True)


def created(path: Path, text: str) -> bool:
    """Write a file if there is none of this name; of several processes that try, one does.

    Returns:
        Whether this call made it.

    Raises:
        UsageError: it cannot be written.
    """
    made = True

    def publish(draft: Path, name: Path) -> None:
        nonlocal made
        try:
            os.link(draft, name)  # fails if the name is taken; a file system without links says so by another error
        except FileExistsError:
            made = False
        except OSError:
            made = not name.exists()
            if made:
                os.replace(draft, name)

    with written_whole(path, publish) as draft:
        draft.write_text(text)
    return made


def not_written(path: Path, error: OSError) -> UsageError:
    """The sentence for a file that cannot be written."""
    return UsageError(f"cannot write {path} ({error.strerror}): free space on that disk or make it writable, then run again.")
