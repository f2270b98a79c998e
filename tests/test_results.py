"""Results have one way out, and every published table can be made again from the JSON beside it."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

import vlmprune
from vlmprune.evals import results
from vlmprune.evals.results import Result, stamp
from vlmprune.evals.sweep_plan import make_plan
from vlmprune.show.table import code, table
from vlmprune.tiny import load

ROOT = Path(vlmprune.__file__).resolve().parent.parent
COMMANDS = {
    "accuracy": "accuracy",
    "sweep": "sweep_report",
    "horizon": "horizon_report",
    "tune": "tune",
    "max_drop": "max_drop_report",
    "stock": "lmms_results",
}
"""File of a published result -> the module in `evals/` that shows it; the others are of scripts in `benchmarks/`."""
FIVE_DIGITS = "docs/results/horizon_answer/horizon"
"""Its JSON holds five digits and its table was made from all, so that a number that ends in 5 may be rounded the other way."""


def module_of(stem: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What makes the `Result` of a published file."""
    file = Path(stem).name
    if file in COMMANDS:
        return importlib.import_module(f"vlmprune.evals.{COMMANDS[file]}")
    script = file.partition("-cpu")[0].replace("-", "_")  # decoding-cpu-before is of decoding.py
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    name = f"benchmark_{script}"  # tests/ has a module `gradients` of its own
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests"), *sys.path])
    spec.loader.exec_module(module)
    return module


def published() -> list[str]:
    """All JSON files with a Markdown file beside them."""
    found = [path for folder in ("docs/results", "benchmarks/results") for path in (ROOT / folder).rglob("*.json")]
    return sorted(str(path.with_suffix("").relative_to(ROOT)) for path in found if path.with_suffix(".md").exists())


@pytest.mark.parametrize("stem", published())
def test_published_tables_are_those_of_their_numbers(stem, monkeypatch):
    """Red: a table was edited by hand, or a command shows its numbers in another form than the published one."""
    numbers = json.loads((ROOT / f"{stem}.json").read_text())
    made = module_of(stem, monkeypatch).result(numbers).markdown() + "\n"
    text = (ROOT / f"{stem}.md").read_text()
    if stem == FIVE_DIGITS:
        number = r"\d+\.\d+"
        assert re.sub(number, "", made) == re.sub(number, "", text)
        pairs = zip(re.findall(number, made), re.findall(number, text), strict=True)
        assert max(abs(float(one) - float(other)) for one, other in pairs) < 0.0011
    else:
        assert made == text


def test_the_published_sweep_would_run_the_same_recipes():
    """Of the methods that the file has: a sweep takes half an hour, and a new method may be added before the next one.

    Red: the solver or a paper's schedule gives other fractions than those that the published accuracies belong to.
    """
    numbers = json.loads((ROOT / "docs/results/sweep/sweep.json").read_text())
    plan = make_plan(load()[0], {row["method"] for row in numbers["rows"]})
    for points, rows in ((plan.points, numbers["rows"]), (plan.controls(), numbers["controls"])):
        assert [point.recipe(0) for point in points] == [vlmprune.Recipe.parse(row["recipe"]) for row in rows]


@pytest.fixture
def result() -> Result:
    wide = table(["recipe", "a", "b"], [[code("x:y=1|2"), "1" * 40, "2" * 40]])
    narrow = table(["recipe", "a"], [[code("x:y=1|2"), "3"]])
    numbers = {**stamp("python it.py"), "rows": [1, 2]}
    return Result(
        numbers, ["About [95 %].", (wide, narrow), ["one", "two"], [], ""], draw=lambda path: path.write_text("drawn")
    )


def shown(result: Result, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    result.show(console)
    return console.file.getvalue()


def test_files(result, tmp_path):
    result.write(tmp_path / "gpu-0.5")
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-0.5.json", "gpu-0.5.md", "gpu-0.5.png"}
    assert json.loads((tmp_path / "gpu-0.5.json").read_text()) == result.numbers
    *parts, last = (tmp_path / "gpu-0.5.md").read_text().split("\n\n")
    assert [part.split("\n")[0] for part in parts] == ["About [95 %].", "| recipe | a | b |", "- one"]
    versions = result.numbers["environment"]
    assert last.startswith(f"{result.numbers['date']}, `python it.py`, torch {versions['torch']}, transformers ")


def test_a_terminal_gets_the_table_that_fits(result):
    assert "2222" in shown(result, 120)
    assert "2222" not in shown(result, 60)
    assert "│ 3 │" in shown(result, 60)
    assert "About [95 %]." in shown(result, 60)


def test_a_screen_instead_of_all_parts(result):
    short = Result(result.numbers, result.parts, ["in short"])
    assert shown(short, 120) == "in short\n"
    assert "- one" in short.markdown()


def test_json_or_parts(result, capsys, tmp_path):
    """Files are written in both cases; JSON is all that a program reads."""
    console = Console(file=io.StringIO())
    result.deliver(console, tmp_path / "it", as_json=True)
    assert json.loads(capsys.readouterr().out) == result.numbers
    assert console.file.getvalue() == ""
    assert (tmp_path / "it.md").exists()
    result.deliver(console)
    assert "About" in console.file.getvalue()
    assert capsys.readouterr().out == ""


def test_the_stamp_names_the_running_command(monkeypatch):
    monkeypatch.setattr(results.sys, "argv", ["/usr/bin/vlmprune", "eval", "--recipe", "a + b"])
    assert stamp()["command"] == "vlmprune eval --recipe 'a + b'"


def test_numbers_of_a_gpu_say_which():
    numbers = {**stamp("it")}
    numbers["environment"] = {**numbers["environment"], "threads": 8, "gpu": "H100"}
    assert Result(numbers, []).markdown().endswith(", 8 threads, H100.")
