"""A long video in the shape of Qwen3-VL: prefill and memory of the un-pruned model beside EVS, VidCom2 and DivPrune.

    python benchmarks/long_inputs.py [--frames 64] [--reduce 16] [--rounds 3] [--threads 1] [--out PATH]

A video of 128 frames of 512 × 512 pixels: 64 steps in time of 16 × 16 visual tokens, 16,384 in all, each step with its
timestamp before it. Widths, depths and head sizes are those of Qwen/Qwen3-VL-8B-Instruct, divided by `--reduce` as in
`vlmprune.evals.random_models` (heads stay 128 wide). Weights and pixels are random: speed depends on nothing else, but EVS and
VidCom2 would keep other tokens of a real video. Every method keeps 25 and 10 % before the first layer. Rounds are interleaved
and ratios are taken within rounds (`vlmprune/evals/bench.py`). benchmarks/gpu.py runs the same at full size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vlmprune.evals import bench
from vlmprune.evals.bench import Measured
from vlmprune.evals.random_models import QWEN_MARKS, Shape
from vlmprune.evals.results import Result, stamp
from vlmprune.show.table import code, table

FRAMES = 64
"""Steps in time; each shows two frames of the video."""
SIDE = 16
"""Visual tokens on a side of a frame."""
MERGE, PATCH, TEMPORAL = 2, 16, 2
TIMESTAMP = 4
"""Words of a timestamp."""
SHARES = (0.25, 0.1)
METHODS = ("evs", "vidcom2", "divprune")
RECIPES = tuple(f"{method}:fraction={share:g}" for method in METHODS for share in SHARES)
COLUMNS = (
    "recipe",
    "kept",
    "prefill ms (quartiles)",
    "faster",
    "FLOPs ratio",
    "TTFT faster",
    "peak MiB",
    "KV MiB",
    "ours, of TTFT",
)


def shape(frames: int = FRAMES, side: int = SIDE) -> Shape:
    """Qwen3-VL-8B with a video of `frames` steps in time, each of `side` × `side` visual tokens."""
    return Shape(
        "qwen3-vl-8b, video",
        frames * side * side,
        8_767_123_696,
        RECIPES,
        Qwen3VLForConditionalGeneration,
        _config,
        partial(_video, frames, side),
    )


def _config(reduce: int) -> Qwen3VLConfig:
    deep = max(reduce // 2, 1)
    depth, width, heads = max(27 // deep, 3), 1152 // reduce, max(32 // reduce, 1)
    vision = {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": 4304 // reduce,
        "num_heads": max(16 // reduce, 1),
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "out_hidden_size": 128 * heads,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [depth * part // 4 for part in (1, 2, 3)],
    }
    text = {
        "vocab_size": 151936,
        "hidden_size": 128 * heads,
        "intermediate_size": 12288 // reduce,
        "num_hidden_layers": 36 // deep,
        "num_attention_heads": heads,
        "num_key_value_heads": max(8 // reduce, 1),
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    }
    return Qwen3VLConfig(
        vision_config=vision,
        text_config=text,
        **QWEN_MARKS,
    )


def _video(frames: int, side: int, config: Any, batch: int, random: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
    """Every step in time: a timestamp, and a run of placeholders between marks."""
    shown = [config.vision_start_token_id, *[config.video_token_id] * (side * side), config.vision_end_token_id]
    stamps = torch.randint(10, 1000, (frames, TIMESTAMP), generator=random).tolist()
    pixels = torch.randn(batch * frames * (MERGE * side) ** 2, 3 * TEMPORAL * PATCH**2, generator=random)
    grids = torch.tensor([[frames, MERGE * side, MERGE * side]]).expand(batch, -1)
    return [word for own in stamps for word in (*own, *shown)], {"pixel_values_videos": pixels, "video_grid_thw": grids}


def measure(
    made: Shape,
    device: str,
    dtype: torch.dtype,
    reduce: int,
    rounds: int,
    tick: Callable[[], None],
    enough: Callable[[], bool] = lambda: False,
) -> list[Measured]:
    """The un-pruned model and `RECIPES`, in interleaved rounds; `tick` and `enough` as in `bench.measure`."""
    model = made.build(device, dtype, reduce)
    return bench.measure(model, made.inputs(model, 1), made.recipes, rounds, 1, tick, enough)


def result(numbers: Mapping[str, Any]) -> Result:
    """One table, the un-pruned model first."""
    rows = [Measured.from_dict(row) for row in numbers["rows"]]
    title = f"{numbers['title']}, {rows[0].prompt:,} tokens in the prompt, {rows[0].rounds} rounds"
    return Result(numbers, [title, table(COLUMNS, map(cells, rows), title=title)])


def cells(row: Measured) -> list[Any]:
    """One line of the table."""
    plain, took = row.recipe == bench.UNPRUNED, row.times["prefill"]

    def ratio(phase: str) -> str:
        found = row.faster[phase]
        return "—" if plain else f"{found.times:.2f}× [{found.low:.2f}, {found.high:.2f}]"

    return [
        row.recipe if plain else code(row.recipe),
        f"{row.visual:,.0f}",
        f"{took.ms:,.0f} ({took.low:,.0f}–{took.high:,.0f})",
        ratio("prefill"),
        "—" if plain else f"{row.ideal_prefill:.2f}×",
        ratio("ttft"),
        f"{row.peak_bytes / 2**20:,.0f}",
        f"{row.kv_bytes / 2**20:,.0f}",
        "—" if plain else f"{row.overhead_share:.1%}",
    ]


def main(
    frames: Annotated[int, typer.Option(min=2, help="Steps in time, of 256 visual tokens each.")] = FRAMES,
    reduce: Annotated[int, typer.Option(help="1, 2, 4, 8 or 16: divides widths, and depths by half of it.")] = 16,
    rounds: Annotated[int, typer.Option(min=3)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path("docs/results/long_inputs-cpu"),
) -> None:
    torch.set_num_threads(threads)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("long inputs", total=(rounds + 1) * (len(RECIPES) + 1))
        rows = measure(shape(frames), "cpu", torch.float32, reduce, rounds, lambda: progress.advance(task))
    out.parent.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/long_inputs.py --frames {frames} --reduce {reduce} --rounds {rounds} --threads {threads}"
    title = f"{shape(frames).name}, {shape(frames).visual:,} visual tokens, widths / {reduce}, fp32"
    plain = [row.to_dict() for row in rows]
    result({**stamp(command), "title": title, "rows": plain}).deliver(Console(), out)


if __name__ == "__main__":
    typer.run(main)
