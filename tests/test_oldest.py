"""The oldest transformers that is called supported is the one that `make test` runs the exactness core with."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import transformers

import vlmprune

ROOT = Path(vlmprune.__file__).resolve().parent.parent
PINNED = dict(line.split("==") for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if "==" in line)


def test_the_lower_bound_is_what_is_run():
    (bound,) = re.findall(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert PINNED["transformers"].startswith(f"{bound}.")


def test_the_makefile_runs_files_that_exist():
    (promises, others) = re.findall(r"^CORE := \$\(addprefix (.+)\) (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0]
    prefix, names = promises.split(",")
    files = [*(prefix + name for name in names.split()), *others.split()]
    assert "tests/promises/test_exact.py" in files
    assert all((ROOT / file).exists() for file in files)


@pytest.mark.skipif("VLMPRUNE_OLDEST" not in os.environ, reason="`make test-oldest` sets it: the other environment")
def test_this_environment_is_the_oldest():
    assert transformers.__version__ == PINNED["transformers"]
