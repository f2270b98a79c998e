"""Diverse subsets of the tokens of each picture: greedy max-min distance, and greedy determinants.

On a GPU both read the features once for each pick: `(keep + 1) · visual · dim` numbers and `2 · (keep + 1) · visual · dim`
FLOPs. Max-min needs `2 · visual² · dim` FLOPs more for its first pick, determinants `keep² · visual` for products of picks.
Roofline on an H200 for 320 of 2880 tokens in bf16: at width 4096 the first pick is 68 GFLOP, 0.07 ms at 989 TFLOP/s; a pick
reads 24 MB, 5 µs and for all 1.6 ms at 4.8 TB/s from memory. The goal of 1 ms needs those reads to come from the caches of the
multiprocessors (22 tokens, 0.18 MB each) instead. At width 1024 it is 17 GFLOP, 0.02 ms, and 5.9 MB, 1.2 µs a pick, 0.4 ms.
Each pick adds one exchange of words among all programs, 1 to 2 µs. This is not measured yet: we expect 0.5 to 1 ms at width
1024 and 1 to 2 ms at width 4096. Determinants take one launch for each pick, 5 to 10 µs on the host unless captured in a CUDA
graph.

On a CPU, "auto" is `cpu.py`: at most as long as one product of all pairs and a plain greedy loop on it, and most often half as
long (benchmarks/select_diverse.py); "reference" is the equation.
"""

from __future__ import annotations

from torch import Tensor

from vlmprune.errors import UsageError
from vlmprune.kernels.dispatch import Cost, Impl, bytes_of, check, use_triton
from vlmprune.kernels.select_diverse import cpu, reference

__all__ = ["cost", "determinant_order", "greedy_order", "select_diverse"]


def greedy_order(features: Tensor, keep: int, impl: Impl = "auto") -> Tensor:
    """`[image, keep]` in the order of selection, see `reference.greedy_order`. Indices carry no gradient.

    Raises:
        UsageError: features that are not `[image, visual, dim]`, more picks than tokens, or an implementation that cannot run.
    """
    return _greedy_order("greedy_order", features, keep, impl)


def select_diverse(features: Tensor, keep: int, impl: Impl = "auto") -> Tensor:
    """The same selected indices `[image, keep]`, rising."""
    return _greedy_order("select_diverse", features, keep, impl).sort(dim=-1).values


def determinant_order(features: Tensor, weight: Tensor, keep: int, impl: Impl = "auto") -> Tensor:
    """`[image, keep]` in the order of selection, see `reference.determinant_order`. Indices carry no gradient.

    Raises:
        UsageError: shapes that do not fit, more picks than tokens, or an implementation that cannot run.
    """
    _check("determinant_order", features, keep)
    check("determinant_order", "weight", weight, tuple(features.shape[:2]))
    if not use_triton("determinant_order", impl, features=features, weight=weight):
        return (cpu if impl == "auto" and features.is_cpu else reference).determinant_order(features, weight, keep)
    from vlmprune.kernels.select_diverse import kernel

    return kernel.determinant_order(features, weight, keep)


def cost(features: Tensor, keep: int) -> Cost:
    """The least work of `greedy_order`: features read and indices written once, all pairs, and the distances to every pick."""
    images, visual, dim = features.shape
    return Cost(bytes_of(features) + 8 * images * keep, 2 * images * visual * dim * (visual + keep))


def _greedy_order(op: str, features: Tensor, keep: int, impl: Impl) -> Tensor:
    _check(op, features, keep)
    if not use_triton(op, impl, features=features):
        return (cpu if impl == "auto" and features.is_cpu else reference).greedy_order(features, keep)
    from vlmprune.kernels.select_diverse import kernel

    return kernel.greedy_order(features, keep)


def _check(op: str, features: Tensor, keep: int) -> None:
    check(op, "features", features, (None, None, None))
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise UsageError(f"{op}: keep must be a whole number, found {keep!r}.")
    if not 0 <= keep <= features.shape[1]:
        raise UsageError(f"{op}: keep must be 0 to the {features.shape[1]} tokens of features, found {keep}.")
