"""One argument chooses an implementation; nothing falls back in silence.

impl           CPU tensors                                    CUDA tensors
"reference"    torch                                          torch
"auto"         torch, also in the interpreter (*)             the kernel; torch for float64: kernels compute in fp32
"triton"       the kernel, in Triton's interpreter, if        the kernel
               TRITON_INTERPRET=1 (for tests); else refused

(*) Where an op has a `cpu.py`, that one: torch too, the same result, faster than the equation.

Unsupported arguments are refused by name. Checks read shapes, dtypes and devices only: a GPU never waits.
What has passed them once is not checked again in every layer (`Checked`).
Kernels have no gradients: what an op returns from one is detached, unless the op's docstring says otherwise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from vlmprune.errors import UsageError, unknown

P = ParamSpec("P")
R = TypeVar("R")

Impl = Literal["auto", "reference", "triton"]
IMPLEMENTATIONS = ("auto", "reference", "triton")

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of numbers that kernels compute with, in fp32."""

MOST_DIM = 256
"""Largest head size of the kernels: a tile of wider keys does not fit the shared memory of an SM."""


@dataclass(frozen=True)
class Cost:
    """What an op must do at least, whatever the implementation: what a roofline is drawn with.

    Attributes:
        bytes_moved: every input read once and every output written once, in bytes.
        flops: multiplications and additions; an exponential counts as one.
    """

    bytes_moved: int
    flops: int


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of all elements of these tensors; an expanded axis counts as often as it is read from memory: once."""
    total = 0
    for x in tensors:
        if x is not None:
            total += x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return total


def use_triton(op: str, impl: Impl, any_dtype: bool = False, **tensors: Tensor | None) -> bool:
    """Whether an op shall run its Triton kernel, by the table at the top of this file.

    Args:
        op: the op's name, for messages.
        impl: "auto", "reference" or "triton".
        any_dtype: the op moves numbers and computes nothing.
        tensors: the op's tensor arguments by name.

    Raises:
        UsageError: an unknown implementation; tensors on several devices; a kernel is asked for and cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise unknown("impl", str(impl), IMPLEMENTATIONS)
    first, device, double = "", torch.device("cpu"), None
    for name, x in tensors.items():
        if x is None:
            continue
        if not first:
            first, device = name, x.device
        if x.device != device:
            raise UsageError(f"{op}: {name} is on {x.device} but {first} on {device}: move them to one device.")
        if not any_dtype and double is None and x.dtype == torch.float64:
            double = name
    if impl == "reference" or (impl == "auto" and (device.type != "cuda" or double)):
        return False
    if double:
        raise UsageError(f"{op}: {double} is float64 but kernels compute in fp32: pass impl='reference'.")
    for name, x in tensors.items():
        if not any_dtype and x is not None and x.is_floating_point() and x.dtype not in KERNEL_DTYPES:
            raise UsageError(f"{op}: {name} is {x.dtype} but kernels take float16, bfloat16 and float32: convert it.")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda" and interpreted:
        raise UsageError(f"{op}: {first} is on {device} but TRITON_INTERPRET=1, which is for CPU tensors in tests: unset it.")
    if device.type != "cuda" and not interpreted:
        raise UsageError(f"{op}: impl='triton' needs CUDA tensors, but {first} is on {device}: pass impl='reference'.")
    if not _has_triton():
        raise UsageError(f"{op} on {device} needs Triton: pip install 'vlmprune[kernels]', or pass impl='reference'.")
    return True


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class Checked:
    """An op's checks, made once for each kind of arguments.

    A kind is all that checks read: the shape, dtype and device of every tensor, or that it is None, the implementation, and
    whether gradients are needed. Arguments of one kind all pass or all fail, and what was refused is refused again. Threads
    may share one of these.

    Args:
        op: the op's name, for messages.
        choose: makes the checks, `(op, impl, gradients, *tensors)`; says whether to run the kernel, as `use_triton` does.
    """

    MOST = 512
    """Kinds that are remembered, before all are forgotten. Decoding has a new one for every token: its keys are one more."""

    def __init__(self, op: str, choose: Callable[..., bool]) -> None:
        self._op, self._choose = op, choose
        # False: torch computes. Else the kernel does, and this is the variable that it depends on.
        self._passed: dict[tuple[Any, ...], bool | str] = {}

    def __call__(self, impl: Impl, gradients: bool, *tensors: Tensor | None) -> bool:
        """Whether to run the kernel for these arguments.

        Raises:
            UsageError: what the op's checks refuse.
        """
        # One Python call and no more, for this runs in every layer for every token.
        facts: list[Any] = [impl, gradients]
        for x in tensors:
            facts.append(None if x is None else (x.shape, x.dtype, x.device))
        kind = tuple(facts)
        try:
            passed = self._passed.get(kind)
        except TypeError:  # sizes of a graph that is being traced are symbols, which have no hash
            return self._choose(self._op, impl, gradients, *tensors)
        if passed is False:
            return False
        variable = os.environ.get("TRITON_INTERPRET", "")
        if passed != variable:
            passed = variable if self._choose(self._op, impl, gradients, *tensors) else False
            if len(self._passed) >= self.MOST:
                self._passed.clear()
            self._passed[kind] = passed
        return passed is not False


def check(op: str, name: str, x: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> None:
    """Refuse a tensor that does not fit.

    Args:
        op, name: of the op and of the argument, for the message.
        x: the argument.
        shape: wanted sizes; None where any will do.
        dtype: wanted dtype; None for any floating point.
    """
    fits = x.ndim == len(shape)
    if fits:
        for wanted, size in zip(shape, x.shape, strict=True):
            fits = fits and wanted in (None, size)
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise UsageError(f"{op}: {name} must have shape [{sizes}] here, found {list(x.shape)}.")
    if dtype is None and not x.is_floating_point():
        raise UsageError(f"{op}: {name} must be floating point, found {x.dtype}.")
    if dtype is not None and x.dtype != dtype:
        raise UsageError(f"{op}: {name} must be {dtype}, found {x.dtype}.")


def check_heads(op: str, query: Tensor, key: Tensor) -> None:
    """Refuse `query` and `key` `[batch, head, …]` whose numbers of heads, or dtypes, do not go together."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if not kv_heads or heads % kv_heads:
        raise UsageError(f"{op}: query has {heads} heads, which the {kv_heads} heads of key must divide.")
    if query.dtype != key.dtype:
        raise UsageError(f"{op}: key is {key.dtype} but query {query.dtype}: convert one of them.")


def check_dim(op: str, name: str, dim: int) -> None:
    """Refuse a head size that no kernel has."""
    if not 1 <= dim <= MOST_DIM:
        raise UsageError(f"{op}: {name} has head size {dim} but kernels take 1 to {MOST_DIM}: pass impl='reference'.")


def wide(x: Tensor) -> torch.dtype:
    """The dtype a reference computes in: fp32, and fp64 for fp64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def in_fp32(op: Callable[P, R]) -> Callable[P, R]:
    """Let an op compute in the precision it asks for, also inside `torch.autocast`, which would undo its `.float()`."""

    @wraps(op)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, Tensor):
                device = arg.device.type
                break
        if not torch.is_autocast_enabled(device):
            return op(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return precise
