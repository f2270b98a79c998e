"""What a recipe saves, beside the un-pruned model: time to the first token, time per further token, memory, and our own share.

Everything runs in one process on the same inputs with the same attention; every round runs the un-pruned model and all recipes
in turn, and ratios are taken within rounds, so that a machine that slows down slows all of them. Each round begins one further
on, so that none of them has the first or the last place for itself.

    TTFT    from `generate(...)` to the first token on the host: vision tower, prefill, head, choice of the token
    TPOT    mean of the later steps of decoding, each with its token on the host
    tower   from the start to the entry of the language model; prefill: the language model's part of TTFT

Not measured while the clock runs, but in a round before: FLOPs, counted by torch (`FlopCounterMode`: products, convolutions and
attention of whole calls, tower, head and our scores included; a Triton kernel of ours is not seen), and the peak of allocated
memory above what was allocated before the call (CUDA: `max_memory_allocated`; CPU: what torch's profiler saw its allocator give
out and take back).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import vlmprune
from vlmprune.evals.offline import UNPRUNED
from vlmprune.show.stats import drawn, interval

LEAST_ROUNDS = 3
"""Fewer say nothing about their spread."""
PHASES = ("tower", "prefill", "ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Spread:
    """Milliseconds over the rounds: median and quartiles."""

    ms: float
    low: float
    high: float

    @staticmethod
    def of(times: list[float]) -> Spread:
        low, _, high = quantiles(times, n=4) if len(times) > 1 else times * 3
        return Spread(median(times), low, high)


@dataclass(frozen=True)
class Ratio:
    """How many times faster than un-pruned: median over the rounds of the ratio within a round, and the middle 95 % of the
    medians of rounds drawn with replacement."""

    times: float
    low: float
    high: float

    @staticmethod
    def of(unpruned: Sequence[float], pruned: Sequence[float]) -> Ratio:
        ratios = np.asarray(unpruned) / np.asarray(pruned)
        return Ratio(float(np.median(ratios)), *interval(np.median(ratios[drawn(len(ratios))], axis=1)))


@dataclass(frozen=True)
class Measured:
    """One recipe (or "un-pruned") on one batch.

    Attributes:
        recipe, batch, rounds, new_tokens: what was run.
        visual: visual tokens kept per picture at the end of prefill; `prompt` tokens of a row before pruning.
        times: milliseconds per phase of `PHASES`; no "tpot" if one token was asked for.
        faster: per phase, against un-pruned in the same rounds.
        flops: of one call up to the first token, whole batch.
        ideal: un-pruned FLOPs over these: what TTFT could gain at most if every FLOP cost the same.
        ideal_prefill: the same of the language model's prefill alone, by the formula in `vlmprune.cost`.
        achieved: `faster["ttft"]` over `ideal`.
        kv_bytes: in the KV cache after prefill, whole batch.
        peak_bytes: most that was allocated at one time during a call, above what was there before (weights, inputs).
        overhead: our own work by place, share of TTFT; see `vlmprune.Report.overhead`. Empty for "un-pruned".
    """

    recipe: str
    batch: int
    rounds: int
    new_tokens: int
    prompt: int
    visual: float
    times: dict[str, Spread]
    faster: dict[str, Ratio]
    flops: int
    ideal: float
    ideal_prefill: float
    achieved: float
    kv_bytes: int
    peak_bytes: int
    overhead: dict[str, float]

    @property
    def overhead_share(self) -> float:
        """Our own work as a share of TTFT."""
        return sum(self.overhead.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(
    model: Any,
    inputs: Mapping[str, Any],
    recipes: Sequence[str],
    rounds: int = 7,
    new_tokens: int = 16,
    tick: Callable[[], None] = lambda: None,
    enough: Callable[[], bool] = lambda: False,
) -> list[Measured]:
    """Measure the un-pruned model and recipes, in turn within every round; round r begins with the r-th of them.

    Args:
        model: a stock, un-wrapped model whose `generation_config` knows no end of text, so that all runs are as long.
        inputs: the processor's output.
        recipes: recipe strings; a wrong one is refused before anything is measured.
        rounds: measured rounds; before them one that counts FLOPs and memory and warms up.
        new_tokens: tokens to generate, at least 1.
        tick: called after every run, for a progress bar.
        enough: asked after every round from the third on; True ends measuring, and `Measured.rounds` says how many there were.

    Returns:
        The un-pruned model, then the recipes in their order.

    Raises:
        UsageError: a recipe that does not exist or does not fit the model.
    """
    for recipe in recipes:
        vlmprune.wrap(model, recipe).remove()
    names = [UNPRUNED, *recipes]
    runs: dict[str, list[_Run]] = {name: [] for name in names}
    counted: dict[str, tuple[int, int]] = {}
    for turn in range(rounds + 1):
        first = (turn - 1) % len(names) if turn else 0
        for name in [*names[first:], *names[:first]]:
            if turn == 0:
                counted[name] = _count(model, inputs, name, new_tokens)
            else:
                runs[name].append(_run(model, inputs, name, new_tokens))
            tick()
        if turn >= LEAST_ROUNDS and enough():
            break
    whole = next((run.report for name in recipes for run in runs[name] if run.report is not None), None)
    return [_measured(name, runs, counted, whole, inputs, new_tokens) for name in names]


@dataclass(frozen=True)
class _Run:
    """One call: milliseconds by phase, and the report of a pruned one."""

    times: dict[str, float]
    report: vlmprune.Report | None
    kv_bytes: int


class _Stamps:
    """Takes the place of a streamer: notes when each token is on the host. `generate` shows it the prompt first."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


class _PrefillClock:
    """Times the language model's first call of a `generate`, from outside our own hooks."""

    def __init__(self, model: Any) -> None:
        self.text = model.get_submodule("model.language_model")
        self.device: torch.device = model.device
        self.begin = self.end = 0.0

    def __enter__(self) -> _PrefillClock:
        before = self.text.register_forward_pre_hook(self._start, prepend=True)
        after = self.text.register_forward_hook(self._stop)  # behind ours
        self.handles = (before, after)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _start(self, *_: object) -> None:
        if not self.begin:
            _wait(self.device)
            self.begin = time.perf_counter()

    def _stop(self, *_: object) -> None:
        if not self.end:
            _wait(self.device)
            self.end = time.perf_counter()


@contextmanager
def _under(model: Any, name: str) -> Iterator[vlmprune.Run | None]:
    with vlmprune.wrap(model, name) if name != UNPRUNED else nullcontext() as run, torch.inference_mode():
        yield run


def _run(model: Any, inputs: Mapping[str, Any], name: str, new_tokens: int) -> _Run:
    """Two calls: one that is only timed, and one that waits for the GPU between tower and language model to tell them apart."""
    stamps = _Stamps()
    with _under(model, name) as run:
        _wait(model.device)
        start = time.perf_counter()
        output = _generate(model, inputs, new_tokens, streamer=stamps)
        _wait(model.device)
        end = time.perf_counter()
        report = None if run is None else run.report()
        kv_bytes = _cache_bytes(output.past_key_values, new_tokens - 1)
        del output
        _wait(model.device)
        again = time.perf_counter()
        with _PrefillClock(model) as clock:
            _generate(model, inputs, 1)
    first = stamps.at[1]
    times = {
        "tower": clock.begin - again,
        "prefill": clock.end - clock.begin,
        "ttft": first - start,
        "e2e": end - start,
    }
    if new_tokens > 1:
        times["tpot"] = (stamps.at[-1] - first) / (new_tokens - 1)
    return _Run({phase: seconds * 1e3 for phase, seconds in times.items()}, report, kv_bytes)


def _generate(model: Any, inputs: Mapping[str, Any], new_tokens: int, **more: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=new_tokens, return_dict_in_generate=True, **more)


def _cache_bytes(cache: Any, later: int) -> int:
    """Bytes of keys and values after prefill: what is stored, without the tokens that were generated `later`."""
    total = 0
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            total += x[..., : x.shape[-2] - later, :].numel() * x.element_size()
    return total


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- counted, not timed ------------------------------------------------------------------------------------------------


def _count(model: Any, inputs: Mapping[str, Any], name: str, new_tokens: int) -> tuple[int, int]:
    """FLOPs up to the first token, and the peak of memory of a whole call, above what was there before."""
    with _under(model, name):
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS) as counter:
            _generate(model, inputs, 1)
        peak = _peak_bytes(lambda: _generate(model, inputs, new_tokens), model.device)
    return counter.get_total_flops(), peak


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Both products of attention; grouped queries count as the full heads they are, causal halving is not counted."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * key[-2] * (dim + value[-1])


_ATTENTION_FLOPS = {
    getattr(torch.ops.aten, name): _attention_flops
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",  # torch itself does not count it
    )
}


def _peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler tells stderr whenever it starts and stops
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    moved = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    held = peak = 0
    for event in sorted(moved, key=lambda event: (event["ts"], event["args"]["Ev Idx"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _measured(
    name: str,
    runs: Mapping[str, Sequence[_Run]],
    counted: Mapping[str, tuple[int, int]],
    whole: vlmprune.Report | None,
    inputs: Mapping[str, Any],
    new_tokens: int,
) -> Measured:
    own = runs[name]
    columns = {phase: [run.times[phase] for run in own] for phase in PHASES if phase in own[0].times}
    faster = {phase: Ratio.of([run.times[phase] for run in runs[UNPRUNED]], times) for phase, times in columns.items()}
    flops, peak = counted[name]
    ideal = counted[UNPRUNED][0] / flops
    batch, prompt = inputs["input_ids"].shape
    reports = [run.report for run in own if run.report is not None]
    pictures = whole.visual_tokens / batch if whole else 0.0
    overhead: dict[str, float] = {}
    for place in dict(reports[0].overhead) if reports else ():
        shares = [dict(report.overhead)[place] / run.times["ttft"] for report, run in zip(reports, own, strict=True)]
        overhead[place] = median(shares)
    return Measured(
        recipe=name,
        batch=batch,
        rounds=len(own),
        new_tokens=new_tokens,
        prompt=prompt,
        visual=sum(reports[0].stages[-1].kept) / batch if reports and reports[0].stages else pictures,
        times={phase: Spread.of(times) for phase, times in columns.items()},
        faster=faster,
        flops=flops,
        ideal=ideal,
        ideal_prefill=reports[0].flops_unpruned / reports[0].flops if reports else 1.0,
        achieved=faster["ttft"].times / ideal,
        kv_bytes=own[0].kv_bytes,
        peak_bytes=peak,
        overhead=overhead,
    )


# -- as tables and a picture -------------------------------------------------------------------------------------------

COLUMNS = (
    "recipe",
    "batch",
    "TTFT ms",
    "faster",
    "of ideal",
    "TPOT ms",
    "faster",
    "whole ms",
    "faster",
    "peak MiB",
    "KV MiB",
    "ours",
)


def cells(row: Measured) -> tuple[str, ...]:
    """One line of the table."""
    plain = row.recipe == UNPRUNED

    def milliseconds(phase: str) -> str:
        if phase not in row.times:
            return "—"
        found = row.times[phase]
        return f"{found.ms:.1f} ({found.low:.1f}–{found.high:.1f})"

    def ratio(phase: str) -> str:
        if plain or phase not in row.faster:
            return "—"
        found = row.faster[phase]
        return f"{found.times:.2f}× [{found.low:.2f}, {found.high:.2f}]"

    return (
        row.recipe,
        str(row.batch),
        milliseconds("ttft"),
        ratio("ttft"),
        "—" if plain else f"{row.achieved:.0%} of {row.ideal:.2f}×",
        milliseconds("tpot"),
        ratio("tpot"),
        milliseconds("e2e"),
        ratio("e2e"),
        f"{row.peak_bytes / 2**20:.0f}",
        f"{row.kv_bytes / 2**20:.1f}",
        "—" if plain else f"{row.overhead_share:.1%}",
    )


def markdown(rows: Sequence[Measured]) -> str:
    """The rows as a table, and where our own time goes."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for row in rows:
        name, *numbers = cells(row)
        lines.append("| " + " | ".join((name if name == UNPRUNED else f"`{name}`", *numbers)) + " |")
    return "\n".join([*lines, "", *(f"* {sentence}" for sentence in overheads(rows))])


def overheads(rows: Sequence[Measured]) -> list[str]:
    """Per recipe, where our own share of TTFT goes."""
    return [
        f"{row.recipe}, batch {row.batch}: " + ", ".join(f"{place} {share:.1%}" for place, share in row.overhead.items())
        for row in rows
        if row.overhead
    ]


def plot(rows: Sequence[Measured], title: str, path: Path) -> None:
    """How many times faster, per phase, beside what FLOPs promise."""
    from matplotlib import pyplot

    pruned = [row for row in rows if row.recipe != UNPRUNED]
    phases = [phase for phase in ("ttft", "tpot", "e2e") if all(phase in row.faster for row in pruned)]
    figure, axes = pyplot.subplots(figsize=(7.2, 1.2 + 0.55 * len(pruned)), layout="constrained")
    for place, row in enumerate(pruned):
        axes.plot([row.ideal] * 2, [place - 0.36, place + 0.36], color="0.3", linewidth=1.5)
        for number, phase in enumerate(phases):
            found = row.faster[phase]
            whiskers = [[max(found.times - found.low, 0)], [max(found.high - found.times, 0)]]
            height = place + (number - (len(phases) - 1) / 2) * 0.24
            axes.barh(height, found.times, 0.22, xerr=whiskers, color=f"C{number}", error_kw={"linewidth": 1})
    axes.axvline(1, color="0.6", linewidth=1)
    axes.set_yticks(range(len(pruned)), [f"{row.recipe}, batch {row.batch}" for row in pruned], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than un-pruned (95 % interval); line: ratio of FLOPs to the first token")
    axes.set_title(title, fontsize=10)
    names = {"ttft": "first token", "tpot": "further tokens", "e2e": "whole answer"}
    axes.legend(
        [pyplot.Rectangle((0, 0), 1, 1, color=f"C{n}") for n in range(len(phases))], [names[p] for p in phases], fontsize=8
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
