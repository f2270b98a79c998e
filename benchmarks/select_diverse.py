"""What greedy selection costs on a CPU beside one product of all pairs of tokens and the plain greedy loop on it.

    python benchmarks/select_diverse.py [--rounds 9] [--threads 1] [--out benchmarks/results/select_diverse-cpu]

DivPrune's and CDPruner's selections in fp32: 576 → 64 and 2880 → 320 tokens, of width 1024 and 4096. In each round ours and the
plain code run in turn on the same features (small ones several times), with the same number of threads; ratios are taken
within rounds, and medians with quartiles shown. The plain code is what papers publish, without their slower habits: features
are divided by their lengths, all pairs are one product, and each pick reads one row of it. Both must pick the same tokens.

Also shown are weights that are nearly alike, 1 to 1.01, with which the determinants' next picks are hardest to foresee.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.kernels.select_diverse import determinant_order, greedy_order
from vlmprune.loading.environment import environment

SIZES = ((576, 64), (2880, 320))
"""Visual tokens, and how many are kept."""
WIDTHS = (1024, 4096)
BOUND = 1.0
"""Of the plain code's time."""
SMALL = 20
"""Runs of the smallest size in a round; of the others so many fewer as their product is larger."""


def plain_max_min(features: Tensor, keep: int) -> list[int]:
    """DivPrune's selection."""
    unit = normalize(features[0], dim=-1)
    distance = 1.0 - unit @ unit.t()
    distance.fill_diagonal_(torch.inf)
    picks = [int(distance.amin(dim=1).argmax())]
    apart = distance[picks[0]].clone()
    for _ in range(keep - 1):
        apart[picks[-1]] = -torch.inf
        picks.append(int(apart.argmax()))
        torch.minimum(apart, distance[picks[-1]], out=apart)
    return picks


def plain_determinants(features: Tensor, weight: Tensor, keep: int) -> list[int]:
    """CDPruner's."""
    unit = normalize(features[0], dim=-1)
    kernel = unit @ unit.t() * weight[0][:, None] * weight[0]
    gain = kernel.diagonal().clone()
    factor = kernel.new_zeros(keep, len(kernel))
    picks: list[int] = []
    for step in range(keep):
        pick = int(gain.argmax())
        picks.append(pick)
        shared = torch.mv(factor[:step].t(), factor[:step, pick])
        factor[step] = (kernel[pick] - shared) / gain[pick].sqrt()
        gain -= factor[step].square()
        gain[pick] = -torch.inf
    return picks


def seconds(run: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def measure(visual: int, keep: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """Times of one size."""
    torch.manual_seed(0)
    features, weight = torch.randn(1, visual, width), torch.rand(1, visual)
    alike = 1 + weight / 100
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], list[int]]]] = {
        "divprune": (lambda: greedy_order(features, keep), lambda: plain_max_min(features, keep)),
        "cdpruner": (
            lambda: determinant_order(features, weight, keep),
            lambda: plain_determinants(features, weight, keep),
        ),
        "cdpruner, weights nearly alike": (
            lambda: determinant_order(features, alike, keep),
            lambda: plain_determinants(features, alike, keep),
        ),
    }
    times = max(SMALL * SIZES[0][0] ** 2 * WIDTHS[0] // (visual**2 * width), 1)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for turn in range(rounds + 1):
        for name, (ours, plain) in pairs.items():
            # In turn which comes first: the second finds the features in the caches.
            runs = (ours, plain) if turn % 2 else (plain, ours)
            first, second = (seconds(run, times) for run in runs)
            if turn:
                taken[name].append((first, second) if turn % 2 else (second, first))
    found = []
    for name, (ours, plain) in pairs.items():
        ratios = [mine / other for mine, other in taken[name]]
        low, _, high = quantiles(ratios, n=4)
        found.append(
            {
                "method": name,
                "visual": visual,
                "keep": keep,
                "width": width,
                "plain_ms": median(other for _, other in taken[name]) * 1e3,
                "ms": median(mine for mine, _ in taken[name]) * 1e3,
                "ratio": median(ratios),
                "quartiles": (low, high),
                "alike": len(set(ours()[0].tolist()) & set(plain())) / keep,
            }
        )
    return found


def main(
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path(
        "benchmarks/results/select_diverse-cpu"
    ),
) -> None:
    torch.set_num_threads(threads)
    busy = os.getloadavg()[0]
    rows = [row for visual, keep in SIZES for width in WIDTHS for row in measure(visual, keep, width, rounds)]
    lines = [
        "| selection | tokens | width | all pairs + plain loop, ms | ours, ms | × (quartiles) | same picks |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['method']} | {row['visual']} → {row['keep']} | {row['width']} | {row['plain_ms']:.1f} | {row['ms']:.1f} | "
            f"{row['ratio']:.2f} ({low:.2f}–{high:.2f}) | {row['alike']:.1%} |"
        )
    goals = [row for row in rows if row["method"] in ("divprune", "cdpruner")]
    worst = max(row["ratio"] for row in goals)
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    command = f"python benchmarks/select_diverse.py --rounds {rounds} --threads {threads}"
    machine = f"load {busy:.1f} on {os.cpu_count()} cores when it began"
    text = "\n".join(
        [
            *lines,
            "",
            f"DivPrune and CDPruner take at most {worst:.2f} of the plain code's time; the bound is {BOUND:.1f}.",
            "",
            f"{stamp}, `{command}`, torch {environment()['torch']}, n = {rounds} rounds, {threads} thread"
            f"{'s' if threads > 1 else ''}, CPU, fp32, {machine}{', which did other work' if busy > 0.5 else ''}.",
        ]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text + "\n")
    found = {"date": stamp, "command": command, "environment": environment(), "load": busy, "bound": BOUND, "rows": rows}
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(text)
    if worst > BOUND:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
