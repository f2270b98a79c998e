"""A kernel that must spill, for test_compiled.py: one warp holds three 64×64 matrices of fp32, 384 numbers a thread."""

from __future__ import annotations

import sys

import triton
import triton.language as tl

from vlmprune.kernels.compile import report
from vlmprune.kernels.variants import Variant


@triton.jit
def _product(left, right, out, SIZE: tl.constexpr):  # noqa: N803
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(left + at), tl.load(right + at), input_precision="ieee"))


if __name__ == "__main__":
    names = ("left", "right", "out")
    variant = Variant("spilling", "on purpose", _product, dict.fromkeys(names, "*fp32"), {"SIZE": 64}, names, 1, 1)
    sys.exit(report([variant], None))
