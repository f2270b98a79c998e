"""Kernels run in Triton's interpreter here, on CPU tensors, and find NaN wherever they must not look."""

from __future__ import annotations

import os

# Triton reads this when a kernel is decorated. Nothing else in the test suite notices: "auto" takes no kernel on a CPU.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns unless this is said; it is the default

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

POISON = {torch.bool: True, torch.uint8: 255}


def poison(x: Tensor) -> Tensor:
    """Filled with NaN, or with a number that is wrong anywhere."""
    return x.fill_(torch.nan if x.is_floating_point() else POISON.get(x.dtype, -123456789 % 127))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN: a kernel must write every element that it hands out or reads again."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *args, **kwargs: poison(new_empty(self, *args, **kwargs)))


@pytest.fixture
def specialised(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[Any]]:
    """For every kernel started, and not run, what Triton would compile it for: of each set one member is compiled.

    That is the values of constants, which launchers pass by name; of numbers, whether they are 1 or multiples of 16, unless
    the kernel says not to; of tensors, the dtype and whether their address is a multiple of 16.
    """
    from triton.runtime.interpreter import InterpretedFunction

    found: dict[str, set[Any]] = defaultdict(set)

    def kind(kernel: Any, name: str, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return argument.dtype, argument.data_ptr() % 16 == 0
        if isinstance(argument, float) or name in (kernel.kwargs["do_not_specialize"] or ()):
            return type(argument)
        return argument == 1, argument % 16 == 0

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        numbers = [(name, kind(kernel, name, x)) for name, x in zip(kernel.arg_names, args, strict=False)]
        found[kernel.__name__].add((*numbers, *sorted(constants.items())))

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return found
