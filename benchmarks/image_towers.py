"""Pictures per second of an image tower under recipes, beside the token bound, on one thread.

    python benchmarks/image_towers.py [--model ViT-B-16] [--rounds 7] [--batch 4] [--threads 1] [--out PATH]

A model of open_clip with random weights, as it is made, and with queries and keys five times as large: attention is flat in the
first, so that FlowCut drops hardly anything before its last block, and peaked in the second, as in trained towers. Every round
encodes the same pictures un-pruned and under every recipe, in turn; ratios are taken within rounds. Times are seconds of the
processor (`time.process_time`), so that other work on the machine takes no part in them. The token bound is rows of all blocks
un-pruned over rows that the recipe computes. Attention falls with the square of the rows, which the bound does not count, so
that more than all of it can be reached; patch embedding and projection do not fall at all. Run it in the environment of
`requirements-open_clip.txt`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import interpolate

import vlmprune
from vlmprune.evals.results import Part, Result, stamp
from vlmprune.show.table import code, table

PEAK = 5.0
"""By how much queries and keys of the second model are larger."""
PLAIN, PEAKED = "as made", f"queries and keys × {PEAK:g}"
AT = 4
"""Block of the recipes that drop at one place: behind block 3."""
SHARE_OF_BOUND = 0.85
RECIPES: dict[str, dict[str, float | None]] = {
    # A target is a share of the bound if below 1, else a ratio to un-pruned.
    f"evit:fraction=0.25,blocks={AT - 1}": {PLAIN: SHARE_OF_BOUND, PEAKED: SHARE_OF_BOUND},
    f"evit:fraction=0.25,blocks={AT - 1},fuse=no": {PLAIN: SHARE_OF_BOUND, PEAKED: SHARE_OF_BOUND},
    "evit": {PLAIN: None, PEAKED: None},
    "flowcut:fraction=0.25": {PLAIN: None, PEAKED: 1.7},
    f"random:layer={AT},fraction=0.25": {PLAIN: None, PEAKED: None},
    f"divprune:layer={AT},fraction=0.25": {PLAIN: None, PEAKED: None},
    f"tome:layer={AT},fraction=0.25": {PLAIN: None, PEAKED: None},
}
COLUMNS = (
    "weights",
    "recipe",
    "× un-pruned (quartiles)",
    "token bound",
    "share of it, %",
    "target",
    "own share, %",
    "pictures/s",
)


def build(name: str, peaked: bool) -> Any:
    """A model of open_clip with random weights."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None, load_weights=False).eval()
    if peaked:
        for block in model.visual.transformer.resblocks:
            width = block.attn.embed_dim
            block.attn.in_proj_weight.data[: 2 * width] *= PEAK
    return model


def pictures(model: Any, batch: int) -> Tensor:
    """`[batch, 3, height, width]`: coarse noise under fine noise, so that neighbours are alike."""
    height, width = model.visual.image_size
    draw = torch.Generator().manual_seed(1)
    coarse = torch.randn(batch, 3, 7, 7, generator=draw)
    return interpolate(coarse, size=(height, width), mode="bilinear") + 0.3 * torch.randn(
        batch, 3, height, width, generator=draw
    )


@torch.no_grad()
def encode(model: Any, pixels: Tensor, recipe: str | None) -> tuple[float, Any]:
    """Seconds of the processor in `encode_image`, and the report of the pass."""
    with nullcontext() if recipe is None else vlmprune.wrap(model, recipe) as run:
        begin = time.process_time()
        model.encode_image(pixels)
        taken = time.process_time() - begin
        return taken, None if run is None else run.report()


def measure(model: Any, weights: str, batch: int, rounds: int, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """One line for each recipe, and one for the un-pruned model."""
    pixels = pictures(model, batch)
    seconds: dict[str | None, list[float]] = {None: [], **{recipe: [] for recipe in RECIPES}}
    reports: dict[str, list[Any]] = {recipe: [] for recipe in RECIPES}
    for number in range(rounds + 1):
        for recipe, taken in seconds.items():
            spent, report = encode(model, pixels, recipe)
            if number:  # the first warms up
                taken.append(spent)
                if recipe is not None:
                    reports[recipe].append(report)
        tick()
    lines = [{"weights": weights, "recipe": None, "per_second": batch / median(seconds[None])}]
    for recipe in RECIPES:
        ratios = [plain / own for plain, own in zip(seconds[None], seconds[recipe], strict=True)]
        report = reports[recipe][0]
        full = max(report.entering)
        low, _, high = quantiles(ratios, n=4)
        lines.append(
            {
                "weights": weights,
                "recipe": recipe,
                "ratio": median(ratios),
                "low": low,
                "high": high,
                "bound": full * len(report.entering) / sum(report.entering),
                "entering": list(report.entering),
                "target": RECIPES[recipe][weights],
                "own": median(one.selection_ms / one.tower_ms for one in reports[recipe]),
                "per_second": batch / median(seconds[recipe]),
            }
        )
    return lines


def result(numbers: Mapping[str, Any]) -> Result:
    """The result as a table."""
    title = f"{numbers['model']} of open_clip, random weights, batches of {numbers['batch']}, {numbers['threads']} thread, fp32"
    said = [
        f"× un-pruned: within rounds of {numbers['rounds']}, in seconds of the processor. Load of the machine: "
        f"{numbers['load'][0]:.1f} at the beginning, {numbers['load'][1]:.1f} at the end.",
        "Token bound: rows of all blocks un-pruned over rows that are computed, padding included. Own share: looking at "
        "attention, choosing and dropping, of the time in the tower.",
        "Target: a share of the bound if below 1, else a ratio to un-pruned.",
    ]
    parts: list[Part] = [table(COLUMNS, [cells(line) for line in numbers["lines"]], title=title), said]
    return Result(numbers, parts)


def cells(line: Mapping[str, Any]) -> Sequence[str]:
    """One line of the table."""
    per_second = f"{line['per_second']:.2f}"
    if line["recipe"] is None:
        return line["weights"], "un-pruned", "1", "1", "", "", "", per_second
    ratio, share, target = line["ratio"], line["ratio"] / line["bound"], line["target"]
    shown = ""
    if target is not None:
        met = share >= target if target < 1 else ratio >= target
        shown = (f"≥ {100 * target:.0f} % of it" if target < 1 else f"≥ {target:g} ×") + ("" if met else ": missed")
    spread = f"{ratio:.2f} ({line['low']:.2f}–{line['high']:.2f})"
    own = f"{100 * line['own']:.1f}"
    return line["weights"], code(line["recipe"]), spread, f"{line['bound']:.2f}", f"{100 * share:.0f}", shown, own, per_second


def main(
    model: Annotated[str, typer.Option(help="A ViT of open_clip.")] = "ViT-B-16",
    rounds: Annotated[int, typer.Option(min=3)] = 7,
    batch: Annotated[int, typer.Option(min=1)] = 4,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path("docs/results/image_towers-cpu"),
) -> None:
    """Measure, print, and write the results."""
    torch.set_num_threads(threads)
    begun, lines = os.getloadavg()[0], []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rounds", total=2 * (rounds + 1))
        for weights in (PLAIN, PEAKED):
            lines += measure(build(model, weights == PEAKED), weights, batch, rounds, lambda: bar.advance(task))
    settings = {"model": model, "batch": batch, "rounds": rounds, "threads": threads, "load": [begun, os.getloadavg()[0]]}
    command = f"python benchmarks/image_towers.py --model {model} --rounds {rounds} --batch {batch} --threads {threads}"
    result({**settings, **stamp(command), "lines": lines}).deliver(Console(), out)


if __name__ == "__main__":
    typer.run(main)
