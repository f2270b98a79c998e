"""Every code block and every command of the README runs as it is written, offline.

Models, pictures and questions it names are made here. Where a command would take minutes, a comment in the README says with
which options it is run here; they are read from there.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from command_line import vlmprune
from folders import FOLDERS

import vlmprune as vp
from vlmprune import tiny
from vlmprune.tiny.clips import make_clip
from vlmprune.tiny.scenes import make_scene

ROOT = Path(vp.__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHORTER = {
    entry.partition(": ")[0].strip(): shlex.split(entry.partition(": ")[2])
    for comment in re.findall(r"<!-- tests/test_readme\.py[^\n]*\n(.*?)-->", README, re.DOTALL)
    for entry in comment.replace("\n", " | ").split(" | ")
}
IN_BLOCKS = [line for language, block in BLOCKS if not language for line in block.splitlines() if line.strip()]
INLINE = re.findall(r"`((?:vlmprune|python|pytest|pip|make) [^`]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S))
# A word in quotes may hold a hash, what follows one outside is a remark.
EVERY = [shlex.split(line.replace("\n", " "), comments=True) for line in dict.fromkeys([*IN_BLOCKS, *INLINE])]
COMMANDS = [command for command in EVERY if command[:2] != ["vlmprune", "lmms"]]  # those: tests/lmms/test_commands.py
MODEL_COMMANDS = [command for command in COMMANDS if command[0] == "vlmprune" and {"--model", "--image"} & set(command)]
MODEL_COMMANDS = [command for command in MODEL_COMMANDS if "tiny-clips" not in command]  # the same model for every family


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the picture, the video, the questions and the results that the README names."""
    monkeypatch.chdir(tmp_path)
    made = make_scene(1)
    made.image.save(tmp_path / "cat.jpg")
    (tmp_path / "door").mkdir()
    for number, frame in enumerate(make_clip(1).frames()):
        frame.save(tmp_path / "door" / f"{number}.png")
    (tmp_path / "my-questions").mkdir()
    lines = []
    for number in (1, 2):
        made = make_scene(number)
        made.image.save(tmp_path / "my-questions" / f"{number}.png")
        asked = made.questions[0]
        lines.append(json.dumps({"image": f"{number}.png", "question": asked.text, "answer": asked.answer}))
    (tmp_path / "my-questions" / "questions.jsonl").write_text("\n".join(lines))
    shutil.copytree(ROOT / "docs" / "results" / "budgets", tmp_path / "results")
    shutil.copytree(ROOT / "docs" / "results" / "sweep", tmp_path / "my-results")
    return tmp_path


def test_what_the_readme_holds():
    """Red: a block of a language, or a command, that no test below runs."""
    assert {language for language, _ in BLOCKS} == {"", "python"}
    assert README.count("```") == 2 * len(BLOCKS)
    assert len(COMMANDS) > 20
    assert len(MODEL_COMMANDS) >= 5
    assert {command[0] for command in COMMANDS} == {"make", "source", "pip", "vlmprune", "python", "pytest"}
    for command in COMMANDS:  # what a shell would break apart is in quotes
        assert not any(character in " ".join(command) for character in "<>$;")
    for line in IN_BLOCKS:
        assert "|" not in re.sub(r'"[^"]*"', "", line), line


def test_code_blocks(place, capsys):
    """One behind the other, as a reader types them. Red: a snippet needs what is not there, or prints no answer."""
    space: dict = {}
    printed = []
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), space)
            printed.append(capsys.readouterr().out)
    answer, *report = printed[0].splitlines()
    assert answer.strip()
    assert report[0].startswith("recipe")
    assert "KV cache" in printed[0]
    once = vp.Recipe.of(vp.DivPrune(tokens=64), vp.Random(layer=4, fraction=0.1))
    assert space["recipe"].methods == once.methods, "Python, string and file mean the same"


def run(monkeypatch, command):
    name = command[1]
    shorter = SHORTER.get(name, [])
    kept = list(command[1:])
    for option in [word for word in shorter if word.startswith("--")]:  # replaced, not added to
        while option in kept:
            del kept[kept.index(option) : kept.index(option) + 2]
    return vlmprune(monkeypatch, *kept, *shorter)


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if command[0] == "vlmprune" and "--out" not in command], ids=" ".join
)
def test_commands(monkeypatch, capsys, place, command):
    """Red: a command of the README is refused, or needs what it does not say."""
    shutil.copytree(tiny.CHECKPOINT, place / "my-model")
    assert run(monkeypatch, command) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("command", [command for command in COMMANDS if "--out" in command], ids=" ".join)
def test_commands_that_write(monkeypatch, capsys, place, command):
    assert command[0] == "vlmprune"
    shutil.copytree(tiny.CHECKPOINT, place / "my-model")
    assert run(monkeypatch, command) == 0, capsys.readouterr().err
    assert list((place / command[command.index("--out") + 1]).iterdir())


@pytest.mark.parametrize("family", FOLDERS)
def test_commands_on_every_family(monkeypatch, capsys, place, family):
    """Random weights: exit 0, or one sentence and exit 2; `run` and `view` answer. Red: a traceback."""
    FOLDERS[family](place / "my-model", layers=6)
    codes = {}
    for command in MODEL_COMMANDS:
        command = [*command, *(["--model", "my-model"] if "--model" not in command else [])]
        codes[command[1]] = run(monkeypatch, command)
        captured = capsys.readouterr()
        assert codes[command[1]] in (0, 2)
        if codes[command[1]] == 2:
            sentences = [line for line in captured.err.splitlines() if line.strip()]
            assert len(sentences) == 1, captured.err
            assert sentences[0].startswith("vlmprune: ")
        assert "Traceback" not in captured.err
    assert codes["run"] == codes["view"] == codes["sinks"] == 0


@pytest.mark.parametrize("script", ["prefill", "native"])
def test_benchmarks(monkeypatch, capsys, place, script):
    (command,) = [c for c in COMMANDS if c[:2] == ["python", f"benchmarks/{script}.py"]]
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    prefill, shapes, module = import_module("prefill"), import_module("native_shapes"), import_module(script)
    build = prefill.llava_shaped
    for user in (prefill, shapes):
        monkeypatch.setattr(user, "llava_shaped", lambda **settings: build(**{**settings, "dim": 64, "mlp": 64}))
    if script == "native":
        few = dict(list(shapes.SHAPES["llava"].recipes.items())[:2])
        monkeypatch.setitem(shapes.SHAPES, "llava", replace(shapes.SHAPES["llava"], recipes=few))
    else:
        monkeypatch.setattr(module, "RECIPES", module.RECIPES[:2])
    monkeypatch.setattr(sys, "argv", [*command[1:], *SHORTER["benchmarks"], "--out", str(place / script)])
    with pytest.raises(SystemExit) as stop:
        module.typer.run(module.main)
    assert not stop.value.code
    assert "recipe" in capsys.readouterr().out
    assert (place / f"{script}.md").read_text().count("\n|") >= 3
    assert (place / f"{script}.json").exists()


def test_the_other_commands():
    """What sets up an environment, or is this suite: targets, extras and folders exist."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text()
    for command in COMMANDS:
        if command[0] == "make":
            assert command[1] in targets
        elif command[0] == "pip":
            extra = re.fullmatch(r"\.(?:\[(\w+)\])?", command[-1])
            assert extra is not None
            assert extra[1] is None or f"\n{extra[1]} = [" in project
        elif command[0] == "source":
            assert command[1] == ".venv/bin/activate"
            assert "VENV ?= .venv" in (ROOT / "Makefile").read_text()
        elif command[0] == "pytest":
            assert list((ROOT / command[1]).glob("test_*.py"))
        elif command[0] == "python":
            assert command[1:] == ["-m", "vlmprune"] or (ROOT / command[1]).exists()
    for extra in re.findall(r"'\.\[(\w+)\]'", README):
        assert f"\n{extra} = [" in project
    assert "$(BIN)/vlmprune demo" in (ROOT / "Makefile").read_text(), "what `make demo` runs is what the README says"


def test_links():
    """Every file the README points at exists."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
