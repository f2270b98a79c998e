"""One argument chooses an implementation; nothing falls back in silence."""

from __future__ import annotations

from typing import Literal

from vlmprune.errors import UsageError, unknown

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
