"""What launchers of several ops share: the device to launch on, and numbers that tell the compiler how wide it may load."""

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
    """Let a launcher run with the device of its tensors as the current one, where Triton launches; on a CPU this does nothing.

    All tensors of an op are on one device: `dispatch.use_triton` has looked.
    """

    @wraps(launcher)
    def there(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))):
            return launcher(*args, **kwargs)

    return there


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which gets products of bfloat16 wrong: there, operands are fp32."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def packed(x: Tensor) -> Tensor:
    """`x`, or a copy of it if the numbers of its last axis do not stand side by side."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def unit_of(*tensors: Tensor) -> int:
    """Elements that all strides are multiples of, up to 16 bytes: 8 for bf16 in most models.

    Triton by itself only sees multiples of 16 elements, which a head size of 72 is not: it would load two bytes at a time. A
    launcher passes strides in units, and the kernel multiplies by the unit, a constant.
    """
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    return math.gcd(16 // max(x.element_size() for x in tensors), *strides)


def in_units(x: Tensor, unit: int) -> list[int]:
    """Strides of all axes but the last."""
    return [stride // unit for stride in x.stride()[:-1]]
