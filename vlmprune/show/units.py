"""Quantities for people: at most four digits, and the unit in which the number is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

BYTES = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))
FLOPS = (("PFLOPs", 1e15), ("TFLOPs", 1e12), ("GFLOPs", 1e9), ("MFLOPs", 1e6), ("FLOPs", 1))
MILLISECONDS = (("min", 60e3), ("s", 1e3), ("ms", 1), ("µs", 1e-3))


def size(count: float) -> str:
    """A number of bytes: "1.5 MiB"."""
    return _with_unit(count, BYTES)


def operations(count: float) -> str:
    """A number of floating-point operations: "8.82 TFLOPs"."""
    return _with_unit(count, FLOPS)


def duration(ms: float) -> str:
    """A time, given in milliseconds: "1.2 s"."""
    return _with_unit(ms, MILLISECONDS)


def share(part: float, whole: float, form: Callable[[float], str]) -> str:
    """A part of a whole: "2 GiB of 4 GiB (50.0%)". `form` is one of the functions above."""
    text = f"{form(part)} of {form(whole)}"
    return f"{text} ({part / whole:.1%})" if whole else text


def spans(layers: Sequence[int]) -> str:
    """Layers in rising order; consecutive ones are joined: "2–10, 12"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def plain(value: Any) -> Any:
    """Nested data with lists in place of tuples, so that it equals what a JSON file of it gives back."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def _with_unit(value: float, units: tuple[tuple[str, float], ...]) -> str:
    # The largest unit of which there is at least one: 1023.96 KiB is 1024 KiB, never 1.02e+03 KiB.
    name, one = next(((name, one) for name, one in units if abs(value) >= one), units[-1])
    number = value / one
    return f"{number:.0f} {name}" if abs(number) >= 999.5 or number == int(number) else f"{number:.3g} {name}"
