"""How close a kernel must be to its reference, derived and not tuned.

    max |kernel − exact|  ≤  2 · max |torch − exact|  +  roundings · 2⁻²⁴ · max |exact|

`exact` is the reference in fp64 on the very same numbers, `torch` the reference in the precision of the inputs (it computes in
fp32). Both compute the same sums in fp32, in another order, so that their errors are draws from one distribution; twice the
largest of torch's leaves room for the largest of ours.

The second term is there for torch's luck: with one key, or in one block, torch can be exact where a kernel cannot. A kernel
rounds a result at most ROUNDINGS times more often than torch: the exponential of a block's maximum less the row's, its product
with the block's sum, the exponential itself (2 units in the last place on a GPU), the division, each half a unit 2⁻²⁴ or one
unit 2⁻²³ of a number no larger than the largest result: 1 + 1 + 4 + 2 = 8. For a sum of many results it is their largest sum.

Where results are exponentials of dot products, an error of a score s is a relative error of the result. A dot product over d
numbers rounds d times, each time a partial sum of at most the size of s by at most 2⁻²⁴ |s|: a random walk whose steps grow
from 0 to that has a standard deviation of √(d / 6) · 2⁻²⁴ |s|, and 2½ of them are √d · 2⁻²⁴ |s|. Torch's CPU library adds in up
to 16 lanes, which divides its error by up to 4 and makes twice of it less than one honest chain: `of_dots` adds that chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ROUNDINGS = 8


def doubled(argument: Any) -> Any:
    """The same numbers in fp64; all that is no floating point tensor as it is."""
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def of_dots(dim: int, largest: float) -> float:
    """Roundings of exponentials of dot products over `dim` numbers whose size, after scaling, is up to `largest`."""
    return ROUNDINGS + dim**0.5 * largest


def assert_within_rule(
    kernel: Callable[..., Any], reference: Callable[..., Any], *arguments: Any, roundings: float = ROUNDINGS
) -> None:
    """Compare every tensor that `kernel(*arguments)` returns with `reference(*arguments)`, by the rule above."""
    tensors = [_tensors(found) for found in (kernel(*arguments), reference(*arguments), reference(*map(doubled, arguments)))]
    assert len({len(found) for found in tensors}) == 1
    for ours, torchs, exact in zip(*tensors, strict=True):
        assert exact.dtype == torch.float64
        assert (ours.dtype, ours.shape) == (torchs.dtype, torchs.shape)
        assert not ours.isnan().any(), f"{int(ours.isnan().sum())} of {ours.numel()} numbers were not written, or poisoned"
        allowed = 2 * _distance(torchs, exact) + roundings * 2**-24 * float(exact.abs().max())
        assert _distance(ours, exact) <= allowed, f"off by {_distance(ours, exact):.3g}, allowed {allowed:.3g}"


def _tensors(found: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).abs().max())


def among_nan(x: Tensor, margin: int = 3) -> Tensor:
    """The same numbers in the middle of a larger buffer full of NaN (True, for bool), so that a read beside them shows.

    Strides are odd, and nothing is aligned.
    """
    larger = torch.full([size + 2 * margin for size in x.shape], torch.nan if x.is_floating_point() else True, dtype=x.dtype)
    inner = larger[tuple(slice(margin, margin + size) for size in x.shape)]
    return inner.copy_(x)
