"""The training loop shared by both stages: data-parallel, scheduled by steps, resumable at any step."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from vlmprune.tiny.scenes import TRAINING_SEEDS
from vlmprune.tiny.training.optimiser import Optimiser, split_parameters

_REPORT_EVERY = 50


class Stage(Protocol):
    """A loss over freshly drawn data."""

    name: str

    @property
    def trained(self) -> nn.Module:
        """Every module that the stage may change."""
        ...

    def loss(self, seed: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Loss of the batch of `seed`, and numbers to report; `progress` rises from 0 to 1 over the stage."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Length and rates of a stage."""

    steps: int
    muon_lr: float
    adam_lr: float
    weight_decay: float
    decay_from: float


@dataclass(frozen=True)
class Team:
    """This process among the data-parallel workers."""

    rank: int
    size: int

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace gradients by their mean over the workers, as one message."""
        if self.size == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)


def batch_seed(seed: int, stage: str, step: int, rank: int) -> int:
    """First scene seed of a batch; it depends on its arguments only, so that a resumed run has the same data."""
    words = np.random.SeedSequence([seed, *stage.encode(), step, rank]).generate_state(1, np.uint64)
    return int(words[0]) % (TRAINING_SEEDS - (1 << 20))


def precision_context(precision: str) -> contextlib.AbstractContextManager:
    """Autocast to bfloat16 for `"bf16"`, nothing for `"fp32"`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def run_stage(
    stage: Stage,
    schedule: Schedule,
    *,
    seed: int,
    team: Team,
    precision: str,
    state: dict[str, Any] | None,
    save: Callable[[dict[str, Any]], None],
    save_every: int,
    log: Path,
) -> None:
    """Train one stage from its start, or from `state` as passed to `save` by an earlier run."""
    matrices, others = split_parameters(stage.trained)
    optimiser = Optimiser(
        matrices, others, schedule.muon_lr, schedule.adam_lr, schedule.weight_decay, schedule.steps, schedule.decay_from
    )
    first = 0
    if state is not None:
        stage.trained.load_state_dict(state["trained"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
    recent = _Means()
    bar = tqdm(total=schedule.steps, initial=first, desc=stage.name, disable=team.rank > 0, mininterval=5, dynamic_ncols=True)
    for step in range(first, schedule.steps):
        with precision_context(precision):
            loss, metrics = stage.loss(batch_seed(seed, stage.name, step, team.rank), step / schedule.steps)
        loss.backward()
        team.average_gradients(optimiser.parameters)
        with precision_context(precision):
            optimiser.step(step)
        recent.add({"loss": loss.item(), **metrics})
        bar.update()
        done = step + 1
        if team.rank == 0 and (done % _REPORT_EVERY == 0 or done == schedule.steps):
            means = recent.take()
            bar.set_postfix({"loss": means["loss"]})
            with log.open("a") as lines:
                lines.write(json.dumps({"stage": stage.name, "step": done, "time": round(time.time()), **means}) + "\n")
        if team.rank == 0 and (done % save_every == 0 or done == schedule.steps):
            save({"step": done, "trained": stage.trained.state_dict(), "optimiser": optimiser.state_dict()})
    bar.close()


class _Means:
    """Means of reported numbers since the last `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._sums.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        means = {name: round(float(np.mean(values)), 4) for name, values in self._sums.items()}
        self._sums.clear()
        return means


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file such that a killed run leaves the old one or the new one, whole."""
    fresh = path.with_suffix(".new")
    write(fresh)
    os.replace(fresh, path)


@contextlib.contextmanager
def joined(rank: int, size: int, meeting_point: Path) -> Iterator[Team]:
    """Join the other workers through a file; each has one compute thread, because they share the cores."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size)
    try:
        yield Team(rank, size)
    finally:
        if size > 1:
            dist.destroy_process_group()
            meeting_point.unlink(missing_ok=True)
