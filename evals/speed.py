"""Prefill time of recipes beside the un-pruned model: one run, same inputs, same attention, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

import vlmprune


@dataclass(frozen=True)
class Timing:
    """Prefill of the language model (pictures already encoded) under one recipe.

    Attributes:
        recipe: the recipe, or "un-pruned".
        ms: median milliseconds; `quartiles` around it.
        ratio: median over the rounds of the un-pruned time in the same round divided by this time.
        flops: FLOPs relative to un-pruned, by the formula in `vlmprune.cost`.
        rounds: measured rounds.
    """

    recipe: str
    ms: float
    quartiles: tuple[float, float]
    ratio: float
    flops: float
    kv_bytes: int
    rounds: int


def prefill(
    model: Any,
    inputs: Mapping[str, Any],
    recipes: Sequence[str],
    rounds: int = 9,
    tick: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Time the prefill un-pruned and under each recipe, in turn within every round.

    Args:
        model: a stock, un-wrapped model.
        inputs: the processor's output.
        recipes: recipe strings.
        rounds: measured rounds after one warm-up.
        tick: called after every measurement, for a progress bar.
    """
    names = ["un-pruned", *recipes]
    times: dict[str, list[float]] = {name: [] for name in names}
    reports: dict[str, vlmprune.Report] = {}
    for turn in range(rounds + 1):
        for name in names:
            with vlmprune.wrap(model, name) if name != "un-pruned" else nullcontext() as run, torch.inference_mode():
                call = _with_encoded_pictures(model, inputs)
                _wait(model.device)
                start = time.perf_counter()
                model(**call, use_cache=True, logits_to_keep=1)
                _wait(model.device)
                elapsed = (time.perf_counter() - start) * 1e3
                if run is not None:
                    reports[name] = run.report()
            if turn:
                times[name].append(elapsed)
            tick()
    whole = next(iter(reports.values())) if reports else None
    result = []
    for name in names:
        low, _, high = quantiles(times[name], n=4)
        ratio = median(full / own for full, own in zip(times["un-pruned"], times[name], strict=True))
        report = reports.get(name)
        kv = report.kv_bytes if report else (whole.kv_bytes_unpruned if whole else 0)
        flops = report.flops / report.flops_unpruned if report else 1.0
        result.append(Timing(name, median(times[name]), (low, high), ratio, flops, kv, rounds))
    return result


def _with_encoded_pictures(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same call with the vision tower's work already done, as `generate` itself arranges it."""
    pixels = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
    encoded = model.base_model.get_image_features(**pixels, return_dict=True)
    rest = {key: value for key, value in inputs.items() if key != "pixel_values"}
    return {**rest, "mm_encoder_outputs": {"image": encoded}}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
