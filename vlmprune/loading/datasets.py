"""Open a Hugging Face dataset that lies in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError, first_line, unknown
from vlmprune.loading.outputs import check_packages

SAVED = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` writes."""
TABLES = (".parquet", ".arrow", ".csv", ".jsonl")
"""Endings of files that a dataset is read from."""


def holds_dataset(folder: Path) -> bool:
    """Whether a folder has the files of a dataset, itself or in the folders inside it."""
    return any(path.name in SAVED or path.suffix in TABLES for under in ("*", "*/*") for path in folder.glob(under))


def open_dataset(folder: Path, split: str | None = None) -> Any:
    """The rows of a dataset in a folder.

    Args:
        folder: what `save_to_disk` wrote; or a copy of a repository, with parquet, arrow, CSV or JSON lines files.
        split: its name; may be None where there is only one.

    Raises:
        UsageError: the package is missing, the dataset cannot be read, or has no such split, or several and none was named.
    """
    check_packages(["datasets"], "reading a Hugging Face dataset")
    import datasets

    try:
        saved = any((folder / name).exists() for name in SAVED)
        found = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
    except Exception as error:  # broken files make pyarrow and datasets raise anything
        raise UsageError(f"the dataset in {folder} cannot be read ({first_line(error)}): save or fetch it again.") from error
    if not isinstance(found, dict):
        if split is not None and str(found.split) != split:
            raise UsageError(f"the dataset in {folder} has no splits: leave out the split {split!r}.")
        return found
    if split is None and len(found) > 1:
        raise UsageError(f"the dataset in {folder} has the splits {', '.join(found)}: name one of them (--split).")
    if split is not None and split not in found:
        raise unknown("split", split, found)
    return found[split or next(iter(found))]
