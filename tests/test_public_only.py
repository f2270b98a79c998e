"""`evals/` and `benchmarks/` use the library as anyone else can: public names only, and no hooks of their own on a model."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmprune

ROOT = Path(vlmprune.__file__).resolve().parent.parent
FILES = sorted(path for folder in ("evals", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
PUBLIC = {"errors", "evals", "loading", "show", "tiny"}
"""Rooms that may be imported, beside the names that `import vlmprune` gives."""
EXCEPTIONS = {
    "evals/budgets.py": {"vlmprune.cost": "the report of a run and a budget average tokens by one formula"},
    "evals/horizon_groups.py": {
        "vlmprune.adapters.registry": "only a family knows which token of a picture is in which cell",
        "vlmprune.view": "the annotation of a method's argument",
    },
    "evals/lmms_columns.py": {
        "vlmprune.adapters.registry": "only a family knows how many tokens a picture became, of an un-pruned model, too",
        "vlmprune.cost": "the same formulas for un-pruned models as in the report of a run",
    },
    "evals/tune.py": {
        "vlmprune.cost": "the report of a run and a budget average tokens by one formula",
        "vlmprune.view": "the annotation of a method's argument",
    },
    "evals/sinks.py": {
        "vlmprune.methods.sink_dims": "the table of known sink dimensions, which it compares with what it finds",
    },
    "benchmarks/gpu_kernels.py": {"vlmprune.kernels": "it measures the kernels"},
    "benchmarks/select_diverse.py": {"vlmprune.kernels": "it measures this kernel's reference"},
    "benchmarks/sinks_smollm2.py": {
        "vlmprune.kernels": "it compares this kernel with an explicit edit",
        "vlmprune.methods.redistributing": "it gives a method a made-up image, for which there is no VLM",
        "vlmprune.methods.redistribution.var": "the groups of tokens that it compares",
    },
}
"""What else a file imports, and why."""
MAY_TOUCH_MODELS = {
    "evals/stopwatch.py": "a stopwatch around the language model",
    "benchmarks/redistribution.py": "a stopwatch around a decoder layer with its hooks",
    "benchmarks/transformers_suite.py": "it wraps the models of transformers' own tests at their first call",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that is imported from the package; the name is "" for a module as a whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "vlmprune")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vlmprune":
            yield from ((node.module or "", alias.name) for alias in node.names)


def attributes(tree: ast.AST) -> Iterator[str]:
    """The names that are taken from the package by a dot: `vp.wrap`."""
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "vlmprune"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            yield node.attr


def refused(path: Path) -> tuple[list[str], set[str]]:
    """What a file imports that is not public, and which of its exceptions it needs."""
    tree = ast.parse(path.read_text())
    excepted = EXCEPTIONS.get(name_of(path), {})
    wrong, used = [], set()
    for module, name in imports(tree):
        _, _, inside = module.partition(".")
        reason = next((prefix for prefix in excepted if module == prefix or module.startswith(f"{prefix}.")), None)
        if reason is not None:
            used.add(reason)
        elif inside:
            if inside.split(".")[0] not in PUBLIC:
                wrong.append(f"{module}.{name}")
        elif name and name not in {*vlmprune.__all__, *PUBLIC}:
            wrong.append(f"{module}.{name}")
        if name.startswith("_"):
            wrong.append(f"{module}.{name} is private")
    wrong += [f"vlmprune.{name}" for name in attributes(tree) if name not in {*vlmprune.__all__, "__version__", "__file__"}]
    return wrong, used


def test_imports_are_public():
    """Red: an evaluation or a benchmark imports the engine, a method's internals, or a private name."""
    assert FILES
    found = {name_of(path): wrong for path in FILES if (wrong := refused(path)[0])}
    assert not found


def test_no_exception_is_left_over():
    assert set(EXCEPTIONS) <= {name_of(path) for path in FILES}
    unused = {name_of(path): set(EXCEPTIONS.get(name_of(path), {})) - refused(path)[1] for path in FILES}
    assert not {name: modules for name, modules in unused.items() if modules}


def touches_models(path: Path) -> bool:
    """Whether a file registers hooks, or replaces how modules are called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("register_") and node.attr.endswith("_hook"):
            return True
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in ("__call__", "forward"):
            return True
    return False


def test_no_hooks():
    """Red: attention or hidden states are read by hooks, where `vlmprune.observe` gives them; or a listed file needs none."""
    assert {name_of(path) for path in FILES if touches_models(path)} == set(MAY_TOUCH_MODELS)


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("from vlmprune.live.attention import route_attention", ["vlmprune.live.attention.route_attention"]),
        ("import vlmprune as vp\nvp.live", ["vlmprune.live"]),
        ("from vlmprune import METHODS, view", ["vlmprune.view"]),
        ("from vlmprune.show.table import _escaped", ["vlmprune.show.table._escaped is private"]),
        ("import vlmprune.live.hooks", ["vlmprune.live.hooks."]),
        ("def f():\n    from vlmprune.methods.base import Pruner", ["vlmprune.methods.base.Pruner"]),
        ("import vlmprune\nfrom vlmprune import tiny\nfrom vlmprune.show.table import code\nvlmprune.wrap", []),
    ],
)
def test_what_is_not_public_is_seen(line, seen, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "file.py"
    path.write_text(line)
    assert refused(path)[0] == seen
