"""What VAR costs beside plain SDPA: one decoder layer, 1024 wide, 16 heads, 600 tokens, of which 400 are visual.

    python benchmarks/redistribution.py [--rounds 31] [--threads 1] [--out benchmarks/results/redistribution-cpu]

Both sides run the same LLaVA with one decoder layer in the same process, in turn. The decoder layer is timed with its hooks
(from before its first pre-hook to after its last). With these thresholds sinks exist and most heads are edited. Ratios are
taken within rounds; medians with quartiles.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmprune
from vlmprune.evals.results import Part, Result, stamp, stamped
from vlmprune.show.table import code, table

RECIPES = (
    "var:layers=0,sink_dims=5|40,sink_energy=0.006,max_sink_share=1,min_image_mass=0",
    "pai:layers=0",
    "zerotuning:layers=0,gain=2",
    "act:layers=0,alpha=1",
)
VISUAL, TOKENS, AFTER = 400, 600, 60
PHASES = ("prefill", "decode")
COLUMNS = ("one layer under", "prefill ms", "× plain (quartiles)", "decoding ms", "× plain (quartiles)")


def build() -> tuple[Any, dict[str, Any]]:
    """A random LLaVA with one decoder layer, and a prompt of 600 tokens."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=320, patch_size=16
    )
    text = LlamaConfig(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=1, image_seq_length=VISUAL)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    words = torch.randint(10, 256, (TOKENS - VISUAL,))
    ids = torch.cat((words[:-AFTER], torch.full((VISUAL,), 1), words[-AFTER:]))[None]
    return model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, 320, 320)}


class LayerClock:
    """Times the one decoder layer, hooks included."""

    def __init__(self, model: Any) -> None:
        self.layer = model.model.language_model.layers[0]
        self.times: list[float] = []

    def __enter__(self) -> LayerClock:
        stock = type(self.layer).__call__

        def timed(layer: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = stock(layer, *args, **kwargs)
            self.times.append((time.perf_counter() - start) * 1e3)
            return output

        self.stock, self.kind = stock, type(self.layer)
        self.kind.__call__ = timed
        return self

    def __exit__(self, *_: object) -> None:
        del self.kind.__call__


def measure(model: Any, inputs: dict[str, Any], recipe: str | None, steps: int) -> tuple[float, float]:
    """Milliseconds of the layer: prefill, and the median of some steps of decoding."""
    with vlmprune.wrap(model, recipe) if recipe else nullcontext(), torch.inference_mode(), LayerClock(model) as clock:
        encoded = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        cache = model(
            input_ids=inputs["input_ids"], mm_encoder_outputs={"image": encoded}, use_cache=True, logits_to_keep=1
        ).past_key_values
        for _ in range(steps):
            model(input_ids=torch.tensor([[20]]), past_key_values=cache, logits_to_keep=1)
    return clock.times[0], median(clock.times[1:])


def result(numbers: Mapping[str, Any]) -> Result:
    """Every run with its table; before them, if there are several, the lowest and the highest of their medians."""
    runs = numbers["runs"]
    parts: list[Part] = [numbers["note"]]
    if len(runs) > 1:
        pairs = list(zip(*(run["rows"][1:] for run in runs), strict=True))
        cells = [[code(rows[0]["recipe"]), *(_range(rows, phase) for phase in PHASES)] for rows in pairs]
        parts.append(table(["one layer under", "prefill × plain", "decoding × plain"], cells))
    for run in runs:
        rows = [[_name(row["recipe"]), *_cells(row, "prefill"), *_cells(row, "decode")] for row in run["rows"]]
        parts += [table(COLUMNS, rows), f"VAR: {run['var']}. CPU, fp32.", *stamped(run)]
    return Result(numbers, parts)


def _name(recipe: str) -> str | Text:
    return recipe if recipe == "plain SDPA" else code(recipe)


def _range(rows: Sequence[Mapping[str, Any]], phase: str) -> str:
    ratios = [row[f"{phase}_ratio"] for row in rows]
    return f"{min(ratios):.2f}–{max(ratios):.2f}"


def _cells(row: Mapping[str, Any], phase: str) -> list[str]:
    low, high = row[f"{phase}_quartiles"]
    return [f"{row[f'{phase}_ms']:.2f}", f"{row[f'{phase}_ratio']:.2f} ({low:.2f}–{high:.2f})"]


def main(
    rounds: Annotated[int, typer.Option(min=5)] = 31,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 15,
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path(
        "benchmarks/results/redistribution-cpu"
    ),
    add: Annotated[bool, typer.Option("--add", help="Add this run to those in the file, instead of writing it anew.")] = False,
) -> None:
    torch.set_num_threads(threads)
    model, inputs = build()
    names = [None, *RECIPES]
    times: dict[str | None, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        for name in names:
            took = measure(model, inputs, name, steps)
            if turn > 1:
                times[name].append(took)
    with vlmprune.wrap(model, RECIPES[0]) as run, torch.inference_mode():
        model(**inputs)
        what = str(run.report().edits[0])
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"recipe": name or "plain SDPA"}
        for phase, label in enumerate(PHASES):
            ratios = [mine[phase] / plain[phase] for mine, plain in zip(times[name], times[None], strict=True)]
            low, _, high = quantiles(ratios, n=4)
            row |= {f"{label}_ms": median(t[phase] for t in times[name]), f"{label}_ratio": median(ratios)}
            row |= {f"{label}_quartiles": (low, high)}
        rows.append(row)
    command = f"python benchmarks/redistribution.py --rounds {rounds} --threads {threads} --steps {steps}"
    file = out.with_suffix(".json")
    numbers = json.loads(file.read_text()) if add and file.exists() else {"note": "", "runs": []}
    numbers["runs"].append({**stamp(command), "var": what, "rows": rows})
    out.parent.mkdir(parents=True, exist_ok=True)
    result(numbers).deliver(Console(), out)


if __name__ == "__main__":
    typer.run(main)
