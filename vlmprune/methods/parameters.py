"""A method's parameter, as data: its default, and what it may be. `vlmprune methods NAME` prints it; other values are refused.

In the class of a method:

    alpha: float = number(0.5, low=0, high=1)
    tokens: int | None = number(None, low=0, whole=True)
    distance: Literal["l2", "l2sq"] = choice("l2", "l2sq")
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import inf
from typing import Any

from vlmprune.errors import UsageError, shown, unknown
from vlmprune.schedule import plain

ALLOWED = "allowed"
"""Key of a field's metadata."""


@dataclass(frozen=True)
class Range:
    """A number in [low, high]; `whole`: without a fraction; `below`: high itself is not allowed."""

    low: float = -inf
    high: float = inf
    whole: bool = False
    below: bool = False

    def __str__(self) -> str:
        if self.low == -inf:
            return "any" if self.high == inf else f"{'<' if self.below else '≤'} {self.high:g}"
        return f"≥ {self.low:g}" if self.high == inf else f"{self.low:g} to {'below ' if self.below else ''}{self.high:g}"

    @property
    def _where(self) -> str:
        """The same, as a part of a sentence."""
        if self.low > -inf and self.high < inf:
            return f" in [{self.low:g}, {self.high:g}{')' if self.below else ']'}"
        return "" if self == Range(whole=self.whole) else " " + str(self).replace("≥", ">=").replace("≤", "<=")

    def check(self, method: str, parameter: str, value: Any) -> None:
        """Refuse a value outside.

        Raises:
            UsageError: says the range and what was found.
        """
        kind = int if self.whole else (int, float)
        inside = not isinstance(value, bool) and isinstance(value, kind) and self.low <= value <= self.high
        if not inside or (self.below and value == self.high):
            what = "a whole number" if self.whole else "a number"
            raise UsageError(f"{method}: {parameter} must be {what}{self._where}, found {shown(value)}.")


class Choices(tuple[Any, ...]):
    """One of a few values."""

    __slots__ = ()

    def __str__(self) -> str:
        return ", ".join(map(str, self))

    def check(self, method: str, parameter: str, value: Any) -> None:
        """Refuse a value that is none of them.

        Raises:
            UsageError: names the nearest.
        """
        if not any(_kind(value) is _kind(one) and value == one for one in self):
            found = value if isinstance(value, str) else shown(value)
            raise unknown(f"value of {parameter} in {method}", found, map(str, self))


def _kind(value: Any) -> type:
    """Its type; one for all numbers."""
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


Limits = Range | Choices


def number(default: float | None, low: float = -inf, high: float = inf, whole: bool = False, below: bool = False) -> Any:
    """A field for a number in [low, high], or in [low, high) if `below`; a default of None allows None as well."""
    return field(default=default, metadata={ALLOWED: Range(low, high, whole, below)})


def choice(default: Any, *others: Any) -> Any:
    """A field for one of a few values; a default of None allows None as well."""
    return field(default=default, metadata={ALLOWED: Choices(one for one in (default, *others) if one is not None)})


def limits_of(method: Any, parameter: str) -> Limits | None:
    """What a parameter may be, of a method or its class; None if its class says nothing."""
    found: Limits | None = method.__dataclass_fields__[parameter].metadata.get(ALLOWED)
    return found


def settle(method: Any, **given: Any) -> None:
    """Store NumPy's numbers in a method's fields as Python's own, and refuse what lies outside the limits.

    Args:
        method: just made.
        given: parameters that are no fields (`InitVar`).

    Raises:
        UsageError: says the limits and what was found.
    """
    for parameter in fields(method):
        object.__setattr__(method, parameter.name, plain(getattr(method, parameter.name)))
    check(method, **{parameter.name: getattr(method, parameter.name) for parameter in fields(method)}, **given)


def check(method: Any, **values: Any) -> None:
    """Refuse values outside the limits of a method's parameters.

    Raises:
        UsageError: says the limits and what was found.
    """
    for parameter, value in values.items():
        limits, default = limits_of(method, parameter), method.__dataclass_fields__[parameter].default
        if limits is not None and not (value is None and default is None):
            limits.check(method.name, parameter, plain(value))
