"""Dropping patches before the vision tower against dropping tokens behind it, end to end, at equal kept tokens.

    python benchmarks/pixels.py [--rounds 5] [--side 392] [--picture document] [--out docs/results/pixels-cpu]

Pictures are drawn (`vlmprune.tiny.pages`: a page of text, a screenshot, a picture without flat areas) and prepared by
transformers' own processor. PixelPrune decides how many tokens it keeps of each; the other methods are given that number. Two
random models with the towers of Qwen2.5-VL (windows) and Qwen3-VL (DeepStack), 512 wide and four blocks deep, and a decoder 768
wide and ten layers deep, so that the tower takes a third of all FLOPs or more, as in the published models. A prefill is one
call with pixels: tower, projector, and language model; its time is that of the process on one thread, so that other work on the
machine does not count. Every round measures every line, in turn; ratios are taken within rounds. The bound of a line is the
ratio of FLOPs by the formulas of `vlmprune.cost`, tower included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import vlmprune
from vlmprune.evals.results import Result, stamp
from vlmprune.show.table import code, table
from vlmprune.tiny import pages

PATCH, MERGE, IMAGE = 14, 2, 1
WORDS = 35, 25
"""Words before and after the picture."""
TEXT = {
    "vocab_size": 4096,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
}
TOWER = {
    "depth": 4,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_heads": 8,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "out_hidden_size": 768,
}
IDS = {"image_token_id": IMAGE, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
BEHIND = ("random:layer=0", "divprune:layer=0", "fastv:layer=2")
TARGET = 1.5
"""On a page of text: speed-up of PixelPrune over that of the fastest method behind the tower."""
COLUMNS = ("recipe", "tokens kept", "patches in the tower", "prefill ms", "× faster than un-pruned (quartiles)", "FLOP bound")


def _qwen2_5_vl() -> Any:
    """Windows of 8 × 8 patches, but for the last block, as in one of eight of the published model."""
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    config = Qwen2_5_VLConfig(
        vision_config={**TOWER, "window_size": 8 * PATCH, "fullatt_block_indexes": [3]},
        text_config={**TEXT, "rope_parameters": rotary},
        **IDS,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    """DeepStack after the first three blocks."""
    rotary = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10]}
    config = Qwen3VLConfig(
        vision_config={**TOWER, "num_position_embeddings": 2304, "deepstack_visual_indexes": [0, 1, 2]},
        text_config={**TEXT, "rope_parameters": rotary},
        **IDS,
    )
    return Qwen3VLForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {"qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl}


def prompt(kind: str, side: int) -> dict[str, Tensor]:
    """A call with one drawn picture."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, image_mean=[0.5] * 3, image_std=[0.5] * 3, size=_size(side)
    )
    prepared = processor(images=pages.KINDS[kind](side, side, 0), return_tensors="pt")
    tokens = int(prepared["image_grid_thw"].prod()) // MERGE**2
    words = torch.randint(10, 4096, (sum(WORDS),), generator=torch.Generator().manual_seed(0))
    ids = torch.cat((words[: WORDS[0]], torch.full((tokens,), IMAGE), words[WORDS[0] :]))[None]
    types = {"mm_token_type_ids": (ids == IMAGE).int()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types, **prepared}


def _size(side: int) -> dict[str, int]:
    """The picture stays as it is."""
    return {"shortest_edge": side**2, "longest_edge": side**2}


def prefill(model: Any, inputs: Mapping[str, Any]) -> float:
    """Seconds of computing from pixels to the last prompt token's logits."""
    start = time.process_time()
    model(**inputs, use_cache=True, logits_to_keep=1)
    return time.process_time() - start


def measure(model: Any, kind: str, side: int, rounds: int, tick: Callable[[], None]) -> dict[str, Any]:
    """One picture in one model: every line, and PixelPrune against the fastest line behind the tower."""
    inputs = prompt(kind, side)
    first = pruned(model, inputs, "pixelprune")[1]
    kept, patches = sum(first.stages[0].kept), int(inputs["image_grid_thw"].prod())
    recipes = ["pixelprune", f"random:site=pixels,tokens={kept}", *(f"{recipe},tokens={kept}" for recipe in BEHIND)]
    seconds: dict[str, list[float]] = {recipe: [] for recipe in ("un-pruned", *recipes)}
    reports = {}
    for turn in range(rounds + 1):  # the first warms up
        taken = {"un-pruned": prefill(model, inputs)}
        tick()
        for recipe in recipes:
            taken[recipe], reports[recipe] = pruned(model, inputs, recipe)
            tick()
        if turn:
            for name, value in taken.items():
                seconds[name].append(value)
    whole = first.tower_flops_unpruned + first.flops_unpruned
    lines = []
    for recipe, report in reports.items():
        tower = report.tower_flops or first.tower_flops_unpruned
        lines.append(
            {
                "recipe": recipe,
                "kept": sum(report.stages[-1].kept),
                "patches": patches * kept // sum(report.stages[0].original) if report.tower_flops else patches,
                "ms": spread([1e3 * s for s in seconds[recipe]]),
                "faster": spread([w / s for w, s in zip(seconds["un-pruned"], seconds[recipe], strict=True)]),
                "bound": whole / (tower + report.flops),
            }
        )
    behind = [line["recipe"] for line in lines if line["recipe"].partition(",")[0] in BEHIND]
    best = max(behind, key=lambda recipe: median(w / s for w, s in zip(seconds["un-pruned"], seconds[recipe], strict=True)))
    bounds = {line["recipe"]: line["bound"] for line in lines}
    return {
        "picture": kind,
        "tokens": sum(first.stages[0].original),
        "patches": patches,
        "kept": kept,
        "unpruned_ms": spread([1e3 * s for s in seconds["un-pruned"]]),
        "tower_share": first.tower_flops_unpruned / whole,
        "lines": lines,
        "best_behind": best,
        "over_best": spread([b / s for b, s in zip(seconds[best], seconds["pixelprune"], strict=True)]),
        "over_best_bound": bounds["pixelprune"] / bounds[best],
    }


def pruned(model: Any, inputs: Mapping[str, Any], recipe: str) -> tuple[float, vlmprune.Report]:
    """Seconds of a prefill, and its report."""
    with vlmprune.wrap(model, recipe) as run:
        return prefill(model, inputs), run.report()


def spread(values: list[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4)
    return {"median": median(values), "low": low, "high": high}


def result(numbers: Mapping[str, Any]) -> Result:
    """For each model and picture, a sentence and a table."""
    parts: list[Any] = []
    for model, found in numbers["models"].items():
        for one in found:
            parts += [_said(model, one), table(COLUMNS, [cells(line, one["patches"]) for line in one["lines"]])]
    return Result(dict(numbers), parts)


def _said(model: str, one: Mapping[str, Any]) -> str:
    over, kept = one["over_best"], one["kept"] / one["tokens"]
    goal = f" (wanted: {TARGET:g})" if one["picture"] == "document" else ""
    return (
        f"{model}, {one['picture']}: {one['tokens']} tokens, {one['patches']} patches; the tower is {one['tower_share']:.0%} "
        f"of all FLOPs; un-pruned prefill {one['unpruned_ms']['median']:.0f} ms. PixelPrune keeps {kept:.0%}, and is "
        f"{over['median']:.2f} ({over['low']:.2f}–{over['high']:.2f}) times as fast as {one['best_behind']}, the fastest "
        f"behind the tower at equal kept tokens{goal}; by FLOPs {one['over_best_bound']:.2f}."
    )


def cells(line: Mapping[str, Any], patches: int) -> list[str | Text]:
    """One line of a table."""
    faster = line["faster"]
    return [
        code(line["recipe"]),
        str(line["kept"]),
        f"{line['patches'] / patches:.0%}",
        f"{line['ms']['median']:.0f}",
        f"{faster['median']:.2f} ({faster['low']:.2f}–{faster['high']:.2f})",
        f"{line['bound']:.2f}",
    ]


def main(
    rounds: Annotated[int, typer.Option(min=3)] = 5,
    side: Annotated[int, typer.Option(min=112, help="Height and width of the pictures, a multiple of 28.")] = 392,
    picture: Annotated[list[str] | None, typer.Option(help=f"{', '.join(pages.KINDS)}; all if not given.")] = None,
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path("docs/results/pixels-cpu"),
) -> None:
    kinds = picture or list(pages.KINDS)
    if unknown := sorted(set(kinds) - set(pages.KINDS)):
        raise typer.BadParameter(f"there is no picture {unknown[0]!r}.", param_hint="--picture")
    if side % (PATCH * MERGE):
        raise typer.BadParameter(f"{side} is no multiple of {PATCH * MERGE}.", param_hint="--side")
    torch.set_num_threads(1)  # time is the process's own: other work on the machine does not count
    models: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress, torch.inference_mode():
        task = progress.add_task("before and behind the tower", total=len(MODELS) * len(kinds) * (rounds + 1) * 6)
        for name, build in MODELS.items():
            torch.manual_seed(0)
            model = build().eval()
            models[name] = [measure(model, kind, side, rounds, lambda: progress.advance(task)) for kind in kinds]
    chosen = "".join(f" --picture {kind}" for kind in picture or ())
    command = f"python benchmarks/pixels.py --rounds {rounds} --side {side}{chosen}"
    out.parent.mkdir(parents=True, exist_ok=True)
    result({**stamp(command), "models": models}).deliver(Console(), out)


if __name__ == "__main__":
    typer.run(main)
