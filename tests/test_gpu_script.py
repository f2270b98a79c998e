"""`benchmarks/gpu.py`: its whole path runs without a GPU, its goals and budget are told honestly, its checks can fail."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import make_inputs, shared

import vlmprune
from vlmprune.evals.random_models import Shape

ROOT = Path(vlmprune.__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch):
    """Imports a module of the script as the script itself does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def session(gpu, path: Path, budget: float = 60.0):
    return gpu.Session("cpu", True, budget, path / "gpu", "python benchmarks/gpu.py")


def test_rehearsal(tmp_path):
    """All ops, timings, shapes, waits and the picture are reached; every kernel is right; no number is told as measured."""
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--out", str(tmp_path / "gpu")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["rehearsal"]
    assert {step["state"] for step in found["steps"]} == {"done"}
    ops = {"attention_rows", "attention_mass", "flow_score", "gather_tokens", "gather_all", "greedy_order", "determinant_order"}
    ops |= {"grouped_attention", "scored_attention", "column_means"}
    assert {check["op"] for check in found["checks"]} == ops
    assert {check["dtype"] for check in found["checks"]} == {"bfloat16", "float32"}
    assert all(check["right"] for check in found["checks"])
    assert len(found["goals"]) >= 15
    assert {goal["state"] for goal in found["goals"]} == {"rehearsed, not measured"}
    assert all(goal["found"] is None for goal in found["goals"])
    assert all(timing["ms"] is None and timing["bytes_moved"] > 0 for timing in found["kernels"]["timings"])
    assert not any("faster" in row or "times" in row for row in found["models"])
    long = {row["recipe"]: row["visual"] for row in found["models"] if row["shape"] == "qwen3-vl-8b, video"}
    assert (long["un-pruned"], long["evs:fraction=0.1"], long["divprune:fraction=0.25"]) == (160, 16, 40)
    assert "flowcut:tokens=64" in found["synchronisations"]
    assert Image.open(tmp_path / "gpu.png").width > 1000


def test_without_a_gpu_it_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is no GPU here: pass --rehearse" in done.stderr


def test_steps_over_budget_are_listed(script, tmp_path):
    made = session(script("gpu"), tmp_path)
    made.step("small", 1, lambda: "fine")
    made.step("large", 1000, lambda: pytest.fail("it was run"))
    made.step("broken", 1, lambda: 1 / 0)
    assert [step.state for step in made.steps] == ["done", "not run", "failed"]
    assert "needs about 1000 s" in made.steps[1].note
    assert made.steps[2].note == "ZeroDivisionError: division by zero"
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["name"] for step in written["steps"]] == ["small", "large", "broken"]
    summary = "\n".join(script("gpu").summary(made))
    assert "NOT RUN" in summary
    assert "FAILED" in summary


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_slow_plans(script, monkeypatch, tmp_path, seconds_of_a_run: float):
    """Two plans of five rounds, two names each, whose runs take this long by a fake clock; a budget of 100 s."""
    gpu, models, clock = script("gpu"), script("gpu_models"), Clock()
    made = gpu.Session("cpu", False, 100.0, tmp_path / "gpu", "", clock=clock)
    recipe = "random:tokens=4"
    plans = [models.Plan("llava-1.5-7b", batch, 5, 2, 30, (models.Wanted(recipe, "ttft", 1.0),)) for batch in (1, 2)]
    monkeypatch.setattr(models, "PLANS", plans)
    monkeypatch.setattr(gpu, "count_waits", lambda *_: None)
    model = shared("llava")
    monkeypatch.setattr(gpu.Loaded, "get", lambda *_: model)
    inputs = make_inputs("llava", model, [["text5", "image", "text4"]])
    monkeypatch.setattr(Shape, "inputs", lambda *_: inputs)
    run = models.bench._run

    def slow(*arguments):
        clock.now += seconds_of_a_run
        return run(*arguments)

    monkeypatch.setattr(models.bench, "_run", slow)
    gpu.run_models(made)
    return made, clock


def test_a_step_that_runs_over_ends_with_its_rounds(script, monkeypatch, tmp_path):
    """Four rounds of 26 s are past 100 s: the fifth is left out, the rest is not run."""
    made, clock = run_slow_plans(script, monkeypatch, tmp_path, 13.0)
    assert [step.state for step in made.steps] == ["done", "not run"]
    assert "4 of 5 rounds, the budget was spent" in made.steps[0].note
    assert {row["rounds"] for row in made.models} == {4}
    assert [goal.state == "not run" for goal in made.goals] == [False, True]
    assert clock.now == 104


def test_a_step_without_three_rounds_is_stopped(script, monkeypatch, tmp_path):
    """Two rounds of 60 s: the grace ends in the third, before there is a result."""
    made, clock = run_slow_plans(script, monkeypatch, tmp_path, 30.0)
    assert [step.state for step in made.steps] == ["stopped", "not run"]
    assert "after the budget was spent" in made.steps[0].note
    assert [goal.state for goal in made.goals] == ["not run", "not run"]
    assert clock.now == 150
    assert "STOPPED" in "\n".join(script("gpu").summary(made))
    made.step("picture", 0, lambda: "drawn")
    assert made.steps[-1].state == "done"


def test_what_a_kernel_breaks_is_its_own_process(script):
    """A lost process is told, a slow one is stopped, an error comes back; the next work has a new process."""
    apart_module = script("gpu_apart")
    apart = apart_module.Apart()
    try:
        assert apart.call(60, abs, -1) == 1
        first = apart.process.pid
        assert apart.call(60, os.getpid) == first
        with pytest.raises(RuntimeError, match="its process ended with exit code 7"):
            apart.call(60, os._exit, 7)
        assert apart.call(60, os.getpid) not in (first, os.getpid())
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            apart.call(60, divmod, 1, 0)
        with pytest.raises(apart_module.OutOfTimeError, match="stopped after 1 s"):
            apart.call(1, time.sleep, 60)
        assert apart.process.exitcode is not None
        assert apart.call(60, abs, -2) == 2
    finally:
        apart.end()


@pytest.mark.parametrize(
    ("wanted", "more", "found", "state"),
    [(2, True, 2.5, "met"), (2, True, 1.5, "missed"), (1, False, 0.5, "met"), (1, False, 2, "missed")],
)
def test_goals(script, wanted, more, found, state):
    goal = script("gpu").Goal("a goal", wanted, "×", more)
    assert (goal.state, goal.share) == ("not run", None)
    goal.meet(found)
    assert goal.state == state
    assert (goal.share >= 1) == (state == "met")


def test_picture_of_numbers(script, tmp_path):
    gpu, kernels = script("gpu"), script("gpu_kernels")
    made = session(gpu, tmp_path)
    made.rehearsal = False
    made.goals = [gpu.Goal("met", 2, "×", True), gpu.Goal("not run", 1, "ms", False)]
    made.goals[0].meet(3.0)
    made.kernels = {"timings": [kernels.Timing("an op", 0.2, 0.8, 10, 10, 0.1)]}
    ratio = {"times": 2.0, "low": 1.5, "high": 2.5}
    made.models = [
        {"shape": "llava", "recipe": "un-pruned"},
        {"shape": "llava", "recipe": "random", "batch": 4, "faster": {"ttft": ratio, "tpot": ratio}},
    ]
    gpu.draw(made, tmp_path / "drawn.png")
    assert Image.open(tmp_path / "drawn.png").width > 1000
    assert made.kernels["timings"][0].bandwidth_share == 0.5


def zeros_at_the_end(x, rows, valid=None, impl="auto"):
    """A kernel that forgets to write its last row."""
    taken = torch.empty(*x.shape[:-2], rows.shape[1], x.shape[-1])
    taken[..., :-1, :] = x.gather(-2, rows[..., None].expand(-1, -1, x.shape[-1]))[..., :-1, :]
    return taken if impl == "triton" else x.gather(-2, rows[..., None].expand(-1, -1, x.shape[-1]))


def test_a_wrong_kernel_is_seen(script):
    """Red: poison is not looked at, NaN passes for a small error, or the limit is above any error."""
    kernels = script("gpu_kernels")
    inputs = kernels.Inputs("cpu", kernels.REHEARSAL, torch.float32, 8)
    x, rows = inputs.normal(2, 9, 8), inputs.kept(2, 9, 4)
    check = kernels.compare("forgetful", "", zeros_at_the_end, (x, rows), inputs, exact=True)
    assert not check.right

    def off(x, impl="auto"):
        return x.double().sum(-1).float() * (1 + 1e-5) if impl == "triton" else x.sum(-1)

    def missing(x, impl="auto"):
        total = x.sum(-1)
        if impl == "triton":
            written, total = total, torch.empty(x.shape[:-1])
            total[:, :-1] = written[:, :-1]
        return total

    def right(x, impl="auto"):
        return x.double().sum(-1).to(x.dtype) if impl == "triton" else x.sum(-1)

    assert not kernels.compare("off", "", off, (x,), inputs, exact=False).right
    found = kernels.compare("missing", "", missing, (x,), inputs, exact=False)
    assert found.error != found.error  # NaN, not what memory happened to hold
    assert not found.right
    assert kernels.compare("right", "", right, (x,), inputs, exact=False).right
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_wrong_selection_is_seen(script):
    kernels = script("gpu_kernels")
    random = torch.Generator().manual_seed(0)
    features, weight = torch.randn(1, 20, 8, generator=random), torch.rand(1, 20, generator=random)
    for order, shortfall, arguments in (
        (kernels.greedy_order(features, 5), kernels._short_of_max_min, (features,)),
        (kernels.determinant_order(features, weight, 5), kernels._short_of_determinant, (features, weight)),
    ):
        assert shortfall(order, *arguments) < 1e-6
        assert shortfall(order.flip(1), *arguments) > 1e-3
        twice = order.clone()
        twice[0, 3] = twice[0, 1]
        assert not shortfall(twice, *arguments) <= 1  # NaN


def test_waits_are_counted_where_they_are_asked_for(script, monkeypatch):
    models = script("gpu_models")
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text5", "image", "text4"]])
    assert not any("vlmprune" in place for place in models.count_synchronisations(model, inputs, "un-pruned"))

    def asking(self, see, keep):
        int(see.position.sum())
        return torch.arange(keep).expand(see.images, keep)

    before = models.count_synchronisations(model, inputs, "uniform:tokens=4")
    monkeypatch.setattr(vlmprune.Uniform, "select", asking)
    after = models.count_synchronisations(model, inputs, "uniform:tokens=4")
    assert sum(after.values()) == sum(before.values()) + 1
