"""The real commands, in processes of their own: a kill in the middle, many processes, and what is refused in seconds."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from command_line import vlmprune
from lmms.evaluating import answers, evaluate

from vlmprune.evals.lmms_results import read_finished
from vlmprune.evals.lmms_tasks import OURS

LIMIT = 24
COMMAND = (sys.executable, "-m", "vlmprune", "lmms", "--task", "vlmprune_scenes", "--recipe", "flowcut:tokens=32")
SETTINGS = ("--batch", "4", "--limit", str(LIMIT))


def run(out, *more, check=True):
    done = subprocess.run([*COMMAND, *SETTINGS, "--out", str(out), "--json", *more], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def rows(folder):
    """The answers that are on disk, by key and how often."""
    lines = [json.loads(line) for path in folder.glob("*/answers/answers-*.jsonl") for line in path.read_text().splitlines()]
    return Counter(tuple(line["key"]) for line in lines if "row" in line)


def read(folder):
    (file,) = folder.glob("*/*/*_results.json")
    return read_finished("flowcut:tokens=32", file, ["vlmprune_scenes"])


def test_the_command_of_the_readme(tmp_path, monkeypatch):
    """With fewer documents. Red: it is refused, or needs a network."""
    readme = Path(__file__).parents[2] / "README.md"
    (line,) = [line for line in readme.read_text().splitlines() if line.startswith("vlmprune lmms ")]
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)[1:]
    words[words.index("--limit") + 1] = "4"
    done = subprocess.run([sys.executable, "-m", "vlmprune", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "flowcut:tokens=32" in (tmp_path / words[words.index("--out") + 1] / "lmms.md").read_text()


def test_killed_in_the_middle_and_resumed_in_two_processes(tmp_path):
    """lmms-eval dies after its first batch: no results, exit code 1, and a sentence. Two processes then ask what is left, and
    nothing twice; the answers are those of one process, by document.

    Red: exit code 0 without results (as lmms-eval's own), an answer asked again, or answers in the order of processes.
    """
    process = subprocess.Popen([*COMMAND, *SETTINGS, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not rows(tmp_path):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    (child,) = psutil.Process(process.pid).children()
    os.kill(child.pid, signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 1
    assert "vlmprune: lmms-eval ended without results for flowcut:tokens=32 (exit code -9)" in error
    assert "the same command goes on from there" in error
    finished = rows(tmp_path)
    assert 0 < len(finished) < LIMIT
    assert not list(tmp_path.glob("lmms.*"))

    numbers = json.loads(run(tmp_path, "--processes", "2").stdout)
    assert finished.keys() < rows(tmp_path).keys()
    assert set(rows(tmp_path).values()) == {1}
    assert len(rows(tmp_path)) == LIMIT
    assert len(list(tmp_path.glob("*/answers/answers-*.jsonl"))) == 3
    (row,) = numbers["rows"]
    assert (row["documents"], row["columns"]["kept_tokens"]) == (LIMIT, 32)
    samples = read(tmp_path).samples["vlmprune_scenes"]
    assert [sample.answer for sample in samples] == answers(evaluate("vlmprune_scenes", "flowcut:tokens=32", limit=LIMIT))
    assert all(sample.columns[0]["kept_tokens"] == 32 for sample in samples)


def test_a_mistake_inside_the_run_is_one_sentence(tmp_path):
    """It is found in lmms-eval's process, behind its traceback. Red: exit code 0, or the traceback alone."""
    done = run(tmp_path, "--system", "be brief", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "vlmprune: the chat template has no system role, and writes the text as words of the assistant: put it into the "
        "questions (pre_prompt of the task) instead."
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--task", "pope"), "pope needs the dataset lmms-lab-encoder/POPE, which is not in the cache"),
        (("--task", "mmbench_en_dev"), "take mmbench_en_dev_static, which compares texts"),
        (("--task", "vlmprune_attributes_likelihood"), "add --force-simple"),
        (("--task", "mvbench"), "vlmprune takes pictures only"),
        (("--task", "popee"), "unknown task 'popee': did you mean 'pope'"),
        (("--recipe", "fastv:layr=2"), "unknown parameter of fastv 'layr': did you mean 'layer'"),
        (("--", "--use_cache", "x"), "every answer is kept under --out anyway"),
        (("--", "--system_instruction=x"), "write --system TEXT"),
        (("--include", "nowhere"), "there is no folder nowhere with tasks"),
    ],
    ids=str,
)
def test_refused_within_seconds(arguments, sentence, monkeypatch, capsys, tmp_path):
    """Without starting lmms-eval, which takes 15 CPU-seconds. Red: a traceback after minutes."""
    for key in ("OPENAI_API_KEY", "AZURE_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    before = time.process_time()
    assert vlmprune(monkeypatch, "lmms", "--out", tmp_path / "out", *arguments) == 2
    assert sentence in capsys.readouterr().err
    assert time.process_time() - before < 8
    assert not (tmp_path / "out").exists()


def test_the_commands_are_shown(monkeypatch, capsys, tmp_path):
    """They can be copied: no path to type."""
    assert vlmprune(monkeypatch, "lmms", "--show-command", "--out", tmp_path, "--recipe", "fastv:layer=2,fraction=0.5") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert f"--include_path {OURS.resolve()}" in line
    assert 'recipe="fastv:layer=2,fraction=0.5"' in line
    assert "--tasks vlmprune_attributes,vlmprune_counting,vlmprune_existence_adversarial" in line
