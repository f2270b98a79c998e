"""What greedy selection costs on a CPU beside one product of all tokens with themselves: 2880 tokens, 320 kept.

    python benchmarks/select_diverse.py [--rounds 7] [--threads 1] [--out benchmarks/results/select_diverse-cpu]

In each round both run in turn on the same features, in fp32 with the same number of threads; ratios are taken within rounds, and
medians with quartiles shown. The bound that the reference is written for is three products.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer

from vlmprune.cli import environment
from vlmprune.kernels.select_diverse import determinant_order, select_diverse

VISUAL, KEEP = 2880, 320
WIDTHS = (1024, 4096)
BOUND = 3.0


def milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def measure(width: int, rounds: int) -> dict[str, Any]:
    """Times of one width."""
    torch.manual_seed(0)
    features, weight = torch.randn(1, VISUAL, width), torch.rand(1, VISUAL)
    runs = {
        "product": lambda: features[0] @ features[0].T,
        "select_diverse": lambda: select_diverse(features, KEEP),
        "determinant_order": lambda: determinant_order(features, weight, KEEP),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            took = milliseconds(run)
            if turn:
                times[name].append(took)
    found: dict[str, Any] = {"width": width}
    for name, took in times.items():
        ratios = [mine / product for mine, product in zip(took, times["product"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        found[name] = {"ms": median(took), "ratio": median(ratios), "quartiles": (low, high)}
    return found


def main(
    rounds: Annotated[int, typer.Option(min=3)] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path(
        "benchmarks/results/select_diverse-cpu"
    ),
) -> None:
    torch.set_num_threads(threads)
    rows = [measure(width, rounds) for width in WIDTHS]
    lines = ["| width | what | ms | × one product (quartiles) |", "|---:|---|---:|---:|"]
    for row in rows:
        for name, label in (
            ("product", f"one {VISUAL} × {VISUAL} product"),
            ("select_diverse", f"`select_diverse`, {KEEP} kept"),
            ("determinant_order", f"`determinant_order`, {KEEP} kept"),
        ):
            low, high = row[name]["quartiles"]
            lines.append(
                f"| {row['width']} | {label} | {row[name]['ms']:.0f} | {row[name]['ratio']:.2f} ({low:.2f}–{high:.2f}) |"
            )
    worst = max(row["select_diverse"]["ratio"] for row in rows)
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    command = f"python benchmarks/select_diverse.py --rounds {rounds} --threads {threads}"
    text = "\n".join(
        [
            *lines,
            "",
            f"`select_diverse` takes {worst:.2f} products at most; the bound is {BOUND:.0f}.",
            "",
            f"{stamp}, `{command}`, torch {environment()['torch']}, n = {rounds} rounds, {threads} thread"
            f"{'s' if threads > 1 else ''}, CPU, fp32, on a machine doing other work.",
        ]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text + "\n")
    found = {"date": stamp, "command": command, "environment": environment(), "bound": BOUND, "rows": rows}
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(text)
    if worst > BOUND:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
