"""A method and a family are added to a copy of the repository, each in the places that CONTRIBUTING.md names and in no others.

Red: a method or a family costs more places than CONTRIBUTING.md promises, or the tests do not run over it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vlmprune as vp

ROOT = Path(vp.__file__).resolve().parent.parent
PARTS = ("vlmprune", "kernels", "adapters", "evals", "tests", "docs", "pyproject.toml", "README.md", "CONTRIBUTING.md")


@pytest.fixture
def copy(tmp_path):
    """What a method or a family touches, and all that the tests of it need."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "checkpoint")
            shutil.copytree(ROOT / part, tmp_path / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / part, tmp_path / part)
    (tmp_path / "vlmprune/tiny/checkpoint").symlink_to(ROOT / "vlmprune/tiny/checkpoint")
    return tmp_path


def added(file: Path, before: str, line: str) -> None:
    """`line` before the first `before` of a file."""
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, line + before, 1))


def run(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python` with these arguments in the copy."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, check=False)


def run_tests(copy: Path, *arguments: str) -> tuple[int, str]:
    ran = run(copy, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *arguments)
    return ran.returncode, ran.stdout + ran.stderr


LOOPS = '''"""KNorm (arXiv:2406.11430), loop by loop."""

from methods.loops.plain import length, mean, top


def knorm(keys, keep: int) -> list[int]:
    """Kept ids: the smallest means over heads of the norms of the keys [head, visual, dim]."""
    return top([-mean([length(key) for key in token]) for token in zip(*keys, strict=True)], keep)
'''
COMPARED = '''"""KNorm against the loops of its paper."""

from methods.comparing import select, sizes
from methods.loops.knorm import knorm
from methods.views import random_view

import vlmprune as vp


@sizes
def test_knorm(seed, visual, keep, text):
    see = random_view(seed, visual=visual, text=text)
    assert select(vp.KNorm(), see, keep)[0] == [knorm(keys.tolist(), keep) for keys in see.keys]
'''
ROW = """    Pruning(
        "knorm",
        tiny=("layer=2,fraction=0.4",),
        few="layer=2,tokens=4",
        long=("layer=2,tokens=300",),
        written=("layer=3,fraction=0.25,positions=compact",),
        views={"knorm": Form(vp.KNorm())},
    ),
"""


def test_a_method_is_a_file_an_export_a_row_and_its_loops(copy):
    contributing = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding a redistribution")[0]
    (worked,) = re.findall(r"^```python\n(.*?)^```$", contributing, re.MULTILINE | re.DOTALL)
    pruning = copy / "vlmprune/methods/pruning"
    (pruning / "knorm.py").write_text(worked)
    export = "from vlmprune.methods.pruning.knorm import KNorm as KNorm\n"
    added(pruning / "__init__.py", "from vlmprune.methods.pruning.mustdrop", export)
    pages = (
        "tests/test_docs.py::test_the_page_of_the_methods",
        "tests/test_architecture.py::test_readme_table_is_generated",
        "tests/test_results.py::test_the_published_sweep_would_run_the_same_recipes",
    )
    code, said = run_tests(copy, "tests/test_cases.py", *pages)
    assert code == 1, said
    assert "knorm" in said, "the tests do not miss the row"
    assert set(re.findall(r"^FAILED (\S+)", said, re.MULTILINE)) >= set(pages[:2]), "the tests do not miss the tables"
    assert pages[2] not in said, "a new method needs a sweep"

    added(copy / "tests/cases.py", '    Pruning(\n        "mustdrop",', ROW)
    (copy / "tests/methods/loops/knorm.py").write_text(LOOPS)
    (copy / "tests/methods/test_knorm.py").write_text(COMPARED)
    page, table = re.findall(r"`python (docs/methods\.py|-c \"from vlmprune\.cli import methods_markdown[^`]*)`", contributing)
    assert run(copy, page).returncode == 0
    readme = copy / "README.md"
    rows = run(copy, *shlex.split(table)).stdout
    before = re.search(r"^\| method \| paper \| prunes .*?\n\n", readme.read_text(), re.MULTILINE | re.DOTALL)
    assert before is not None
    readme.write_text(readme.read_text().replace(before[0], rows + "\n"))
    promises = [f"tests/promises/test_{name}.py" for name in ("exact", "choices", "waiting", "recipes")]
    chosen = "knorm and not next and not qwen2_vl or test_cases or every_parameter"
    chosen += " or page_of_the_methods or readme_table or published_sweep"
    code, said = run_tests(copy, "tests/test_cases.py", "tests/methods/test_knorm.py", *promises, *pages, "-k", chosen)
    assert code == 0, said[-3000:]
    ran = int(re.findall(r"(\d+) passed", said)[0])
    assert ran > 40, said


FAMILY = '''"""A toy: LLaVA under another name."""

from dataclasses import replace

from vlmprune.adapters.llava import LLAVA

TOY = replace(LLAVA, name="toy")
'''
CONFIGURATION = """

class ToyConfig(tf.LlavaConfig):
    model_type = "toy"


class ToyForConditionalGeneration(tf.LlavaForConditionalGeneration):
    config_class = ToyConfig


def toy() -> Any:
    return ToyConfig(
        vision_config=_clip(), text_config=_text(tf.LlamaConfig), image_token_index=IMAGE, image_seq_length=NEXT_SIDE**2
    )
"""
ENTRY = """    "toy": Tiny(configs.ToyForConditionalGeneration, configs.toy, _one_raster(NEXT_SIDE**2, NEXT_SIDE)),
"""


def test_a_family_is_a_file_an_entry_and_a_configuration(copy):
    (copy / "adapters/toy.py").write_text(FAMILY)
    added(copy / "adapters/registry.py", "from vlmprune.errors", "from vlmprune.adapters.toy import TOY\n")
    registry = copy / "adapters/registry.py"
    registry.write_text(registry.read_text().replace("(LLAVA, LLAVA_NEXT,", "(LLAVA, LLAVA_NEXT, TOY,"))
    here = ("tests/families/test_matrix.py", "-k")
    code, said = run_tests(copy, *here, "every_family")
    assert code == 1, said[-3000:]
    with (copy / "tests/families/configs.py").open("a") as configurations:
        configurations.write(CONFIGURATION)
    added(copy / "tests/families/table.py", '    "mistral3": Tiny(', ENTRY)
    code, said = run_tests(copy, *here, "every_family or toy")
    assert code == 0, said[-3000:]
    assert int(re.findall(r"(\d+) passed", said)[0]) > 12, said
