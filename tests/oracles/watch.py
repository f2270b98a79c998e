"""Every operation of a run, seen by torch's dispatcher: how large what it makes is, and whatever a test asks of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Context manager: watches all operations inside. Not in inference mode, which hides what operations are made of.

    Args:
        look: called with each operation's function, arguments and result; it may raise.

    Attributes:
        numbers: the largest storage that an operation made, in numbers.
        by: the operation that made it, with the shape.
        attention: how often scaled-dot-product attention ran.
    """

    def __init__(self, look: Callable[..., None] | None = None) -> None:
        super().__init__()
        self.numbers, self.by, self.attention, self._look = 0, "", 0, look

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.attention += "scaled_dot_product" in str(function)
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and (numbers := x.untyped_storage().nbytes() // x.element_size()) > self.numbers:
                self.numbers, self.by = numbers, f"{function} {list(x.shape)}"
        if self._look is not None:
            self._look(function, args, kwargs, out)
        return out
