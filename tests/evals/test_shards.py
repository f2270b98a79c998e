"""Several processes answer together: the merged file has the bytes of one process's, whoever was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import vlmprune

from vlmprune.errors import UsageError
from vlmprune.evals.answers import FILE
from vlmprune.evals.shards import ALONE, Shard, shard_of, wait_for_others
from vlmprune.evals.store import Store

pytestmark = pytest.mark.xdist_group("shards")  # one process makes what they compare with

SWEEP = ("sweep", "--method", "cls", "--budget", "0.25", "--seeds", "1", "--images", "4", "--batch", "8", "--threads", "1")


# --- which process ---------------------------------------------------------------------------------------------------


def test_rank_and_number_of_processes():
    assert shard_of({}) == ALONE
    assert shard_of({"RANK": "2", "WORLD_SIZE": "3"}) == Shard(2, 3)
    launched = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
    shard = shard_of(launched)
    assert shard == Shard(5, 8, launched=True, local=1)
    assert (shard.device("cuda"), shard.device("cpu"), ALONE.device("cuda")) == ("cuda:1", "cpu", "cuda")
    assert [shard.speaks, Shard(0, 2, launched=True).speaks, Shard(1, 2).speaks] == [False, True, True]


@pytest.mark.parametrize(
    "environment", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}]
)
def test_a_rank_that_cannot_be_is_refused(environment):
    with pytest.raises(UsageError, match="several processes need WORLD_SIZE, and RANK from 0 to WORLD_SIZE − 1; found"):
        shard_of(environment)


def test_every_part_is_dealt_to_one_process():
    shards = [Shard(rank, 3) for rank in range(3)]
    assert all(sum(shard.mine(number) for shard in shards) == 1 for number in range(20))


def test_several_processes_need_a_folder(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert vlmprune(monkeypatch, *SWEEP) == 2
    assert "give --out FOLDER: the processes share their answers in it." in capsys.readouterr().err


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_the_first_waits_for_the_others_and_says_for_whom(tmp_path):
    keys = [(n,) for n in range(5)]
    first, other = Store(tmp_path, {}), Store(tmp_path, {})
    first.add_all({key: {} for key in keys[::2]})
    said = []

    def tick(step):
        said.append(step)
        if len(said) in (2, 4):
            other.add(keys[len(said) - 1], {})

    wait_for_others(first, keys, Shard(0, 2), minutes=1, tick=tick)
    assert set(said) == {"waiting for rank 1"}
    assert len(first) == 5


def test_the_wait_has_an_end(tmp_path):
    store = Store(tmp_path, {})
    with pytest.raises(UsageError, match=r"3 of 3 parts are missing, of ranks 0, 1, 2, and none was added for 0 minutes: run"):
        wait_for_others(store, [(n,) for n in range(3)], Shard(0, 3), minutes=0)


def test_other_code_on_another_machine_is_noticed_while_waiting(tmp_path):
    """Red: the first waits for answers that never count."""
    store, other = Store(tmp_path, {}, "new"), Store(tmp_path, {}, "old")
    with pytest.raises(UsageError, match="another process adds answers of another version of vlmprune"):
        wait_for_others(store, [(0,)], Shard(0, 2), minutes=1, tick=lambda step: other.add((0,), {}))


# --- real processes --------------------------------------------------------------------------------------------------


def command(out: Path, *more: str) -> list[str]:
    return [*more, "-m", "vlmprune", *SWEEP, "--out", str(out)]


def start(arguments: list[str], **environment: object) -> subprocess.Popen:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}}
    return subprocess.Popen(
        [sys.executable, *arguments], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def end(process: subprocess.Popen, code: int = 0) -> str:
    said, _ = process.communicate(timeout=200)
    assert process.returncode == code, said
    return said


def lines(out: Path) -> list[dict]:
    """The rows of all processes, each as often as it was answered."""
    files = sorted((out / "sweep-answers").glob("answers-*.jsonl"))
    found = [json.loads(line) for file in files for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in found if "row" in line]


def kill_after_an_answer(pid: int, out: Path) -> None:
    """SIGKILL, as soon as there is an answer in the folder and before there are all."""
    until = time.monotonic() + 100
    while not lines(out):
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert not (out / FILE).exists(), "too late"


def numbers(out: Path) -> dict:
    """Everything in `sweep.json` but when, how and how fast it was measured."""
    found = json.loads((out / "sweep.json").read_text())
    for row in (found["unpruned"], *found["rows"], *found["controls"]):
        del row["seconds"]
    return {key: value for key, value in found.items() if key not in ("date", "command", "environment")}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The folder of one process: this one."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        assert vlmprune(patch, *SWEEP, "--out", out) == 0
    return out


@pytest.fixture(autouse=True)
def threads():
    """The command sets them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(out: Path, alone: Path) -> None:
    assert (out / FILE).read_bytes() == (alone / FILE).read_bytes()
    assert numbers(out) == numbers(alone)


def test_torchrun_goes_on_after_a_worker_was_killed(alone, tmp_path):
    """Red: samples instead of batches are dealt out; what the killed one had answered is lost; or a result is half written."""
    launcher = start(command(tmp_path, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"))
    while len(workers := children(launcher.pid)) < 2:
        time.sleep(0.05)
    kill_after_an_answer(workers[1], tmp_path)
    answered = len(lines(tmp_path))
    end(launcher)
    same(tmp_path, alone)
    parts = len(lines(alone))
    assert 0 < answered < parts
    assert len(lines(tmp_path)) <= parts + 2, "at most what two processes were at is answered twice"


def test_processes_by_hand_on_a_shared_folder(alone, tmp_path, monkeypatch, capsys):
    """Rank 1 is killed, rank 0 waits in vain and says so; the same commands again end with the same bytes."""
    killed = start(command(tmp_path), RANK=1, WORLD_SIZE=2)
    kill_after_an_answer(killed.pid, tmp_path)
    end(killed, -signal.SIGKILL)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert vlmprune(monkeypatch, *SWEEP, "--out", tmp_path, "--wait", 0) == 2
    assert "parts are missing, of rank 1, and none was added for 0 minutes" in capsys.readouterr().err
    again = start(command(tmp_path), RANK=1, WORLD_SIZE=2)
    assert vlmprune(monkeypatch, *SWEEP, "--out", tmp_path) == 0
    assert "rank 1 of 2 has answered its parts; rank 0 writes the result." in end(again)
    same(tmp_path, alone)
    assert len(lines(tmp_path)) == len(lines(alone)), "something was asked twice"


def test_eval_is_shared_too(monkeypatch, capsys, tmp_path):
    """One rank after the other in this process, as on two machines of which one comes late."""
    arguments = ("eval", "--recipe", "cls:fraction=0.25", "--images", 3, "--batch", 8, "--out")
    assert vlmprune(monkeypatch, *arguments, tmp_path / "alone") == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert vlmprune(monkeypatch, *arguments, tmp_path / "shared") == 0
    assert (tmp_path / "shared" / FILE).read_bytes() == (tmp_path / "alone" / FILE).read_bytes()
    assert len(list((tmp_path / "shared" / "eval-answers").glob("answers-*.jsonl"))) == 2
    assert "rank 1 of 2 has answered its parts" in capsys.readouterr().err


def test_two_sweeps_at_once_in_one_folder(alone, tmp_path, monkeypatch):
    """Red: both answer everything, or one spoils the other's file."""
    other = start(command(tmp_path))
    while not lines(tmp_path):
        time.sleep(0.01)
    assert vlmprune(monkeypatch, *SWEEP, "--out", tmp_path) == 0
    end(other)
    same(tmp_path, alone)
    files = sorted((tmp_path / "sweep-answers").glob("answers-*.jsonl"))
    assert len(files) == 2, "one had answered everything before the other began"
    keys = [json.dumps(line["key"]) for line in lines(tmp_path)]
    assert len(set(keys)) == len(lines(alone))
    assert len(keys) <= len(set(keys)) + 2, "the two did not share the work"
