"""Kernels run in Triton's interpreter here, on CPU tensors, and find NaN wherever they must not look."""

from __future__ import annotations

import os

# Triton reads this when a kernel is decorated. Nothing else in the test suite notices: "auto" takes no kernel on a CPU.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns unless this is said; it is the default

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
