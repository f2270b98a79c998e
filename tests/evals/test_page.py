"""docs/evaluation.md stays true: its Python runs, and its tables name what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import vlmprune
from vlmprune.evals.question_files import KEYS
from vlmprune.evals.questions import open_questions
from vlmprune.evals.scorers import SCORERS

PAGE = (Path(vlmprune.__file__).resolve().parent.parent / "docs/evaluation.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_its_python_runs(capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(block, "docs/evaluation.md", "exec"), {})
    plain, pruned = capsys.readouterr().out.splitlines()
    assert plain.startswith("un-pruned ")
    assert plain.endswith(" 1.0")
    assert pruned.startswith("divprune:fraction=0.25 ")
    assert pruned.endswith(" 0.25")


def test_it_names_every_key_and_every_scorer():
    """Red: a key or a scorer was added or renamed."""
    rows = re.findall(r"^\| (`\w+`(?: or `\w+`)?) \|", section("A folder of your own"), re.MULTILINE)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == set(KEYS)
    assert re.findall(r"^\| `(\w+)` \|", section("Scorers"), re.MULTILINE) == [name for name in SCORERS if name != "task"]


def test_its_lines_can_be_read(tmp_path):
    from PIL import Image

    (block,) = re.findall(r"^```\n(\{.*?)^```$", section("A folder of your own"), re.MULTILINE | re.DOTALL)
    for name in {name for line in map(json.loads, block.splitlines()) for name in [line.get("image"), *line.get("images", ())]}:
        if name:
            Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "questions.jsonl").write_text(block)
    found = open_questions(tmp_path)
    assert [len(question.images) for question in found] == [1, 2, 0]
    assert [question.scorer for question in found] == ["normalised", "choice", "normalised"]


@pytest.mark.parametrize("command", ["eval", "sweep", "horizon", "tune"])
def test_options_that_it_names_exist(command, capsys):
    """Red: a command lost `--model` or `--data`."""
    from typer.main import get_command

    from vlmprune.cli import app

    options = {name for parameter in get_command(app).commands[command].params for name in parameter.opts}
    wanted = {"--model", "--data", "--images", "--split", "--column", "--skip-bad", "--device", "--device-map", "--out"}
    assert wanted <= options
    if command in ("eval", "sweep"):
        assert {"--scorer", "--batch", "--max-new-tokens", "--wait"} <= options
