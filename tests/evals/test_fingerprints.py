"""Hashes: whatever can change an answer changes them, and what cannot does not."""

from __future__ import annotations

import importlib.util
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

import vlmprune as vp
from vlmprune import tiny
from vlmprune.evals import fingerprints
from vlmprune.evals.fingerprints import recipe_fingerprint, versions, weights_fingerprint


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """The package, in a copy that may be edited."""
    folder = tmp_path / "vlmprune"
    shutil.copytree(Path(vp.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprints.vlmprune, "__file__", str(folder / "__init__.py"))
    monkeypatch.setattr(fingerprints, "_code", cache(fingerprints._code))  # only edited files are parsed again: for time
    return folder


def code(*asking: str) -> str:
    return fingerprints.code_fingerprint.__wrapped__(*asking)


def test_the_fingerprint_covers_what_changes_an_answer(package):
    """Red: an edit of the engine, a kernel, a shared module or the model is not noticed; or one that changes nothing is."""
    before = code()
    assert before == code()
    for room in (
        "schedule.py",
        "live/pruning.py",
        "methods/merging.py",
        "adapters/registry.py",
        "loading/models.py",
        "tiny/scenes.py",
        "kernels/gather_tokens/reference.py",
        "evals/asking.py",
    ):
        path, text = package / room, (package / room).read_text()
        path.write_text(f"{text}\nEDITED = True\n")
        assert code() != before, room
        path.write_text(text.replace('"""', '"""Reworded. ', 1) + "\n# a remark\n")
        assert code() == before, room
        path.write_text(text)
    for room in ("cli/__init__.py", "show/table.py", "evals/sweep_report.py"):
        path = package / room
        path.write_text(f"{path.read_text()}\nEDITED = True\n")
    assert code() == before
    weights = package / "tiny" / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert code() != before


def test_the_fingerprint_covers_what_the_asking_modules_import(package):
    """Red: a module that asks moves a part of itself into another one, which is not watched."""
    asking, part = package / "evals" / "asking.py", package / "evals" / "a_new_part.py"
    asking.write_text(asking.read_text() + "\nfrom vlmprune.evals import a_new_part\n")
    part.write_text("from vlmprune.evals.another_part import VALUE\n")
    (package / "evals" / "another_part.py").write_text("VALUE = 1\n")
    before, others = code(), code("horizon")
    (package / "evals" / "another_part.py").write_text("VALUE = 2\n")
    assert code() != before
    assert code("horizon") == others
    with pytest.raises(FileNotFoundError):
        code("no_such_module")


def test_a_method_of_ones_own_counts_by_its_file(tmp_path, monkeypatch):
    text = (
        "from dataclasses import dataclass\nimport vlmprune as vp\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Own(vp.Uniform):\n    '''Mine.'''\n    name = 'own'\n    VALUE = 1\n"
    )
    found = []
    for number, value in enumerate(("1", "1", "2")):
        path = tmp_path / f"own{number}" / "own_method.py"
        path.parent.mkdir()
        path.write_text(text.replace("VALUE = 1", f"VALUE = {value}"))
        spec = importlib.util.spec_from_file_location("own_method", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(__import__("sys").modules, "own_method", module)
        spec.loader.exec_module(module)
        found.append(recipe_fingerprint(vp.Recipe((module.Own(schedule=vp.at(layer=0, fraction=0.5)),))))
    assert found[0] == found[1] != found[2]
    assert recipe_fingerprint(vp.Recipe.parse("divprune:fraction=0.5")) == recipe_fingerprint(None) == ""


def test_weights():
    """Red: a model that is trained on in place keeps its hash."""
    model, _ = tiny.load()
    before = weights_fingerprint(model)
    with vp.wrap(model, "fastv:layer=2,fraction=0.5"):
        assert weights_fingerprint(model) == before
    with torch.no_grad():
        model.lm_head.weight += 1e-3
    assert weights_fingerprint(model) != before
    assert weights_fingerprint(tiny.load()[0]) == before
    model.config.text_config.rms_norm_eps *= 2
    assert weights_fingerprint(model) != before


def test_versions():
    assert versions()["torch"] == torch.__version__
