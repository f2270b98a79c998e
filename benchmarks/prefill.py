"""Prefill time, un-pruned against pruned, on the embedded VLM and on a LLaVA-shaped random model of about 100 M parameters.

    python benchmarks/prefill.py [--rounds 9] [--threads 1] [--out benchmarks/results/prefill-cpu]

Both models run SDPA with and without pruning, in interleaved rounds. The times are those of the language model, from the entry
of the prompt with its encoded images. Results are medians with quartiles, and ratios are taken within rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmprune import tiny
from vlmprune.evals.accuracy import UNPRUNED
from vlmprune.evals.bench import Measured, measure
from vlmprune.evals.results import Result, stamp
from vlmprune.show.table import code, table
from vlmprune.tiny.scenes import make_scene

TOKENS = 64
RECIPES = tuple(f"{name},tokens={TOKENS}" for name in ("random:layer=0", "cls:layer=0", "divprune:layer=0", "fastv:layer=2"))
TEXT = 60
"""Text tokens around the image, as in a short LLaVA prompt."""
COLUMNS = ("model", "recipe", "prefill ms (quartiles)", "faster", "FLOPs ratio", "KV KiB")


def llava_shaped(
    dim: int = 768, mlp: int = 2048, layers: int = 12, image_token: int = 1
) -> tuple[LlavaForConditionalGeneration, dict[str, Any]]:
    """A random LLaVA, by default of about 100 M parameters, with 576 visual tokens, and inputs for it."""
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=4096,
        hidden_size=dim,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=dim // 64,
        num_key_value_heads=dim // 64,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token, image_seq_length=576)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    words = torch.randint(10, 4096, (TEXT,))
    ids = torch.cat((words[:35], torch.full((576,), image_token), words[35:]))[None]
    return model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}


def tiny_with_question() -> tuple[Any, dict[str, Any]]:
    """The embedded VLM and one of its scenes."""
    model, processor = tiny.load()
    scene = make_scene(1)
    return model, dict(processor(images=scene.image, text=tiny.prompt(scene.questions[0].text), return_tensors="pt"))


def result(numbers: Mapping[str, Any]) -> Result:
    """One table over both models."""
    cells = []
    for name, rows in numbers["results"].items():
        for row in map(Measured.from_dict, rows):
            took = row.times["prefill"]
            cells.append(
                [
                    name,
                    row.recipe if row.recipe == UNPRUNED else code(row.recipe),
                    f"{took.ms:.1f} ({took.low:.1f}–{took.high:.1f})",
                    f"{row.faster['prefill'].times:.2f}×",
                    f"{row.ideal_prefill:.2f}×",
                    f"{row.kv_bytes / 1024:.0f}",
                ]
            )
    return Result(numbers, [table(COLUMNS, cells, text_columns=2)])


def main(
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path("benchmarks/results/prefill-cpu"),
) -> None:
    torch.set_num_threads(threads)
    results: dict[str, list[Measured]] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name, build in (("embedded VLM", tiny_with_question), ("LLaVA-shaped, random", llava_shaped)):
            model, inputs = build()
            task = progress.add_task(name, total=(rounds + 1) * (len(RECIPES) + 1))
            parameters = sum(weight.numel() for weight in model.parameters())
            rows = measure(model, inputs, RECIPES, rounds, 1, lambda task=task: progress.advance(task))
            results[f"{name}, {parameters / 1e6:.0f} M"] = rows
    out.parent.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/prefill.py --rounds {rounds} --threads {threads}"
    plain = {name: [row.to_dict() for row in rows] for name, rows in results.items()}
    result({**stamp(command), "results": plain}).deliver(Console(), out)


if __name__ == "__main__":
    typer.run(main)
