"""Compile every kernel ahead of time, without a GPU, and write a table of the registers and memory that each uses.

    python -m vlmprune.kernels.compile --out docs/results/kernels.md

Each `kernels/<op>/kernel.py` lists its variants. A variant that spills registers to memory, or wants more shared memory than an
SM has, is a defect: exit code 1. This shows neither that a kernel is right nor how fast it is.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError, unknown
from vlmprune.kernels.variants import Variant
from vlmprune.show import table

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may have, by compute capability."""

COLUMNS = ("op", "case", "target", "warps", "widest load", "registers", "spill", "stack", "shared")
COMMAND = "python -m vlmprune.kernels.compile --out docs/results/kernels.md"


@dataclass(frozen=True)
class Build:
    """What one variant uses on one target.

    Attributes:
        variant, target: what was compiled, for compute capability `target`.
        load: bytes of one thread's widest load from global memory, of which 16 is the most.
        registers: of one thread.
        spilled: bytes of spill stores and spill loads of one thread.
        stack: bytes of one thread's stack.
        shared: bytes of shared memory of one program.
    """

    variant: Variant
    target: int
    load: int
    registers: int
    spilled: int
    stack: int
    shared: int

    @property
    def problem(self) -> str | None:
        """Why this build is a defect, or None."""
        if self.spilled or self.stack:
            return f"spills {self.spilled} bytes, with {self.stack} bytes of stack"
        if self.shared > SHARED_LIMIT[self.target]:
            return f"wants {self.shared} bytes of shared memory of {SHARED_LIMIT[self.target]}"
        return None


def all_variants() -> list[Variant]:
    """The variants of every op that has a kernel."""
    found: list[Variant] = []
    for path in sorted(Path(__file__).resolve().parent.glob("*/kernel.py")):
        found += import_module(f"vlmprune.kernels.{path.parent.name}.kernel").variants()
    return found


def build(variant: Variant, target: int) -> Build:  # pragma: no cover  (tested in a process without the interpreter)
    """Compile one variant for one target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    unknown = (variant.signature.keys() | variant.constants.keys()) ^ set(names)
    assert not unknown, f"{variant.case}: parameters {sorted(unknown)} are not both in the kernel and in the variant"
    source = ASTSource(
        variant.kernel,
        {name: "constexpr" if name in variant.constants else variant.signature[name] for name in names},
        {(names.index(name),): value for name, value in variant.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    ptx = compiled.asm["ptx"]
    return Build(variant, target, widest_load(ptx), *_assembled(ptx, target), compiled.metadata.shared)


def widest_load(ptx: str) -> int:
    """Bytes of one thread's widest load from global memory in a listing of PTX; 0 if it loads nothing."""
    direct = [int(count or 1) * int(bits) // 8 for count, bits in re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)]
    copied = [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], 0x([0-9a-f]+)", ptx)]
    return max(direct + copied, default=0)


def _assembled(ptx: str, target: int) -> tuple[int, int, int]:  # pragma: no cover  (as above)
    """Registers, bytes spilled and bytes of stack, from the output of the assembler that Triton itself uses.

    Triton discards this output and caches compiled kernels, so the assembler runs once more here.
    """
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(target).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={sm_arch_from_capability(target)}"]
        run = subprocess.run([*command, source, "-o", Path(folder, "cubin")], check=True, capture_output=True, text=True)
    said = run.stderr + run.stdout

    def numbers(pattern: str) -> list[int]:
        found = [int(number) for number in re.findall(pattern, said)]
        assert found, f"the assembler's output has nothing like {pattern!r}:\n{said}"
        return found

    spilled = sum(numbers(r"(\d+) bytes spill stores") + numbers(r"(\d+) bytes spill loads"))
    return max(numbers(r"Used (\d+) registers")), spilled, sum(numbers(r"(\d+) bytes stack frame"))


def markdown(builds: list[Build]) -> str:
    """The committed table."""
    import triton

    lines = [
        "# Compiled kernels",
        "",
        f"Written by `{COMMAND}` with Triton {triton.__version__};",
        "tests/kernels/test_compiled.py compares the cases. Widest load, spill, stack (bytes) and registers are one thread's,",
        "shared memory (bytes) is one program's. It shows that nothing spills, not how fast a kernel is.",
        "",
    ]
    rows = [
        [v.op, v.case, f"sm_{b.target}", *map(str, (v.num_warps, b.load, b.registers, b.spilled, b.stack)), f"{b.shared:,}"]
        for b, v in ((b, b.variant) for b in builds)
    ]
    return "\n".join([*lines, table.markdown(table.table(COLUMNS, rows, text_columns=3))]) + "\n"


def report(variants: list[Variant], out: Path | None) -> int:
    """Compile for every target, write the table, and print every defect.

    Returns:
        Exit code: 1 if any build has a problem.

    Raises:
        UsageError: in a process whose kernels are interpreted.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("kernels that are interpreted cannot be compiled: unset TRITON_INTERPRET.")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default; without it Triton 3.9 warns
    builds = [build(variant, target) for variant in variants for target in SHARED_LIMIT]
    if out is None:
        print(markdown(builds))
    else:
        out.write_text(markdown(builds))
    wrong = [b for b in builds if b.problem]
    for b in wrong:
        print(f"{b.variant.op}, {b.variant.case}, sm_{b.target}: {b.problem}", file=sys.stderr)
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time for sm_80 and sm_90.")
    parser.add_argument("--out", type=Path, help="where to write the table; printed if left out")
    parser.add_argument("--op", help="only this op")
    given = parser.parse_args()
    variants = all_variants()
    ops = {v.op for v in variants}
    if given.op not in (None, *ops):
        raise unknown("op", given.op, ops)
    return report([v for v in variants if given.op in (None, v.op)], given.out)


if __name__ == "__main__":
    sys.exit(main())
