"""The one exception a user can cause: every message says what was wrong, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar


class UsageError(ValueError):
    """Something asked for that cannot be done. The command line prints its sentence and exits with 2."""


class Renamed:
    """A base for classes with attributes that users' code reads, and that had other names in earlier versions.

    Raises:
        AttributeError: a former name is read; says the new one.
    """

    _former: ClassVar[Mapping[str, str]] = {}
    """New names of attributes, by their former ones."""

    if not TYPE_CHECKING:  # type checkers report a former name as any other that does not exist

        def __getattr__(self, name: str) -> Any:
            now = f": it is called {self._former[name]} now" if name in self._former else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{now}", name=name, obj=self)


def shown(value: object) -> str:
    """A wrong value in one line of a sentence."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "…"


def unknown(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """The error for a name that does not exist, with the nearest that do."""
    name, known = str(name), sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(known) or 'none'}."
    return UsageError(f"unknown {kind} {name!r}: {hint}")


def first_line(error: BaseException) -> str:
    """The start of what an exception says, as a part of a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
