"""Recipe strings: `name:key=value,key=value + name:…`, several stages as `key=value|value`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from vlmprune.methods import Pruner, Redistributor
from vlmprune.names import check_not_empty, check_number, read_part
from vlmprune.recipe.entries import entry_of


def read(recipe: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a string, one for each method.

    Raises:
        UsageError: it is empty, or cannot be read.
    """
    check_not_empty(recipe)
    for part in recipe.split("+"):
        name, pairs = read_part(part.strip())
        values = {key: [_value(piece, key) for piece in pieces] for key, pieces in pairs.items()}
        yield {"method": name} | {key: given[0] if len(given) == 1 else given for key, given in values.items()}


def _value(text: str, key: str) -> int | float | str | bool:
    check_number(key, text)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(text, text)


def write(method: Pruner | Redistributor) -> str:
    """The string of a method: its stages, and the parameters that differ from their defaults."""
    defaults = {field.name: field.default for field in fields(method)}
    entry = entry_of(method)
    name = entry.pop("method")
    told = {key: value for key, value in entry.items() if key not in defaults or value != defaults[key]}
    pairs = [f"{key}={'|'.join(map(str, value)) if isinstance(value, list) else value}" for key, value in told.items()]
    return f"{name}:{','.join(pairs)}" if pairs else name
