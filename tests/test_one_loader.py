"""One place loads models, prompts and pictures: `vlmprune/loading`, with its checks and its sentences."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vlmprune

ROOT = Path(vlmprune.__file__).resolve().parent.parent
LOADERS = ("vlmprune/loading", "vlmprune/tiny")  # the embedded model comes with the package, and needs no checks


def loads(tree: ast.AST) -> list[str]:
    """Calls that load: `….from_pretrained(…)` of anything but a recipe, `Image.open(…)`, `load_image(…)`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            owner, _, name = called.rpartition(".")
            if (
                (name == "from_pretrained" and owner.split(".")[-1] != "Recipe")
                or called == "Image.open"
                or name == "load_image"
            ):
                found.append(f"line {node.lineno}: {called}")
    return found


def test_nothing_else_loads():
    """Red: a command or a benchmark loads a model or a picture by itself, and answers a mistake with a traceback."""
    files = [path for folder in ("vlmprune", "evals", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    wrong = {
        str(path.relative_to(ROOT)): calls
        for path in files
        if not str(path.relative_to(ROOT)).startswith(LOADERS) and (calls := loads(ast.parse(path.read_text())))
    }
    assert not wrong, wrong


@pytest.mark.parametrize("folder", LOADERS)
def test_the_loaders_are_seen(folder):
    """Red: the search above finds nothing, wherever it looks."""
    assert any(loads(ast.parse(path.read_text())) for path in (ROOT / folder).rglob("*.py"))
