"""The kernels that are compiled ahead of time, to count registers and spills without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One kernel with one choice of dtypes, sizes and options, as its launcher would start it.

    Attributes:
        op: the op, as in `kernels/<op>`.
        case: kernel, dtype and sizes, for people: one line of the table.
        kernel: the `@triton.jit` function.
        signature: type of every parameter that is no constant: "*bf16", "i32", "i64", "fp32".
        constants: values of `tl.constexpr` parameters, and of strides that are 1.
        aligned: parameters that are multiples of 16: pointers in bytes, numbers as they are.
        num_warps: warps of one program.
        num_stages: depth of the software pipeline.
    """

    op: str
    case: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
