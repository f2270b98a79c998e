"""What a recipe saves, beside the un-pruned model: time to the first token, time per further token, memory, and our own share.

Everything runs in one process on the same inputs with the same attention. Every round runs the un-pruned model and all recipes
in turn, and ratios are taken within rounds, so that a machine that slows down slows all of them. Each round begins with the
next one, so that none of them is always the first or the last.

    TTFT    from the call of `generate` to the first token on the host: vision tower, prefill, head, choice of the token
    TPOT    mean of the later decoding steps, each until its token is on the host
    tower   from the start to the entry of the language model; prefill: the language model's part of TTFT

A round before these counts what would disturb the clock (`evals/bench_counts.py`): FLOPs of whole calls, with tower, head and
our scores but without our Triton kernels, and the peak of allocated memory above what was allocated before the call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch

import vlmprune
from vlmprune.evals.accuracy import UNPRUNED
from vlmprune.evals.bench_counts import count_flops, peak_bytes
from vlmprune.evals.stopwatch import PrefillClock, cache_bytes, wait
from vlmprune.loading.placement import execution_device
from vlmprune.show.stats import drawn, interval

LEAST_ROUNDS = 3
"""With fewer rounds there are no quartiles."""
PHASES = ("tower", "prefill", "ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Spread:
    """Milliseconds: median and quartiles over the rounds."""

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
        visual: visual tokens kept per image at the end of prefill.
        prompt: tokens of a row before pruning.
        times: milliseconds per phase of `PHASES`; no "tpot" if one token was asked for.
        faster: per phase, against un-pruned in the same rounds.
        flops: of one call up to the first token, whole batch.
        ideal: FLOPs of the un-pruned model over these: how much faster TTFT could be if every FLOP cost the same.
        ideal_prefill: the same for the language model's prefill alone, by the formula in `vlmprune.cost`.
        achieved: `faster["ttft"]` over `ideal`.
        kv_bytes: in the KV cache after prefill, whole batch.
        peak_bytes: the most that is allocated at one time during a call, above what was allocated before (weights, inputs).
        overhead: our own work, by where it is done, as shares of TTFT; see `vlmprune.Report.overhead`. Empty for "un-pruned".
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
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Measured:
        """A row from its plain data."""
        times = {phase: Spread(**spread) for phase, spread in data["times"].items()}
        faster = {phase: Ratio(**ratio) for phase, ratio in data["faster"].items()}
        return Measured(**{**data, "times": times, "faster": faster})


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
        model: an un-wrapped model whose `generation_config` has no end of text, so that all runs are equally long.
        inputs: the processor's output.
        recipes: recipe strings; a wrong one is refused before anything is measured.
        rounds: measured rounds. One before them counts FLOPs and memory and warms up.
        new_tokens: tokens to generate, at least 1.
        tick: called after every run, for a progress bar.
        enough: called after every round from the third on. If it returns True, no further round is run; `Measured.rounds` is
            their number.

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
    """A streamer for `generate` that records when the prompt, and then each token, is on the host."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


@contextmanager
def _under(model: Any, name: str) -> Iterator[vlmprune.Run | None]:
    with vlmprune.wrap(model, name) if name != UNPRUNED else nullcontext() as run, torch.inference_mode():
        yield run


def _run(model: Any, inputs: Mapping[str, Any], name: str, new_tokens: int) -> _Run:
    """Two calls: one that is only timed, and one that waits for the GPU between vision tower and language model."""
    stamps = _Stamps()
    with _under(model, name) as run:
        wait(execution_device(model))
        start = time.perf_counter()
        output = _generate(model, inputs, new_tokens, streamer=stamps)
        wait(execution_device(model))
        end = time.perf_counter()
        report = None if run is None else run.report()
        kv_bytes = cache_bytes(output.past_key_values, new_tokens - 1)
        del output
        wait(execution_device(model))
        again = time.perf_counter()
        with PrefillClock(model, execution_device(model)) as clock:
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


def _count(model: Any, inputs: Mapping[str, Any], name: str, new_tokens: int) -> tuple[int, int]:
    """FLOPs up to the first token, and the peak of memory of a whole call."""
    with _under(model, name):
        flops = count_flops(lambda: _generate(model, inputs, 1))
        return flops, peak_bytes(lambda: _generate(model, inputs, new_tokens), execution_device(model))


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
    images = whole.visual_tokens / batch if whole else 0.0
    overhead: dict[str, float] = {}
    for where in dict(reports[0].overhead) if reports else ():
        shares = [dict(report.overhead)[where] / run.times["ttft"] for report, run in zip(reports, own, strict=True)]
        overhead[where] = median(shares)
    return Measured(
        recipe=name,
        batch=batch,
        rounds=len(own),
        new_tokens=new_tokens,
        prompt=prompt,
        visual=sum(reports[0].stages[-1].kept) / batch if reports and reports[0].stages else images,
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
