"""Pruned prefill against its bound: the un-pruned model on a prompt that has as few visual tokens from the start.

    python benchmarks/native.py [--shape llava|qwen3_vl|gemma3] [--rounds 9] [--threads 1] [--out benchmarks/results/native-cpu]

The two differ by hooks, masks, choosing and gathers only. A random model, 1024 wide, 12 layers, 16 heads, 576 visual and 60
text tokens (benchmarks/native_shapes.py), SDPA everywhere, images encoded beforehand. A recipe with stages between layers is
compared with the sum of its layers' native times, each an equal part of a native prompt of that length. Every round measures
every line, in turn; ratios are taken within rounds. Decoding: one step with each of the caches, and with one that lacks a
single token, where only our hooks differ from the un-pruned model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from native_shapes import IMAGE, LAYERS, SHAPES, SIDE, VISUAL, Shape, fewer  # benchmarks/ is no package
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

import vlmprune
from vlmprune.evals.results import Result, stamp
from vlmprune.show.table import code, table

WORDS = 35, 25
"""Words before and after the image."""

HOOKS = f"random:layer=0,tokens={VISUAL - 1}"
BOUND_AT_ONCE, BOUND_BETWEEN = 1.08, 1.10
"""Targets for a stage before the first layer, and for stages between layers."""
COLUMNS = (
    "recipe",
    "prefill ms",
    "× native bound (quartiles)",
    "target",
    "faster than un-pruned",
    "FLOPs ratio",
    "choosing and shortening, share of un-pruned prefill",
    "decoding step, × un-pruned",
)


class Bench:
    """One model, one image, and prompts with any number of its tokens."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.model = shape, shape.build()
        self.words, self.picture = torch.randint(10, 4096, (sum(WORDS),)), shape.picture()
        self.encoded = self._encode()

    def _encode(self) -> Any:
        return self.model.base_model.get_image_features(**self.picture, return_dict=True)

    def _prompt(self, encoded: Any, rows: int, columns: int) -> dict[str, Any]:
        picture = torch.full((rows * columns,), IMAGE)
        ids = torch.cat((self.words[: WORDS[0]], picture, self.words[WORDS[0] :]))[None]
        own = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_encoder_outputs": {"image": encoded}}
        return {**own, **self.shape.rest(ids, rows, columns)}

    def native(self, count: int) -> tuple[float, Any]:
        """Seconds of an un-pruned prefill with `count` visual tokens, and its cache."""
        rows, columns = (SIDE, SIDE) if count == VISUAL else (1, count)
        return self._prefill(self._prompt(fewer(self.encoded, count), rows, columns))

    def pruned(self, recipe: str) -> tuple[float, Any, vlmprune.Report]:
        with vlmprune.wrap(self.model, recipe) as run:
            seconds, cache = self._prefill(self._prompt(self._encode(), SIDE, SIDE))
            return seconds, cache, run.report()

    def _prefill(self, prompt: Mapping[str, Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        output = self.model(**prompt, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start, output.past_key_values

    def step(self, recipe: str | None, cache: Any) -> float:
        """Seconds of one decoding step."""
        word = torch.full((1, 1), 20)
        with vlmprune.wrap(self.model, recipe) if recipe else nullcontext():
            start = time.perf_counter()
            self.model(input_ids=word, past_key_values=cache, use_cache=True)  # nothing is padding: no mask
            return time.perf_counter() - start


def measure(shape: Shape, rounds: int, steps: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Seconds of every line in every round, and the reports."""
    bench, recipes = Bench(shape), shape.recipes
    reports = {recipe: bench.pruned(recipe)[2] for recipe in recipes}
    counts = sorted({VISUAL, *(kept - sum(WORDS) for report in reports.values() for kept in report.entering)}, reverse=True)
    seconds: dict[str, list[float]] = {}
    shares: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in recipes}
    decoding: dict[str, list[float]] = {}
    caches: dict[str | None, Any] = {}
    for turn in range(rounds + 1):  # the first warms up
        for count in counts:
            taken, cache = bench.native(count)
            seconds.setdefault(f"native {count}", []).append(taken)
            if count == VISUAL:
                caches[None] = cache
            tick()
        for recipe in recipes:
            taken, caches[recipe], reports[recipe] = bench.pruned(recipe)
            seconds.setdefault(recipe, []).append(taken)
            shares[recipe].append(dict(reports[recipe].overhead))
            tick()
        caches[HOOKS] = bench.pruned(HOOKS)[1]
        for _ in range(steps):
            for recipe, cache in caches.items():
                decoding.setdefault(recipe or "un-pruned", []).append(bench.step(recipe, cache))
        if not turn:
            seconds, decoding, shares = {}, {}, {recipe: [] for recipe in recipes}
    whole = seconds[f"native {VISUAL}"]
    lines = []
    for recipe, report in reports.items():
        entering = [kept - sum(WORDS) for kept in report.entering]
        bound = [sum(seconds[f"native {count}"][turn] for count in entering) / LAYERS for turn in range(rounds)]
        each = [
            {place: ms / 1e3 / unpruned for place, ms in share.items()}
            for share, unpruned in zip(shares[recipe], whole, strict=True)
        ]
        lines.append(
            {
                "recipe": recipe,
                "visual tokens entering": entering,
                "ms": spread([1e3 * s for s in seconds[recipe]]),
                "bound_ms": spread([1e3 * s for s in bound]),
                "over_bound": spread([s / b for s, b in zip(seconds[recipe], bound, strict=True)]),
                "target": BOUND_AT_ONCE if len(set(entering)) == 1 else BOUND_BETWEEN,
                "faster": spread([w / s for w, s in zip(whole, seconds[recipe], strict=True)]),
                "flops_ratio": report.flops_unpruned / report.flops,
                "overhead": spread([sum(share.values()) for share in each]),
                "overhead_by_place": {place: median(share[place] for share in each) for place in each[0]},
                "overhead_target": recipes[recipe],
                "step_ms": spread([1e3 * s for s in decoding[recipe]]),
                "step_over_unpruned": spread([s / w for s, w in zip(decoding[recipe], decoding["un-pruned"], strict=True)]),
            }
        )
    plain = decoding["un-pruned"]
    return {
        "unpruned_ms": spread([1e3 * s for s in whole]),
        "unpruned_step_ms": spread([1e3 * s for s in plain]),
        "hooks_step_over_unpruned": spread([s / w for s, w in zip(decoding[HOOKS], plain, strict=True)]),
        "steps": steps * rounds,
        "lines": lines,
    }


def spread(values: list[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4)
    return {"median": median(values), "low": low, "high": high}


def result(numbers: Mapping[str, Any]) -> Result:
    """The table, and the un-pruned model beside it."""
    hooks = numbers["hooks_step_over_unpruned"]
    said = (
        f"Un-pruned: prefill {numbers['unpruned_ms']['median']:.1f} ms, decoding step "
        f"{numbers['unpruned_step_ms']['median']:.2f} ms; a step with hooks and one entry less: × {three(hooks)}. "
        f"{numbers['steps']} decoding steps."
    )
    return Result(numbers, [table(COLUMNS, map(cells, numbers["lines"])), said])


def cells(line: Mapping[str, Any]) -> list[str | Text]:
    """One line of the table."""
    share = line["overhead"]
    goal = f", ≤ {line['overhead_target']:.0%}" if line["overhead_target"] else ""
    return [
        code(line["recipe"]),
        f"{line['ms']['median']:.1f}",
        three(line["over_bound"]),
        f"≤ {line['target']:.2f}",
        f"{line['faster']['median']:.2f}×",
        f"{line['flops_ratio']:.2f}×",
        f"{share['median']:.2%} ({share['low']:.2%}–{share['high']:.2%}){goal}",
        three(line["step_over_unpruned"]),
    ]


def three(found: Mapping[str, float]) -> str:
    """A median with its quartiles or its interval."""
    return f"{found['median']:.3f} ({found['low']:.3f}–{found['high']:.3f})"


def main(
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}.")] = "llava",
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Decoding steps per round.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Path of the results, without suffix. Default: benchmarks/results/native-cpu-SHAPE.")
    ] = None,
) -> None:
    if shape not in SHAPES:
        raise typer.BadParameter(f"there is no shape {shape!r}: choose one of {', '.join(SHAPES)}.", param_hint="--shape")
    named = "" if shape == "llava" else f"-{shape}"
    out = out or Path(f"benchmarks/results/native-cpu{named}")
    torch.set_num_threads(threads)
    with Progress(console=Console(stderr=True), transient=True) as progress, torch.inference_mode():
        task = progress.add_task("native bound", total=None)
        results = measure(SHAPES[shape], rounds, steps, lambda: progress.advance(task))
    command = f"python benchmarks/native.py --shape {shape} --rounds {rounds} --threads {threads} --steps {steps}"
    out.parent.mkdir(parents=True, exist_ok=True)
    result({**stamp(command), "shape": shape, **results}).deliver(Console(), out)


if __name__ == "__main__":
    typer.run(main)
