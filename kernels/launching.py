"""What launchers share: the device of a launch, and strides from which the compiler derives the width of loads."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Run a launcher with the device of its tensors as the current one, on which Triton launches; on a CPU this does nothing.

    All tensors of an op are on one device: `dispatch.use_triton` has checked that.
    """

    @wraps(launcher)
    def there(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))):
            return launcher(*args, **kwargs)

    return there


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. It multiplies bfloat16 wrongly, so that operands are fp32 there."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def packed(x: Tensor) -> Tensor:
    """`x`, or a copy of it if its last axis is not contiguous."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def unit_of(*tensors: Tensor) -> int:
    """The number of elements, up to 16 bytes, that divides all strides: 8 for bf16 in most models.

    Triton itself recognises only multiples of 16 elements. A head size of 72 is none, and Triton would load two bytes
    at a time. A launcher therefore passes strides in units, and the kernel multiplies them by the unit, a constant.
    """
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    return math.gcd(16 // max(x.element_size() for x in tensors), *strides)


def in_units(x: Tensor, unit: int) -> list[int]:
    """Strides of all axes but the last, in units."""
    return [stride // unit for stride in x.stride()[:-1]]
