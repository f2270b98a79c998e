"""Every kernel compiles for sm_80 and sm_90 without a GPU, spills nothing, and stands in the committed table."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlmprune
from kernels import spilling
from vlmprune.errors import UsageError
from vlmprune.kernels import compile as ahead
from vlmprune.kernels.compile import SHARED_LIMIT, Build, all_variants, markdown, report, widest_load
from vlmprune.kernels.variants import Variant

ROOT = Path(vlmprune.__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "results" / "kernels.md"
VARIANT = Variant("op", "case", None, {}, {}, (), 4, 2)


def compiled(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")][1:]


pytestmark = pytest.mark.xdist_group("compiled")  # one process makes what they look at


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> list[list[str]]:
    """Rows of the table, compiled now."""
    out = tmp_path_factory.mktemp("compiled") / "kernels.md"
    run = compiled("-m", "vlmprune.kernels.compile", "--out", out)
    assert run.returncode == 0, run.stderr
    return cells(out.read_text())


def test_nothing_spills_and_shared_memory_suffices(fresh):
    """The command's exit code says so; here is what it looked at."""
    assert len(fresh) == 2 * len(all_variants())
    for _, case, target, _, _, registers, spill, stack, shared in fresh:
        assert 0 < int(registers) <= 255, case
        assert (spill, stack) == ("0", "0"), case
        assert int(shared.replace(",", "")) <= SHARED_LIMIT[int(target.removeprefix("sm_"))], case


def test_loads_are_as_wide_as_they_can_be(fresh):
    """16 bytes, also for head sizes of 72 and 80, which Triton alone would load two bytes at a time."""
    looked = 0
    for op, case, _, _, load, *_ in fresh:
        if op == "attention_mass" or (op == "flow_score" and case.startswith("read")) or "16-byte loads" in case:
            looked += 1
            assert load == "16", case
    assert looked > 50


def test_the_committed_table_is_of_these_kernels():
    """Same ops, cases, targets and warps; figures may change with the compiler."""
    expected = [[v.op, v.case, f"sm_{target}", str(v.num_warps)] for v in all_variants() for target in SHARED_LIMIT]
    found = [row[:4] for row in cells(TABLE.read_text())]
    assert found == expected, f"write it anew: {ahead.COMMAND}"
    assert len({(v.op, v.case) for v in all_variants()}) == len(all_variants())


def test_every_kernel_is_compiled():
    """Whatever a launcher starts as `kernel[grid](…)` has a variant; nothing is tuned among configurations nobody compiled."""
    started = set()
    for path in sorted((ROOT / "kernels").glob("*/kernel.py")):
        tree = ast.parse(path.read_text())
        calls = [
            node.func.value for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        ]
        started |= {(path.parent.name, name.id) for name in calls if isinstance(name, ast.Name)}
        assert "autotune" not in path.read_text(), path
    assert len(started) > 5
    assert started <= {(v.op, v.kernel.__name__) for v in all_variants()}


def test_a_spill_is_an_error():
    """The guard sees a kernel that spills."""
    run = compiled(spilling.__file__)
    assert run.returncode == 1, run.stderr
    assert "spilling, on purpose, sm_80: spills" in run.stderr
    assert "spilling, on purpose, sm_90: spills" in run.stderr


def test_what_a_problem_is():
    assert Build(VARIANT, 80, 16, 255, 0, 0, 163 * 1024).problem is None
    assert Build(VARIANT, 90, 16, 255, 0, 0, 227 * 1024).problem is None
    assert Build(VARIANT, 80, 16, 255, 0, 0, 163 * 1024 + 1).problem == "wants 166913 bytes of shared memory of 166912"
    assert Build(VARIANT, 90, 16, 255, 4, 0, 0).problem == "spills 4 bytes, with 0 bytes of stack"
    assert Build(VARIANT, 90, 16, 255, 0, 8, 0).problem == "spills 0 bytes, with 8 bytes of stack"


def test_widest_load():
    assert widest_load("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd16 + 0 ];") == 16
    assert widest_load("ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 ];\nld.global.b64 %rd1, [ %rd2 + 0 ];") == 8
    assert widest_load("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r3;\nld.global.b8 %r1, [ %rd1 ];") == 4
    assert widest_load("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r3;") == 16
    assert widest_load("st.global.v4.b32 [ %rd1 ], { %r1, %r2, %r3, %r4 };") == 0


def test_report(monkeypatch, tmp_path, capsys):
    """Writes the table also if something is wrong, names what, and refuses interpreted kernels."""
    monkeypatch.setattr(ahead, "build", lambda variant, target: Build(variant, target, 16, 40, 8 * (target == 90), 0, 1024))
    with pytest.raises(UsageError, match="unset TRITON_INTERPRET"):
        report([VARIANT], None)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert report([VARIANT], tmp_path / "table.md") == 1
    assert capsys.readouterr().err == "op, case, sm_90: spills 8 bytes, with 0 bytes of stack\n"
    rows = [
        ["op", "case", "sm_80", "4", "16", "40", "0", "0", "1,024"],
        ["op", "case", "sm_90", "4", "16", "40", "8", "0", "1,024"],
    ]
    assert cells((tmp_path / "table.md").read_text()) == rows
    assert (tmp_path / "table.md").read_text() == markdown([ahead.build(VARIANT, 80), ahead.build(VARIANT, 90)])


def test_main(monkeypatch, capsys):
    """--op picks one op's variants; without --out the table is printed."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(ahead, "build", lambda variant, target: Build(variant, target, 16, 40, 0, 0, 1024))
    monkeypatch.setattr(sys, "argv", ["compile", "--op", "flow_score"])
    assert ahead.main() == 0
    assert {row[0] for row in cells(capsys.readouterr().out)} == {"flow_score"}
    monkeypatch.setattr(sys, "argv", ["compile", "--op", "flow_scores"])
    with pytest.raises(UsageError, match="unknown op 'flow_scores': did you mean 'flow_score'"):
        ahead.main()
