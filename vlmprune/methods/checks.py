"""Checks of methods that users write: of the class when a method is made, of its numbers when it returns them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    _require(good, bad, lambda: ": look at its numbers, and at those of the model (float16 overflows; bfloat16 does not).")


def check_order(method: str, found: Any, index: Tensor) -> None:
    """Refuse an order of picks that does not hold the kept tokens, each once. It does not wait for a GPU.

    Args:
        method: name of the method.
        found: what `Pruner.order` returned.
        index: `[image, keep]` what the method kept.

    Raises:
        UsageError: no tensor of whole numbers, another shape, or other tokens.
    """
    what = f"{method}: order(see, keep)"
    _check_whole(what, "[image, keep]", found, tuple(index.shape))
    good = (found.long().sort(dim=1).values == index.to(found.device).sort(dim=1).values).all()

    def first() -> str:
        pairs = zip(found.tolist(), index.tolist(), strict=True)
        picture, mine, kept = next((n, mine, kept) for n, (mine, kept) in enumerate(pairs) if sorted(mine) != sorted(kept))
        return f", found {shown(mine)} instead of {shown(kept)} for picture {picture}."

    _require(good, f"{what} must return the tokens that select(see, keep) kept, each once", first)


def check_joined(method: str, found: Any, index: Tensor | Sequence[Tensor], visual: int) -> None:
    """Refuse a `Choice.joined` that is not as described there. It does not wait for a GPU.

    Args:
        method: name of the method.
        found: what its `select` returned.
        index: `[image, keep]`, or one tensor per picture: what it kept.
        visual: tokens that were there.

    Raises:
        UsageError: no tensor of whole numbers, another shape, or a token that is not merged into a kept one.
    """
    what = f"{method}: the joined of its Choice"
    _check_whole(what, "[image, visual]", found, (len(index), visual))
    joined = found.long()
    own = torch.arange(visual, device=joined.device)
    kept = torch.stack([torch.zeros_like(own, dtype=torch.bool).index_fill(0, row.to(own.device), True) for row in index])
    into = (joined >= 0) & (joined < visual) & kept.gather(1, joined.clamp(0, visual - 1))
    good = torch.where(kept, joined == own, into | (joined == -1))

    def first() -> str:
        picture, token = (~good).nonzero()[0].tolist()
        return f", found {int(joined[picture, token])} for token {token} of picture {picture}."

    wanted = "the kept token that each token was merged into, its own index if it was kept, and -1 if it was dropped"
    _require(good.all(), f"{what} must hold {wanted}", first)


def _check_whole(what: str, axes: str, found: Any, shape: tuple[int, ...]) -> None:
    """Refuse anything but a tensor of whole numbers of one shape."""
    wanted = f"{what} must be a tensor {axes} of shape {list(shape)}"
    if not isinstance(found, Tensor):
        raise UsageError(f"{wanted}, found {shown(found)}.")
    if tuple(found.shape) != shape:
        raise UsageError(f"{wanted}, found shape {list(found.shape)}.")
    if found.is_floating_point() or found.is_complex() or found.dtype is torch.bool:
        raise UsageError(f"{wanted} of whole numbers, found {found.dtype}.")


def _require(good: Tensor, bad: str, more: Callable[[], str]) -> None:
    """Refuse what is not good: on a GPU by an assertion on the device, for which the host does not wait.

    Args:
        good: one bool.
        bad: what is wrong.
        more: gives the rest of the sentence.
    """
    if good.device.type == "cuda":
        torch._assert_async(good, bad)
    elif good.device.type == "cpu" and not bool(good):
        raise UsageError(bad + more())
