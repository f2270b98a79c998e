"""What adding a method costs: its file and one export line. Everything else that lists methods follows from that line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import vlmprune
from vlmprune.names import exports

PACKAGE = Path(vlmprune.__file__).resolve().parent
FILE = '''
from dataclasses import dataclass

from torch import Tensor

from vlmprune.methods.base import ScorePruner
from vlmprune.methods.parameters import number
from vlmprune.schedule import at
from vlmprune.view import View


@dataclass(frozen=True, kw_only=True)
class KNorm(ScorePruner):
    """Keep tokens with small keys.

    Args:
        power: of the norm.
    """

    name = "knorm"
    paper = "arXiv:2406.11430"
    needs = frozenset({"keys"})
    default = at(layer=2, fraction=0.5)
    first_layer = 1

    power: float = number(1.0, low=0, high=4)

    def score(self, see: View) -> Tensor:
        return -see.keys.float().norm(dim=-1).mean(dim=1) ** self.power
'''
LINE = "from vlmprune.methods.pruning.knorm import KNorm as KNorm\n"
USE = """
import sys
import vlmprune as vp
from vlmprune import names

assert "knorm" in names.method_names() and names.parameters("knorm")[-1] == "power"
names.check_recipe("knorm:power=2")
assert "KNorm" in vp.__all__ and "KNorm" in dir(vp)
assert "torch" not in sys.modules
assert vp.METHODS["knorm"] is vp.KNorm
assert vp.Recipe.parse("knorm:fraction=0.25,power=2") == vp.Recipe.of(vp.KNorm(fraction=0.25, power=2))
from vlmprune.cli import methods_markdown
from vlmprune.cli.details import describe
assert "| `knorm` | arXiv:2406.11430 | layer 2 | all | keys |" in methods_markdown(), methods_markdown()
(power,) = (row for row in describe("knorm")["parameters"] if row["parameter"] == "power")
assert (power["type"], power["allowed"], power["default"]) == ("number", "0 to 4", "1.0"), power
from vlmprune import *
print(KNorm.name)
"""


def test_a_method_is_its_file_and_one_export_line(tmp_path):
    """Red: a public name, a recipe, a check of names, or a table needs the method listed a second time."""
    shutil.copytree(PACKAGE, tmp_path / "vlmprune", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    folder = tmp_path / "vlmprune/methods/pruning"
    (folder / "knorm.py").write_text(FILE)
    with (folder / "__init__.py").open("a") as lines:
        lines.write(LINE)
    done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "knorm", done.stderr


def test_every_method_is_exported_under_the_name_of_its_file():
    """Red: the command line, which looks names up in files, and recipes, which look them up in classes, differ."""
    for kind in ("pruning", "redistribution"):
        for name, module in exports(f"vlmprune.methods.{kind}").items():
            assert getattr(vlmprune, name).name == module.rpartition(".")[2]
        files = {path.stem for path in (PACKAGE / "methods" / kind).glob("*.py")} - {"__init__"}
        assert files == {module.rpartition(".")[2] for module in exports(f"vlmprune.methods.{kind}").values()}
