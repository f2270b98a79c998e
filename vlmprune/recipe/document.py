"""Recipe files: `{"schema": 1, "methods": [{"method": "fastv", "layer": 2, "fraction": 0.25}]}`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError, shown, unknown
from vlmprune.methods import Pruner, Redistributor
from vlmprune.names import FILE
from vlmprune.recipe import hub
from vlmprune.recipe.entries import class_named, entry_of

SCHEMA = 1
KEYS = ("schema", "methods")


def read(data: Any) -> list[Mapping[str, Any]]:
    """The JSON objects of a file's methods.

    Raises:
        UsageError: it has a newer schema, or is not of this form.
    """
    if not isinstance(data, Mapping) or not all(key in data for key in KEYS):
        raise UsageError('a recipe file holds {"schema": 1, "methods": […]}: a key is missing.')
    for key in data:
        if key not in KEYS:
            raise unknown("key in a recipe file", key, KEYS)
    if type(data["schema"]) is not int or not 1 <= data["schema"] <= SCHEMA:
        raise UsageError(
            f"the recipe has schema {data['schema']!r}, this vlmprune reads up to {SCHEMA}: upgrade vlmprune, or save the "
            "recipe with the older version."
        )
    if not isinstance(data["methods"], list) or not all(isinstance(entry, Mapping) for entry in data["methods"]):
        raise UsageError(f'"methods" must be a list of objects, found {shown(data["methods"])}.')
    return data["methods"]


def write(methods: Iterable[Pruner | Redistributor]) -> dict[str, Any]:
    """The content of a file.

    Raises:
        UsageError: a parameter is an object, a schedule mixes its units, or the name of a method is that of another one.
    """
    return {"schema": SCHEMA, "methods": [_entry(method) for method in methods]}


def _entry(method: Pruner | Redistributor) -> dict[str, Any]:
    if class_named(method.name) is not type(method):
        raise UsageError(
            f"a recipe file refers to methods by name, and {method.name!r} is the name of another method than "
            f"{type(method).__name__}: give the class a name of its own."
        )
    entry = entry_of(method)
    if "kept" in entry:
        raise UsageError(
            f"{method.name}: a recipe file cannot mix tokens and fraction in one method's schedule: use one for all stages."
        )
    for key in [field.name for field in fields(method) if field.name in entry]:
        if not isinstance(value := entry[key], int | float | str):
            raise UsageError(f"a recipe file cannot hold {key} of {method.name}, found {shown(value)}: set it in Python.")
    return entry


def load(source: str | Path) -> Any:
    """The content of a JSON file, of `vlmprune.json` in a folder, or of that file in a repository on the hub.

    Raises:
        UsageError: it is no name, there is no such file, or it is not JSON.
    """
    if not isinstance(source, str | PathLike):
        raise UsageError(
            f"a recipe is read from a JSON file, a folder or a hub id, found {shown(source)}: give its name as a string or a "
            "Path."
        )
    path = Path(source)
    if path.suffix == ".json" and not path.exists():
        raise UsageError(f"no recipe at {str(source)!r}: there is no such file.")
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        path = hub.download(str(source), FILE, "recipe")
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a JSON file ({error}): write it with Recipe.save_pretrained(folder).") from error
