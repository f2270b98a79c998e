"""The rooms of the house: imports go one way, nothing global happens, the folders stand where they must."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vlmprune

ROOT = Path(vlmprune.__file__).resolve().parent.parent
LEVELS = [
    {"vlmprune.errors", "vlmprune.cost", "vlmprune.draw", "vlmprune.units", "vlmprune.methods.parameters"},
    {
        "vlmprune.names",
        "vlmprune.pictures",
        "vlmprune.hub",
        "vlmprune.evals.stats",
        "vlmprune.unhooked",
        "vlmprune.methods.checks",
    },
    {"vlmprune.schedule", "vlmprune.layout", "vlmprune.view", "vlmprune.kernels", "vlmprune.sink_dims"},
    {"vlmprune.reduction", "vlmprune.context"},
    {"vlmprune.cache", "vlmprune.methods.base", "vlmprune.methods.redistributing", "vlmprune.adapters", "vlmprune.attention"},
    {
        "vlmprune.tower",
        "vlmprune.methods.merging",
        "vlmprune.methods.relevance",
        "vlmprune.methods.clip_relevance",
        "vlmprune.shells",
    },
    {"vlmprune.methods.relevance", "vlmprune.methods.clip_relevance"},
    {"vlmprune.methods.pruning", "vlmprune.methods.redistribution"},
    {"vlmprune.methods"},
    {"vlmprune.recipe", "vlmprune.run"},
    {"vlmprune.decoder"},
    {"vlmprune.probes", "vlmprune.prompt", "vlmprune.apart", "vlmprune.links"},
    {"vlmprune.steering", "vlmprune.cutting"},
    {"vlmprune.refusals"},
    {"vlmprune.attach"},
    {"vlmprune.hooks"},
    {"vlmprune.handle"},
    # The public names; the embedded model, and models of published shapes, know nothing of the library.
    {"vlmprune", "vlmprune.tiny", "vlmprune.evals.shapes"},
    {"vlmprune.loading", "vlmprune.catalogue"},
    {"vlmprune.evals", "vlmprune.demo"},
    {"vlmprune.cli"},
    {"vlmprune.__main__"},
]
MAY_IMPORT_TRANSFORMERS = {"vlmprune.cache", "vlmprune.attention", "vlmprune.decoder", "vlmprune.probes", "vlmprune.prompt"}
MAY_IMPORT_TRANSFORMERS |= {"vlmprune.hooks", "vlmprune.recipe", "vlmprune.demo", "vlmprune.loading", "vlmprune.cli"}
MAY_IMPORT_TRANSFORMERS |= {"vlmprune.tiny", "vlmprune.evals.shapes"}


def room(module: str) -> str:
    """The entry of LEVELS a module belongs to: itself, or the package it stands in."""
    known = set().union(*LEVELS)
    while module not in known:
        module = module.rpartition(".")[0]
    return module


def level(module: str) -> int:
    return next(number for number, rooms in enumerate(LEVELS) if room(module) in rooms)


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


def test_every_module_has_a_level():
    assert len(sources()) > 30
    for module in sources():
        assert room(module) in set().union(*LEVELS)
        assert module == room(module) or room(module) != "vlmprune", f"{module} stands in no room of LEVELS"


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_go_one_way(module):
    for name in imported(sources()[module]):
        if name.split(".")[0] != "vlmprune":
            continue
        same_room = room(name) == room(module)
        assert same_room or level(name) < level(module), f"{module} imports {name}, which stands above or beside it"


@pytest.mark.parametrize("module", sorted(sources()))
def test_who_may_know_transformers(module):
    if room(module) in MAY_IMPORT_TRANSFORMERS:
        return
    assert not [name for name in imported(sources()[module]) if name.split(".")[0] == "transformers"]


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
        "import sys, torch, time; start = time.perf_counter(); import vlmprune; took = time.perf_counter() - start\n"
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
    code = "import vlmprune.attach, vlmprune; assert callable(vlmprune.wrap)"
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
