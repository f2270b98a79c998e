"""The rooms of the house: imports go one way, nothing global happens, the folders stand where they must."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Container
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from rooms import ROOMS

import vlmprune

ROOT = Path(vlmprune.__file__).resolve().parent.parent
MAY_IMPORT_TRANSFORMERS = {"live", "adapters"}
"""The engine, and the descriptions of families."""
MUST_IMPORT_TRANSFORMERS = {"tiny", "loading", "vlmprune.evals.random_models"}
"""What makes or loads models."""


def room(module: str) -> str:
    """The room at the top that a module stands in; "" is the package itself."""
    return [*module.split("."), ""][1]


def sources() -> dict[str, Path]:
    """Every module of the package, links followed once."""
    found = {}
    for folder, package in (
        (ROOT / "vlmprune", "vlmprune"),
        *((ROOT / n, f"vlmprune.{n}") for n in ("kernels", "adapters", "evals")),
    ):
        for path in folder.rglob("*.py"):
            relative = path.relative_to(folder)
            if folder == ROOT / "vlmprune" and relative.parts[0] in ("kernels", "adapters", "evals"):
                continue
            parts = relative.with_suffix("").parts
            found[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def imported(path: Path) -> list[str]:
    """Everything a file imports, at the top or inside functions, except for type checking only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    names = []
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide the direction"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def module_of(name: str, modules: Container[str]) -> str:
    """The module that an imported name comes from: `vlmprune.schedule.Budget` -> `vlmprune.schedule`."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def arrows() -> dict[str, set[str]]:
    """Per module, the modules of the package that it imports."""
    modules = sources()
    ours = {m: [n for n in imported(path) if n.split(".")[0] == "vlmprune"] for m, path in modules.items()}
    return {module: {module_of(name, modules) for name in names} - {module} for module, names in ours.items()}


def test_rooms():
    """At most 16 rooms at the top, beside the package's own files; every module stands in one of them."""
    assert {room(module) for module in sources()} == set(ROOMS)
    assert len(set(ROOMS) - {"", "__main__"}) <= 16


def test_no_arrow_back_up():
    """Between rooms, imports go one way."""
    rank = {name: number for number, name in enumerate(ROOMS)}
    wrong = [
        f"{module} imports {other}"
        for module, others in arrows().items()
        for other in others
        if room(module) != room(other) and rank[room(other)] > rank[room(module)]
    ]
    assert not wrong, wrong


def test_no_circle():
    """Nor do modules import each other in a circle, in whatever room."""
    try:
        tuple(TopologicalSorter(arrows()).static_order())
    except CycleError as found:
        raise AssertionError(f"a circle of imports: {found.args[1]}") from None


def test_who_may_know_transformers():
    """Live models are touched in one room, and nothing outside it imports transformers, but what makes models."""
    may = MAY_IMPORT_TRANSFORMERS | MUST_IMPORT_TRANSFORMERS
    wrong = [
        module
        for module, path in sources().items()
        if not may & {room(module), module} and any(name.split(".")[0] == "transformers" for name in imported(path))
    ]
    assert not wrong, wrong


def test_no_large_room():
    """No file has over 400 lines, and no class over 250; kernels aside."""
    wrong = []
    for module, path in sources().items():
        if room(module) == "kernels":
            continue
        text = path.read_text()
        if (lines := len(text.splitlines())) > 400:
            wrong.append(f"{module}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and (lines := node.end_lineno - node.lineno + 1) > 250:
                wrong.append(f"{module}.{node.name}: {lines} lines")
    assert not wrong, wrong


def test_methods_and_families_do_not_know_each_other():
    for module, path in sources().items():
        names = " ".join(imported(path))
        if module.startswith("vlmprune.methods"):
            assert "adapters" not in names
        if module.startswith("vlmprune.adapters"):
            assert "methods" not in names
            assert "kernels" not in names


def test_methods_and_families_are_short():
    for module, path in sources().items():
        if module.startswith(("vlmprune.methods.pruning.", "vlmprune.methods.redistribution.", "vlmprune.adapters.")):
            assert len(path.read_text().splitlines()) <= 150, path


def test_import_is_cheap_and_lazy():
    """`import vlmprune` loads neither torch nor transformers, and costs under 0.3 s beyond torch."""
    code = (
        "import sys, torch, time; start = time.process_time(); import vlmprune; took = time.process_time() - start\n"
        "assert took < 0.3, took\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    subprocess.run([sys.executable, "-c", "import sys, vlmprune; assert 'torch' not in sys.modules"], check=True)


def test_public_names_exist():
    for name in vlmprune.__all__:
        assert getattr(vlmprune, name) is not None
        assert name in dir(vlmprune)
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        vlmprune.prune  # noqa: B018


def test_wrap_is_a_function_whatever_is_imported_first():
    code = "import vlmprune.live.attachment, vlmprune; assert callable(vlmprune.wrap)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_top_level_folders_do_not_shadow_packages():
    """transformers probes `kernels`; a package of that name in the working directory would break its import."""
    for name in ("kernels", "adapters", "evals"):
        assert not (ROOT / name / "__init__.py").exists()
        assert (ROOT / "vlmprune" / name).resolve() == ROOT / name
    subprocess.run([sys.executable, "-c", "import transformers.modeling_utils"], check=True, cwd=ROOT)


def test_readme_table_is_generated():
    from vlmprune.cli import methods_markdown, redistribution_markdown

    assert methods_markdown() in (ROOT / "README.md").read_text()
    assert redistribution_markdown() in (ROOT / "README.md").read_text()
