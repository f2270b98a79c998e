"""How fast a decoding step is under a recipe: time of an un-pruned step divided by ours, above 1 is faster.

    python benchmarks/decoding.py [--rounds 12] [--steps 24] [--threads 1] [--recipe …] [--out benchmarks/results/decoding-cpu]
    python benchmarks/decoding.py --compiled [--rounds 4] [--steps 12] [--shape llava] [--out docs/results/compiled_steps-cpu]

A LLaVA-shaped random model, 640 wide, 8 layers, 10 heads, SDPA on both sides; the prompt has 576 visual tokens and 75 words.
Every round runs the prompt twice, once plain and once under the recipe, and then decodes the same words from both caches: one
step here, one step there, in changing order. Hooks are on the model's own copy, so that the plain steps are a plain model's.

Ratios are taken within pairs of steps. The figure of a round is the median of its pairs; the table has the median over rounds,
with the 95 % interval of a bootstrap over rounds. "CPU time" is that of the one thread which computes: other work on the
machine disturbs it less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import compiled_steps  # benchmarks/ is no package: its scripts find each other
import numpy as np
import torch
import typer
from native import three
from prefill import llava_shaped
from rich.console import Console
from rich.progress import Progress

import vlmprune
from vlmprune.evals.results import Result, stamp
from vlmprune.show.stats import drawn, interval
from vlmprune.show.table import code, table

LAYERS, WIDTH, VISUAL, PROMPT, KEPT = 8, 640, 576, 651, 64
RECIPES: dict[str, float] = {
    "pai": 0.98,
    "paint": 0.95,
    "zerotuning:gain=2": 0.92,
    f"dart:layer=2,tokens={KEPT}": 1.24,
    f"mustdrop:layer=3,tokens={KEPT}": 1.37,
}
"""At their papers' layers, as far as the model has them; and the ratio each has to reach."""

COLUMNS = ("recipe", "× as fast as un-pruned (95 %)", "target", "by CPU time (95 %)", "step ms", "un-pruned ms")

Ratios = tuple[list[float], list[float], list[float], list[float]]
"""Of every pair of steps: wall-clock and CPU ratio, and milliseconds of the plain step and of ours."""


class Bench:
    """A plain model, a copy of it to wrap, and a prompt."""

    def __init__(self) -> None:
        self.plain, inputs = llava_shaped(dim=WIDTH, mlp=1728, layers=LAYERS)
        self.wrapped = deepcopy(self.plain)
        ids = inputs["input_ids"]
        more = torch.randint(10, 4096, (1, PROMPT - ids.shape[1]))
        self.ids, self.pixels = torch.cat((ids, more), dim=1), inputs["pixel_values"]

    def prefill(self, model: Any) -> Any:
        return model(input_ids=self.ids, pixel_values=self.pixels, use_cache=True, logits_to_keep=1).past_key_values

    def step(self, model: Any, cache: Any, word: int) -> tuple[float, float]:
        """Wall-clock and CPU seconds of one decoding step, as `generate` makes it."""
        length = cache.get_seq_length()
        ids, mask = torch.tensor([[word]]), torch.ones(1, length + 1, dtype=torch.long)
        position = torch.tensor([[length]])
        wall, cpu = time.perf_counter(), time.thread_time()
        model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return time.perf_counter() - wall, time.thread_time() - cpu

    def compare(self, recipe: str, steps: int, turn: int) -> tuple[Ratios, vlmprune.Report]:
        """Pairs of steps after one prompt."""
        walls: Ratios = ([], [], [], [])
        with vlmprune.wrap(self.wrapped, recipe) as run:
            caches = {"plain": self.prefill(self.plain), "ours": self.prefill(self.wrapped)}
            report = run.report()
            models = {"plain": self.plain, "ours": self.wrapped}
            for number in range(steps + 2):
                order = ("plain", "ours") if (number + turn) % 2 else ("ours", "plain")
                took = {name: self.step(models[name], caches[name], 20 + number) for name in order}
                if number > 1:  # the first pairs warm up
                    (wall, cpu), (our_wall, our_cpu) = took["plain"], took["ours"]
                    for values, value in zip(walls, (wall / our_wall, cpu / our_cpu, 1e3 * wall, 1e3 * our_wall), strict=True):
                        values.append(value)
        return walls, report


def measure(recipes: list[str], rounds: int, steps: int, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """One row per recipe."""
    bench = Bench()
    found: dict[str, list[Ratios]] = {recipe: [] for recipe in recipes}
    reports: dict[str, vlmprune.Report] = {}
    for turn in range(rounds + 1):  # the first warms up
        for recipe in recipes:
            walls, reports[recipe] = bench.compare(recipe, steps, turn)
            if turn:
                found[recipe].append(walls)
            tick()
    return [
        {
            "recipe": recipe,
            "target": RECIPES.get(recipe),
            "ratio": spread([median(walls[0]) for walls in found[recipe]]),
            "cpu_ratio": spread([median(walls[1]) for walls in found[recipe]]),
            "plain_ms": median(ms for walls in found[recipe] for ms in walls[2]),
            "ms": median(ms for walls in found[recipe] for ms in walls[3]),
            "kv_bytes": reports[recipe].kv_bytes,
        }
        for recipe in recipes
    ]


def spread(rounds: list[float]) -> dict[str, float]:
    """The median over rounds, and the 95 % interval of a bootstrap over rounds."""
    values = np.array(rounds)
    low, high = interval(np.median(values[drawn(len(values))], axis=1))
    return {"median": float(np.median(values)), "low": low, "high": high}


def result(numbers: Mapping[str, Any]) -> Result:
    """The table, and what was decoded."""
    cells = [
        [
            code(row["recipe"]),
            three(row["ratio"]),
            "" if row["target"] is None else f"≥ {row['target']:.2f}",
            three(row["cpu_ratio"]),
            f"{row['ms']:.2f}",
            f"{row['plain_ms']:.2f}",
        ]
        for row in numbers["rows"]
    ]
    said = f"Prompt of {PROMPT} tokens, {VISUAL} of them visual; {LAYERS} layers of width {WIDTH}, fp32, SDPA."
    return Result(numbers, [table(COLUMNS, cells), said])


def main(
    rounds: Annotated[int, typer.Option(min=3)] = 12,
    steps: Annotated[int, typer.Option(min=2, help="Pairs of steps per round.")] = 24,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    recipe: Annotated[list[str] | None, typer.Option(help="Instead of the five; may be given several times.")] = None,
    out: Annotated[Path | None, typer.Option(help="Path of the results, without suffix.")] = None,
    compiled: Annotated[bool, typer.Option(help="Compiled steps in a static cache, see compiled_steps.py.")] = False,
    shape: Annotated[list[str] | None, typer.Option(help="Of compiled steps: of these models only.")] = None,
) -> None:
    torch.set_num_threads(threads)
    out = out or Path("docs/results/compiled_steps-cpu" if compiled else "benchmarks/results/decoding-cpu")
    if compiled:
        return compare_compiled(rounds, steps, threads, recipe or list(compiled_steps.RECIPES), shape or SHAPES, out)
    recipes = recipe or list(RECIPES)
    with Progress(console=Console(stderr=True), transient=True) as progress, torch.inference_mode():
        task = progress.add_task("decoding", total=(rounds + 1) * len(recipes))
        rows = measure(recipes, rounds, steps, lambda: progress.advance(task))
    command = f"python benchmarks/decoding.py --rounds {rounds} --steps {steps} --threads {threads}"
    command += "".join(f" --recipe {one!r}" for one in recipe or ())
    out.parent.mkdir(parents=True, exist_ok=True)
    result({**stamp(command), "rows": rows}).deliver(Console(), out)


SHAPES = ["llava", "qwen2_5_vl", "qwen3_vl"]


def compare_compiled(rounds: int, steps: int, threads: int, recipes: list[str], names: list[str], out: Path) -> None:
    """The table of `compiled_steps.py`."""
    with Progress(console=Console(stderr=True), transient=True) as progress, torch.no_grad():
        task = progress.add_task("compiled decoding", total=len(names) * len(recipes))
        rows = compiled_steps.measure(names, recipes, rounds, steps, lambda: progress.advance(task))
    command = f"python benchmarks/decoding.py --compiled --rounds {rounds} --steps {steps} --threads {threads} --out {out}"
    command += "".join(f" --recipe {one!r}" for one in recipes) + "".join(f" --shape {name}" for name in names)
    out.parent.mkdir(parents=True, exist_ok=True)
    compiled_steps.result({**stamp(command), "rows": rows}).deliver(Console(), out)


if __name__ == "__main__":
    typer.run(main)
