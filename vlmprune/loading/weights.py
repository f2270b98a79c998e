"""Check the files of a model's weights without reading them, and load the model whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from vlmprune.errors import UsageError, first_line
from vlmprune.loading.config import LFS
from vlmprune.loading.source import Source

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLE = b"\x80"
"""The first byte of a file in torch's old format, which is no archive."""


def check_weights(source: Source) -> None:
    """Refuse weights that are missing, cut off, or pointers to files that were not fetched.

    Raises:
        UsageError: says which file is missing or broken.
    """
    present = [name for name in WEIGHTS if name in source.files]
    if not present:
        none = UsageError(
            f"{source.name!r} has a config but no weights: looked for {', '.join(WEIGHTS)}; fetch them into this folder."
        )
        raise source.lacking("the weights", none)
    if source.folder is None:
        return
    first = source.folder / present[0]
    for file in _shards(source, first) if first.suffix == ".json" else [first]:
        _check_file(file)


def _shards(source: Source, index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is broken ({first_line(error)}): fetch or save the model again.") from error
    if missing := [name for name in named if name not in source.files]:
        lacks = f"{len(missing)} of {len(named)} files with weights (such as {missing[0]})"
        raise source.lacking(lacks, UsageError(f"{source.name!r} lacks {lacks}: fetch them."))
    return [index.parent / name for name in named]


def _check_file(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS))
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}): check its permissions.") from error
    if start == LFS.encode():
        raise UsageError(f"{file} is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`.")
    if not start:
        raise UsageError(f"{file} is empty: fetch or save the model again.")
    if file.suffix == ".bin" and not is_zipfile(file) and not start.startswith(PICKLE):
        raise UsageError(f"{file} is broken or cut off (it is no archive of torch): fetch or save the model again.")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt"):  # reads the header and compares it with the length of the file
                pass
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file} is broken or cut off ({first_line(error)}): fetch or save the model again.") from error


def load_weights(auto: Any, source: Source, device: str, device_map: str | None = None, **extra: Any) -> Any:
    """The model, with every tensor from the files.

    Args:
        auto: a class of transformers with `from_pretrained`.
        source: where the weights are.
        device: where the model goes.
        device_map: how accelerate spreads the model over devices instead, for example "auto".
        extra: further keyword arguments of `from_pretrained`.

    Raises:
        UsageError: tensors are missing, left over, or of another shape than the config says, or the device is too small.
    """
    import torch

    options = {"dtype": "auto", "output_loading_info": True, "ignore_mismatched_sizes": True, **source.options, **extra}
    if device_map is not None:
        options["device_map"] = device_map
    model, found = source.load("model", lambda: auto.from_pretrained(source.place, **options))
    _check_whole(source.name, found)
    if device_map is not None:
        return model.eval()
    try:
        return model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{source.name!r} does not fit into the memory of {device}: take a smaller model or another device."
        ) from error


def _check_whole(name: str, found: dict[str, Any]) -> None:
    """Refuse what `from_pretrained` (with `output_loading_info`) could not match."""
    if differing := sorted(found["mismatched_keys"]):
        tensor, stored, wanted = differing[0]
        raise UsageError(
            f"the weights of {name!r} do not fit its config.json: {len(differing)} tensors have another shape (such as "
            f"{tensor}: {list(stored)}, by the config {list(wanted)}); fetch the config.json that belongs to these weights."
        )
    if unused := sorted(found["unexpected_keys"]):  # without those that the model's class ignores on purpose
        raise UsageError(
            f"the weights of {name!r} hold {len(unused)} tensors that its config.json has no place for (such as "
            f"{unused[0]}); the model would run without them: fetch the config.json that belongs to these weights."
        )
    if absent := sorted(found["missing_keys"]):
        raise UsageError(
            f"the weights of {name!r} lack {len(absent)} of the model's tensors (such as {absent[0]}); they would be "
            "random numbers: fetch or save the model again."
        )
