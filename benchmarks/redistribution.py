"""What VAR costs beside plain SDPA: one decoder layer, 1024 wide, 16 heads, 600 tokens, of which 400 are a picture.

    python benchmarks/redistribution.py [--rounds 31] [--threads 1] [--out benchmarks/results/redistribution-cpu]

Both sides run the same LLaVA with one decoder layer in the same process, in turn; the decoder layer is timed with its hooks
(from before its first pre-hook to behind its last). The layer's thresholds are such that sinks exist and most heads are
edited. Ratios are taken within rounds; medians with quartiles.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmprune
from vlmprune.loading.environment import environment

RECIPES = (
    "var:layers=0,sink_dims=5|40,sink_energy=0.006,max_sink_share=1,min_image_mass=0",
    "pai:layers=0",
    "zerotuning:layers=0,gain=2",
    "act:layers=0,alpha=1",
)
VISUAL, TOKENS, BEHIND = 400, 600, 60


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
    ids = torch.cat((words[:-BEHIND], torch.full((VISUAL,), 1), words[-BEHIND:]))[None]
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


def main(
    rounds: Annotated[int, typer.Option(min=5)] = 31,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 15,
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path(
        "benchmarks/results/redistribution-cpu"
    ),
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
    lines = [
        "| one layer under | prefill ms | × plain (quartiles) | decoding ms | × plain (quartiles) |",
        "|---|---:|---:|---:|---:|",
    ]
    data: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"recipe": name or "plain SDPA"}
        cells = []
        for phase, label in enumerate(("prefill", "decode")):
            ratios = [mine[phase] / plain[phase] for mine, plain in zip(times[name], times[None], strict=True)]
            low, _, high = quantiles(ratios, n=4)
            row |= {f"{label}_ms": median(t[phase] for t in times[name]), f"{label}_ratio": median(ratios)}
            row |= {f"{label}_quartiles": (low, high)}
            cells += [f"{row[f'{label}_ms']:.2f}", f"{median(ratios):.2f} ({low:.2f}–{high:.2f})"]
        data.append(row)
        shown = "plain SDPA" if name is None else f"`{name}`".replace("|", r"\|")
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    command = f"python benchmarks/redistribution.py --rounds {rounds} --threads {threads} --steps {steps}"
    text = "\n".join(
        [
            *lines,
            "",
            f"VAR: {what}.",
            "",
            f"{stamp}, `{command}`, torch {environment()['torch']}, n = {rounds} rounds, CPU, fp32, on a machine doing "
            "other work.",
        ]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text + "\n")
    found = {"date": stamp, "command": command, "environment": environment(), "var": what, "rows": data}
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    typer.run(main)
