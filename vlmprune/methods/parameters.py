"""A method's parameter: its default and what it may be, as data. It is checked, and `vlmprune methods NAME` prints it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any

ALLOWED = "allowed"
"""Key of a field's metadata."""


@dataclass(frozen=True)
class Range:
    """A number in [low, high]; `whole` ones only, if it says so."""

    low: float
    high: float = inf
    whole: bool = False

    def __str__(self) -> str:
        if self.high == inf:
            return "any" if self.low == -inf else f"≥ {self.low:g}"
        return f"{self.low:g} to {self.high:g}"


def number(default: float | None, low: float = -inf, high: float = inf, whole: bool = False) -> Any:
    """A field for a number in [low, high]; where the default is None, None is allowed as well."""
    return field(default=default, metadata={ALLOWED: Range(low, high, whole)})


def choice(default: Any, *others: Any) -> Any:
    """A field for one of a few values."""
    return field(default=default, metadata={ALLOWED: (default, *others)})


def limited(method: Any) -> Iterator[tuple[str, Range | tuple[Any, ...]]]:
    """Names of a method's parameters that have limits and a value, with the limits."""
    for parameter in fields(method):
        allowed = parameter.metadata.get(ALLOWED)
        if allowed is not None and not (parameter.default is None and getattr(method, parameter.name) is None):
            yield parameter.name, allowed
