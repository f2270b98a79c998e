"""Compiled decoding in a static cache, plain and pruned: graphs, tokens, and time per token. `decoding.py --compiled` runs it.

Random models in the shapes of LLaVA, Qwen2.5-VL and Qwen3-VL, and one picture of 576 visual tokens. The plain model and a
wrapped copy of it are compiled by inductor, each decoding step as one whole graph (torch refuses a graph that breaks), and make
their steps in turn, in changing order. "CPU time" is that of the one thread which computes: other work on the machine disturbs
it less than the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from statistics import median
from typing import Any

import numpy as np
import torch
import torch._dynamo
from native import three  # benchmarks/ is no package: its scripts find each other
from native_shapes import SIDE, VISUAL, compiled_shapes
from torch._dynamo.utils import counters
from transformers import StaticCache

import vlmprune
from vlmprune.evals.results import Result
from vlmprune.show.stats import drawn, interval
from vlmprune.show.table import code, table

RECIPES = ("random:layer=0,tokens=64", "fastv:layer=2,tokens=64", "divprune:tokens=64+zerotuning:gain=2")
WORDS, ROOM, TOKENS = 75, 720, 8
COLUMNS = (
    "model",
    "recipe",
    "graphs",
    "un-pruned",
    "same tokens",
    "× as fast by CPU time (95 %)",
    "by the clock (95 %)",
    "CPU ms per token",
    "un-pruned CPU ms",
    "cache MB",
)


def prompt_of(name: str) -> dict[str, Any]:
    """One picture and 75 words."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(10, 4096, (WORDS,), generator=generator)
    ids = torch.cat((words[:35], torch.full((VISUAL,), 1), words[35:]))[None]
    shape = compiled_shapes()[name]
    return {"input_ids": ids, **shape.picture(), **shape.rest(ids, SIDE, SIDE)}


class Side:
    """A model, and its compiled steps."""

    def __init__(self, model: Any) -> None:
        self.model, self.compiled = model, torch.compile(model, fullgraph=True, dynamic=False)
        self.four = "image_grid_thw" in model.base_model.forward.__code__.co_varnames  # rows of position ids, for M-RoPE
        self.graphs = 0

    def prefill(self, inputs: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        """A new cache with the prompt, and its last logits."""
        cache = StaticCache(self.model.config, ROOM)
        return cache, self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def step(self, run: Any, cache: Any, word: torch.Tensor, length: int) -> torch.Tensor:
        """The logits after one more word."""
        shape = (4, 1, 1) if self.four else (1, 1)
        return run(
            input_ids=word, position_ids=torch.full(shape, length), past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]

    def tokens(self, run: Any, inputs: dict[str, Any]) -> list[int]:
        """Greedy tokens."""
        cache, logits = self.prefill(inputs)
        found, length = [], inputs["input_ids"].shape[1]
        for number in range(TOKENS):
            found.append(int(logits.argmax()))
            logits = self.step(run, cache, torch.tensor([[found[-1]]]), length + number)
        return found

    def compile(self, inputs: dict[str, Any]) -> bool:
        """Compile, count the graphs of two conversations, and say whether both decode what the model itself decodes."""
        before = counters["stats"]["unique_graphs"]
        same = all(self.tokens(self.compiled, inputs) == self.tokens(self.model, inputs) for _ in range(2))
        self.graphs = counters["stats"]["unique_graphs"] - before
        return same


Pair = dict[str, tuple[float, float]]
"""Wall-clock and CPU seconds of one step, of "plain" and of "ours"."""


def compared(plain: Side, ours: Side, inputs: dict[str, Any], steps: int, turn: int) -> list[Pair]:
    """Steps of the plain model, and of ours, in pairs."""
    sides, length = {"plain": plain, "ours": ours}, inputs["input_ids"].shape[1]
    caches, took = {name: side.prefill(inputs)[0] for name, side in sides.items()}, []
    for number in range(steps + 2):
        pair: Pair = {}
        for name in ("plain", "ours") if (number + turn) % 2 else ("ours", "plain"):
            wall, cpu = time.perf_counter(), time.thread_time()
            sides[name].step(sides[name].compiled, caches[name], torch.tensor([[20 + number]]), length + number)
            pair[name] = (time.perf_counter() - wall, time.thread_time() - cpu)
        if number > 1:  # the first pairs warm up
            took.append(pair)
    return took


def spread(rounds: list[list[Pair]], clock: int) -> dict[str, float]:
    """Over rounds, each with the median of its pairs: the median, and the 95 % interval of a bootstrap."""
    ratios = np.array([median(pair["plain"][clock] / pair["ours"][clock] for pair in pairs) for pairs in rounds])
    low, high = interval(np.median(ratios[drawn(len(ratios))], axis=1))
    return {"median": float(np.median(ratios)), "low": low, "high": high}


def measure(names: list[str], recipes: list[str], rounds: int, steps: int, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """One row per model and recipe."""
    rows = []
    for name in names:
        torch._dynamo.reset()
        inputs, model = prompt_of(name), compiled_shapes()[name].build()
        plain, ours = Side(model), Side(deepcopy(model))
        plain.compile(inputs)
        for recipe in recipes:
            with vlmprune.wrap(ours.model, recipe) as run:
                same = ours.compile(inputs)
                report = run.report()
                found = [compared(plain, ours, inputs, steps, turn) for turn in range(rounds)]
            rows.append(
                {
                    "model": name,
                    "recipe": recipe,
                    "graphs": ours.graphs,
                    "plain_graphs": plain.graphs,
                    "same_tokens": same,
                    "ratio": spread(found, 0),
                    "cpu_ratio": spread(found, 1),
                    "cpu_ms": 1e3 * median(pair["ours"][1] for pairs in found for pair in pairs),
                    "plain_cpu_ms": 1e3 * median(pair["plain"][1] for pairs in found for pair in pairs),
                    "static_bytes": report.static_bytes,
                    "static_bytes_unpruned": report.static_bytes_unpruned,
                }
            )
            tick()
    return rows


def result(numbers: dict[str, Any]) -> Result:
    """The table."""
    cells = [
        [
            row["model"],
            code(row["recipe"]),
            str(row["graphs"]),
            str(row["plain_graphs"]),
            "yes" if row["same_tokens"] else "NO",
            three(row["cpu_ratio"]),
            three(row["ratio"]),
            f"{row['cpu_ms']:.2f}",
            f"{row['plain_cpu_ms']:.2f}",
            f"{row['static_bytes'] / 1e6:.1f} of {row['static_bytes_unpruned'] / 1e6:.1f}",
        ]
        for row in numbers["rows"]
    ]
    said = (
        f"Prompt of {VISUAL + WORDS} tokens, {VISUAL} of them visual, in a static cache of {ROOM}; fp32, SDPA, inductor. "
        "Graphs are those of two conversations, each step one whole graph; tokens are compared with those of un-compiled steps."
    )
    return Result(numbers, [table(COLUMNS, cells), said])
