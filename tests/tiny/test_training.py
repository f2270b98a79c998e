"""The training script runs end to end, and a killed run continues as if nothing had happened."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vlmprune.tiny import train
from vlmprune.tiny.architecture import build_model
from vlmprune.tiny.scenes import GRID, PATCH, compose, held_out
from vlmprune.tiny.training import loop
from vlmprune.tiny.training.code import FIELDS, SCALE, WIDTH, directions, target
from vlmprune.tiny.training.language import LanguageStage, read
from vlmprune.tiny.training.loop import Schedule, Team, batch_seed, replace_file, run_stage
from vlmprune.tiny.training.optimiser import Optimiser, orthogonalise
from vlmprune.tiny.training.packing import _distribution, pack, pose
from vlmprune.tiny.training.vision import CROWDED


def test_code_directions_are_orthonormal() -> None:
    rows = directions(128)
    assert torch.allclose(rows @ rows.T, torch.eye(WIDTH), atol=1e-5)


def test_no_object_is_described_by_many_patches() -> None:
    for scene in held_out(60, "dev"):
        known = target(scene)
        for index, thing in enumerate(scene.objects):
            own = known.object_of == index
            assert 1 <= (known.core & own).sum() <= 4
            assert (known.centre & own).sum() == 1
            assert known.centre[thing.y // PATCH * GRID + thing.x // PATCH]
        told = known.code[:, FIELDS["shape"]].any(1)
        assert (told == known.core).all()
        if scene.sign:
            per_patch = (known.slots >= 0).sum(1)
            assert (per_patch == 3).sum() <= 0.25 * (per_patch > 0).sum() + 1
            assert (known.slots >= 0).any(0).all()


def test_code_says_what_is_there() -> None:
    scene = compose(11, CROWDED)
    known = target(scene)
    places = np.array([thing.x for thing in scene.objects])
    core = known.core
    x = known.code[core, FIELDS["xy"]][:, 0] / 1.5 * (GRID * PATCH - 1) / 2 + (GRID * PATCH - 1) / 2
    assert np.allclose(x, places[known.object_of[core]], atol=1e-3)


def test_packed_questions_see_only_the_picture_and_themselves() -> None:
    """The training forward equals the stock forward on one question at a time."""
    torch.manual_seed(0)
    model = build_model()
    stage = LanguageStage(model, seed=0, batch=1)
    scene = next(held_out(1, "dev"))
    known = target(scene)
    questions = pose(scene, random.Random(0))
    visual = torch.from_numpy(known.code)[None] @ directions(128) * SCALE
    packed = pack([scene], [known], [questions])
    with torch.no_grad():
        whole = model.lm_head(model.model.language_model.norm(read(model, visual, packed)))
        start = 0
        for question in questions:
            alone = pack([scene], [known], [[question]])
            words = len(question.text.split()) + len(question.answer.split()) + 1
            ids = torch.cat([torch.tensor([[1, 5]]), torch.full((1, GRID * GRID), 4), alone.ids[:, :words]], 1)
            embeddings = model.get_input_embeddings()(ids)
            embeddings[:, 2 : 2 + GRID * GRID] = visual
            stock = model.lm_head(model.model.language_model(inputs_embeds=embeddings).last_hidden_state)
            assert torch.allclose(whole[:, start : start + words], stock[:, -words:], atol=2e-4)
            start += words
    assert stage.name == "language"


def test_distributions_are_distributions() -> None:
    patches = np.zeros(GRID * GRID, np.float32)
    assert _distribution(patches)[0] == 1
    patches[[3, 9]] = 1
    wanted = _distribution(patches, start=2.0)
    assert wanted.sum() == pytest.approx(1)
    assert wanted[[0, 5, 11]] == pytest.approx([0.5, 0.25, 0.25])


def test_orthogonalise_flattens_singular_values() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(2, 16, 40)))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_learning_rate_warms_up_and_decays() -> None:
    weight, bias = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))
    rates = Optimiser([weight], [bias], 1.0, 1.0, 0.0, steps=100, decay_from=0.5)
    assert rates._rate(0) < rates._rate(9) == 1.0
    assert rates._rate(50) == pytest.approx(1.0)
    assert rates._rate(99) < 0.05


def test_batches_depend_on_every_part_of_their_place() -> None:
    places = [(0, "vision", 0, 0), (1, "vision", 0, 0), (0, "language", 0, 0), (0, "vision", 1, 0), (0, "vision", 0, 1)]
    assert len({batch_seed(*place) for place in places}) == len(places)


class _Line:
    """A stage that fits a line, to test the loop without the model."""

    name = "line"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.trained = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))

    def loss(self, seed: int, progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.from_numpy(np.random.default_rng(seed).standard_normal((16, 3), np.float32))
        return (self.trained(x) - x.sum(1, keepdim=True)).square().mean(), {}


def test_a_resumed_stage_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    schedule = Schedule(steps=30, muon_lr=0.02, adam_lr=0.01, weight_decay=0.1, decay_from=0.5)
    states: dict[int, dict] = {}

    def keep(state: dict) -> None:
        file = tmp_path / f"{state['step']}.pt"
        torch.save(state, file)
        states[state["step"]] = torch.load(file)

    def run(state: dict | None) -> dict[str, torch.Tensor]:
        stage = _Line()
        run_stage(
            stage, schedule, seed=0, team=Team(0, 1), precision="fp32", state=state,
            save=keep, save_every=10, log=tmp_path / "log.jsonl",
        )  # fmt: skip
        return {name: weight.clone() for name, weight in stage.trained.state_dict().items()}

    whole = run(None)
    again = run(states[20])
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 30


def test_training_runs_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlmprune.tiny.train", "--out", str(tmp_path), "--steps-scale", "0.001"]
    done = subprocess.run([*command, "--test-images", "2"], check=True, timeout=300, capture_output=True, text=True)
    assert "reading" in done.stdout
    facts = json.loads((tmp_path / "checkpoint" / "PROVENANCE.json").read_text())
    assert {"command", "training_minutes", "seed", "schedules", "versions", "test"} <= facts.keys()
    assert (tmp_path / "checkpoint" / "model.safetensors").stat().st_size < 15_000_000


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("stop_at", [1, 3], ids=["in the first stage", "in the second stage"])
@pytest.mark.usefixtures("restore_threads")
def test_a_killed_run_continues_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    monkeypatch.setattr(train, "IMAGES_PER_STEP", {"vision": 4, "language": 2})

    def run(out: str, *extra: str) -> dict[str, torch.Tensor]:
        (tmp_path / out).mkdir(exist_ok=True)
        options = ["--out", str(tmp_path / out), "--steps-scale", "0.001", "--save-every", "1", "--workers", "1"]
        train.work(0, train.parse([*options, *extra]))
        return load_file(tmp_path / out / "checkpoint" / "model.safetensors")

    whole = run("whole")
    saves = []

    def die(path: Path, write: Callable[[Path], None]) -> None:
        replace_file(path, write)
        saves.append(path)
        if len(saves) == stop_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "replace_file", die)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    resumed = run("stopped", "--resume")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
