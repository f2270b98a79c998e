"""What `gpu.py` measures of whole models: speed against goals, and how often a prefill makes the host wait for the GPU."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlmprune
from vlmprune.evals import bench

ROOT = Path(__file__).resolve().parent.parent
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_consecutive", "is_nonzero")
"""Operations that give a number, or a size, to the host."""


@dataclass(frozen=True)
class Wanted:
    """A goal: `recipe` makes `phase` at least `times` faster; 0 where there is no goal."""

    recipe: str
    phase: str
    times: float


@dataclass(frozen=True)
class Plan:
    """One batch of one shape.

    Attributes:
        seconds: estimated time on an H200, un-pruned rounds included.
    """

    shape: str
    batch: int
    rounds: int
    new_tokens: int
    seconds: float
    wanted: tuple[Wanted, ...]

    @property
    def name(self) -> str:
        return f"{self.shape}, batch {self.batch}"

    @property
    def recipes(self) -> list[str]:
        return list(dict.fromkeys(wanted.recipe for wanted in self.wanted))


PLANS = (
    Plan(
        "llava-next-7b",
        4,
        5,
        8,
        45,
        (
            Wanted("flowcut:tokens=160", "ttft", 5.0),
            Wanted("divprune:tokens=160", "ttft", 6.5),
            Wanted("visionzip:tokens=160", "ttft", 6.5),
        ),
    ),
    Plan(
        "llava-next-7b",
        32,
        3,
        16,
        90,
        (Wanted("flowcut:tokens=160", "tpot", 2.5), Wanted("divprune:tokens=160", "tpot", 2.5)),
    ),
    Plan("llava-1.5-7b", 1, 7, 8, 25, (Wanted("flowcut:tokens=64", "ttft", 2.2), Wanted("divprune:tokens=64", "ttft", 2.2))),
    Plan("llava-1.5-7b", 8, 5, 8, 25, (Wanted("flowcut:tokens=64", "ttft", 3.3), Wanted("divprune:tokens=64", "ttft", 3.3))),
    Plan("qwen2.5-vl-7b", 1, 5, 8, 30, (Wanted("flowcut:tokens=142", "ttft", 1.8), Wanted("divprune:tokens=142", "ttft", 1.8))),
    # Beyond the goals, as far as the budget goes
    Plan("qwen2.5-vl-7b", 8, 3, 8, 40, (Wanted("flowcut:tokens=142", "ttft", 0), Wanted("divprune:tokens=142", "ttft", 0))),
    Plan("llava-1.5-7b", 32, 3, 8, 40, (Wanted("flowcut:tokens=64", "ttft", 0), Wanted("divprune:tokens=64", "ttft", 0))),
    Plan("llava-next-7b", 1, 5, 8, 30, (Wanted("flowcut:tokens=160", "ttft", 0), Wanted("divprune:tokens=160", "ttft", 0))),
)
"""In order of importance. Plans of one shape follow each other, so that it is built once."""

WAITING = ("un-pruned", "flowcut:tokens=64", "divprune:tokens=64", "visionzip:tokens=64", "fastv:layer=2,tokens=64", "var")
"""Recipes whose synchronisations are counted, on LLaVA-1.5."""


def run_plan(
    model: Any, inputs: dict[str, Any], plan: Plan, rehearsal: bool, enough: Callable[[], bool], tick: Callable[[], None]
) -> list[bench.Measured]:
    """The un-pruned model and the plan's recipes, in interleaved rounds; `enough` and `tick` as in `bench.measure`."""
    rounds, tokens = (1, 2) if rehearsal else (plan.rounds, plan.new_tokens)
    return bench.measure(model, inputs, plan.recipes, rounds, tokens, tick, enough)


# -- waiting for the GPU -----------------------------------------------------------------------------------------------


def count_synchronisations(model: Any, inputs: dict[str, Any], recipe: str) -> dict[str, int]:
    """How often one prefill makes the host wait, by our line that causes it; "transformers" for all others.

    On a GPU torch itself reports every synchronising call (`torch.cuda.set_sync_debug_mode`). On a CPU, operations that give
    numbers to the host are counted.
    """
    found: Counter[str] = Counter()
    wrapped = recipe != bench.UNPRUNED
    run = vlmprune.wrap(model, recipe) if wrapped else None
    try:
        with torch.no_grad():  # in inference mode, numbers given to the host are not counted on a CPU
            model(**inputs, use_cache=True, logits_to_keep=1)  # compiles kernels and creates what is created lazily
            with _reported(found) if model.device.type == "cuda" else _Counting(found):
                model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        if run is not None:
            run.remove()
    return dict(found)


@contextmanager
def _reported(found: Counter[str]) -> Iterator[None]:
    def count(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            found[_cause()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class _Counting(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name.removeprefix("aten::") in SYNCHRONISING:
            self.found[_cause()] += 1
        return function(*args, **(kwargs or {}))


def _cause() -> str:
    """The innermost line of ours on the stack, unless a line of transformers is further in."""
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        path = Path(frame.f_code.co_filename)
        if "transformers" in path.parts:
            return "transformers"
        resolved = path.resolve()
        if resolved.is_relative_to(ROOT) and resolved.relative_to(ROOT).parts[0] in ("vlmprune", "kernels", "adapters"):
            return f"{resolved.relative_to(ROOT)}:{line}"
    return "elsewhere"
