"""What greedy selection costs on a CPU beside one product of all pairs of tokens and the plain greedy loop on it.

    python benchmarks/select_diverse.py [--rounds 9] [--threads 1] [--out benchmarks/results/select_diverse-cpu]

DivPrune's and CDPruner's selections in fp32: 576 → 64 and 2880 → 320 tokens, of width 1024 and 4096. In each round ours and the
plain code run in turn on the same features (small ones several times), with the same number of threads; ratios are taken
within rounds, and medians with quartiles shown. The plain code is that of the papers, without their slow parts: features
are divided by their lengths, all pairs are one product, and each pick reads one row of it. Both must pick the same tokens.

Also shown are weights that are nearly alike, 1 to 1.01, with which the determinants' next picks are hardest to foresee.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.evals.results import Result, stamp
from vlmprune.kernels.select_diverse import determinant_order, greedy_order
from vlmprune.show.table import table

SIZES = ((576, 64), (2880, 320))
"""Visual tokens, and how many are kept."""
WIDTHS = (1024, 4096)
BOUND = 1.0
"""The most that ours may take of the plain code's time."""
COLUMNS = ("selection", "tokens", "width", "all pairs + plain loop, ms", "ours, ms", "× (quartiles)", "same picks")
SMALL = 20
"""Runs of the smallest size in a round; larger sizes get fewer, in inverse proportion to their product."""


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
    """CDPruner's selection."""
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
            # They take turns in being first: the second one finds the features in the caches.
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


def result(numbers: Mapping[str, Any]) -> Result:
    """The table, and the worst ratio of what has a bound."""
    cells = [
        [
            row["method"],
            f"{row['visual']} → {row['keep']}",
            str(row["width"]),
            f"{row['plain_ms']:.1f}",
            f"{row['ms']:.1f}",
            f"{row['ratio']:.2f} ({row['quartiles'][0]:.2f}–{row['quartiles'][1]:.2f})",
            f"{row['alike']:.1%}",
        ]
        for row in numbers["rows"]
    ]
    busy = ", with other work on the machine" if numbers["load"] > 0.5 else ""
    said = (
        f"DivPrune and CDPruner take at most {worst(numbers):.2f} of the plain code's time; the bound is "
        f"{numbers['bound']:.1f}. CPU, fp32, load {numbers['load']:.1f} when it began{busy}."
    )
    return Result(numbers, [table(COLUMNS, cells, text_columns=2), said])


def worst(numbers: Mapping[str, Any]) -> float:
    """The highest ratio of the two methods; nearly equal weights have no bound."""
    return max(row["ratio"] for row in numbers["rows"] if row["method"] in ("divprune", "cdpruner"))


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
    command = f"python benchmarks/select_diverse.py --rounds {rounds} --threads {threads}"
    numbers = {**stamp(command), "load": busy, "bound": BOUND, "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    result(numbers).deliver(Console(), out)
    if worst(numbers) > BOUND:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
