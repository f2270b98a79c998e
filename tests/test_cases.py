"""Every method has a row in `cases.py`, and a comparison with loops written from its paper."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from cases import PRUNING, REDISTRIBUTION

import vlmprune as vp

HERE = Path(__file__).parent
NO_FORMULA = {"random"}
"""It computes nothing that loops could compute anew: what it promises is tested in its file."""


def test_every_method_has_one_row():
    """Red: a method was exported without a row, or has two."""
    assert sorted(row.name for row in PRUNING) == sorted(vp.METHODS)
    assert sorted(row.name for row in REDISTRIBUTION) == sorted(vp.REDISTRIBUTORS)
    for row in PRUNING:
        assert {type(form.method) for form in row.views.values()} == {vp.METHODS[row.name]}


@pytest.mark.parametrize("folder", ["methods", "redistribution"])
def test_every_method_has_loops_and_is_compared_with_them(folder):
    """Red: a method without `<folder>/loops/<name>.py`, or whose `test_<name>.py` does not use them."""
    for row in PRUNING if folder == "methods" else REDISTRIBUTION:
        tests = HERE / folder / f"test_{row.name}.py"
        assert tests.exists(), f"{row.name} has no {tests.relative_to(HERE)}"
        loops = HERE / folder / "loops" / f"{row.name}.py"
        if row.name in NO_FORMULA:
            assert not loops.exists(), f"{row.name} has loops now: take it out of NO_FORMULA"
            continue
        assert loops.exists(), f"{row.name} has no {loops.relative_to(HERE)}"
        imported = {
            node.module for node in ast.walk(ast.parse(tests.read_text())) if isinstance(node, ast.ImportFrom) and node.module
        }
        assert f"{folder}.loops.{row.name}" in imported, f"{tests.name} does not import the loops"


def test_tests_import_no_tests():
    """Red: what several files share stands in one of the tests."""
    for file in HERE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found = [name for name in names if any(part.startswith("test_") for part in name.split("."))]
            assert not found, f"{file.relative_to(HERE)} imports {found[0]}"
