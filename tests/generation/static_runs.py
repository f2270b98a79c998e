"""Runs the cells of the family matrix with static caches, and counts the graphs that torch compiles."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from families import running
from families.cells import CELLS, Cell, refusal_of
from transformers import CompileConfig, StaticCache

WITHOUT = ("no cache", "prompt lookup")
"""Ways without a static cache: transformers takes none there."""
CASES = [cell for cell in CELLS if cell.way not in WITHOUT and refusal_of(cell) is None]
FEW = {
    "llava": ("1+3-attention-greedy",),
    "qwen2_5_vl": ("1+3-blind-beams", "2-ahead-greedy"),
    "qwen3_vl": ("2-blind-second_turn",),
    "gemma3": ("2-blind-second_turn", "0-blind-greedy"),
    "gemma4_e": ("0-blind-second_turn",),
    "qwen3_5": ("0-blind-sampling",),
    "paligemma": ("1+3-blind-greedy",),
}
"""By family, stages, kind and way of what `make test` runs: windows, shared keys, recurrent layers, blocks, DeepStack."""
ALL = os.environ.get("VLMPRUNE_STATIC") == "all"
"""`make test-static` runs everything."""


def few() -> list[Cell]:
    """What `make test` runs: of each, the ragged batch where there is one, in the family's first attention."""
    wanted = []
    for name, endings in FEW.items():
        mine = [cell for cell in CASES if cell.family == name]
        for ending in endings:
            fits = [cell for cell in mine if cell.id.endswith(ending)]
            wanted.append(next((cell for cell in fits if cell.batch == "ragged"), fits[0]))
    return wanted


def in_static_cache(generate: Callable[..., Any]) -> Callable[..., Any]:
    """`running.generate` with a static cache: `generate`'s own, or the caller's where a second turn will need more room."""

    def generate_static(model: Any, inputs: dict[str, Any], steps: int = running.STEPS, **strategy: Any) -> Any:
        if "past_key_values" not in inputs:
            room = inputs["input_ids"].shape[1] + 20
            if steps == 3:  # a second turn follows
                inputs = {**inputs, "past_key_values": StaticCache(model.config, room)}
            else:
                strategy["cache_implementation"] = "static"
        output, new, logits = generate(model, inputs, steps, disable_compile=True, **strategy)
        assert output.past_key_values.is_compileable
        return output, new, logits

    return generate_static


def alone(cell: Cell, **changes: Any) -> Cell:
    return replace(cell, **changes)


class Graphs:
    """A backend for `torch.compile` that runs what it is given, and counts it."""

    count = 0

    def config(self, **settings: Any) -> CompileConfig:
        """Settings for `generate`, which compiles on a CPU only if it is told to."""

        def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:  # transformers copies what is no function
            self.count += 1
            return graph.forward

        made = CompileConfig(backend=backend, mode=None, **settings)
        made._compile_all_devices = True
        return made
