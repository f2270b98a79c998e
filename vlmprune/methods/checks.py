"""Checks of methods that users write: of the class when a method is made, of its numbers when it returns them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import UsageError, shown, unknown


def check_class(method: type, *wanted: tuple[str, type, str]) -> None:
    """Refuse a method whose class lacks an attribute. `wanted`: names of class attributes, their types, and examples.

    Raises:
        UsageError: names the attribute and shows an example.
    """
    for attribute, kind, example in wanted:
        if not isinstance(found := getattr(method, attribute, None), kind):
            said = f"found {shown(found)}" if hasattr(method, attribute) else "it has none"
            raise UsageError(
                f"the method {method.__name__} needs a class attribute {attribute} ({kind.__name__}), {said}: write "
                f"{attribute} = {example}."
            )


def check_renamed(method: type, renamed: Mapping[str, str]) -> None:
    """Refuse a class that defines something under a name of earlier versions. `renamed`: new names by old ones.

    Raises:
        UsageError: says the new name.
    """
    for old, new in renamed.items():
        if hasattr(method, old):
            raise UsageError(f"the method {method.__name__} defines {old}, which is called {new} now: rename it.")


def check_needs(method: str, needs: Any, known: Iterable[str]) -> None:
    """Refuse probes that do not exist.

    Raises:
        UsageError: names the nearest.
    """
    if not isinstance(needs, set | frozenset):
        raise UsageError(
            f"{method}: needs must be a set of probes, for example frozenset({{'features'}}), found {shown(needs)}."
        )
    for probe in sorted(needs - set(known), key=str):
        raise unknown(f"probe among the needs of {method}", probe, known)


def check_numbers(what: str, found: Any, shape: tuple[int, ...], infinite: bool = True) -> None:
    """Refuse anything but a tensor of numbers. It does not wait for a GPU: there, NaN fails as an assertion on the device.

    Args:
        what: subject of the sentence.
        found: what a function returned.
        shape: the expected shape, `[image, visual]`.
        infinite: whether ±∞ are allowed.

    Raises:
        UsageError: no tensor, another shape, complex numbers, or NaN.
    """
    wanted = f"a tensor [image, visual] of shape {list(shape)}"
    if not isinstance(found, Tensor):
        raise UsageError(f"{what} must return {wanted}, found {shown(found)}.")
    if tuple(found.shape) != shape:
        raise UsageError(f"{what} must return {wanted}, found shape {list(found.shape)}.")
    if found.is_complex():
        raise UsageError(f"{what} must return {wanted} of real numbers, found {found.dtype}: they have no order.")
    good = ~found.isnan().any() if infinite else found.isfinite().all()
    bad = f"{what} returned {'NaN' if infinite else 'NaN or infinity'} for a token, which cannot be ranked"
    if found.device.type == "cuda":
        torch._assert_async(good, bad)
    elif found.device.type == "cpu" and not bool(good):
        raise UsageError(f"{bad}: look at its numbers, and at those of the model (float16 overflows; bfloat16 does not).")
