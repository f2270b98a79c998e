"""One argument chooses an implementation; nothing falls back in silence."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from vlmprune.errors import UsageError, unknown

P = ParamSpec("P")
R = TypeVar("R")

Impl = Literal["auto", "reference", "triton"]
IMPLEMENTATIONS = ("auto", "reference", "triton")


def use_triton(op: str, impl: Impl) -> bool:
    """Whether an op shall run its Triton kernel; there is none yet, so that "auto" is the torch reference everywhere.

    Raises:
        UsageError: an unknown implementation, or one that does not exist for this op.
    """
    if impl not in IMPLEMENTATIONS:
        raise unknown("impl", str(impl), IMPLEMENTATIONS)
    if impl == "triton":
        raise UsageError(f"{op} has no Triton kernel yet: pass impl='auto' or impl='reference'.")
    return False


def in_fp32(op: Callable[P, R]) -> Callable[P, R]:
    """Let an op compute in the precision it asks for, also inside `torch.autocast`, which would undo its `.float()`."""

    @wraps(op)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return precise
