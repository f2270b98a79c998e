"""A wrapped model against a stock eager one whose attention is computed by loops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from oracles import TOLERANCE, generate_logits, masked_logits
from redistribution.explicit import Explicit
from redistribution.recipes import SAMPLES
from tiny_models import make_inputs, shared

import vlmprune as vp


@torch.no_grad()
def assert_equals_the_loops(recipe: str, family: str, attn: str, edited: Callable) -> None:
    """The prompt and four steps of decoding under a recipe equal the stock model under `edited(eager, inputs)`, which gives
    layers and edit. A failure means: rows, layers, sinks, groups, padding, or what decoding remembers differ."""
    model, eager = shared(family, attn), shared(family, "eager")
    inputs = make_inputs(family, model, SAMPLES)
    _, _, plain = generate_logits(model, inputs, 4)
    with vp.wrap(model, recipe):
        _, generated, logits = generate_logits(model, inputs, 4)
    layers, edit = edited(eager, inputs)
    with Explicit(eager, inputs, layers, edit):
        expected = masked_logits(eager, inputs, {}, generated[:, :-1])[:, inputs["input_ids"].shape[1] - 1 :]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    for row, parts in enumerate(SAMPLES):
        if "image" in parts:
            assert (logits[row] - plain[row]).abs().max() > 0.01, f"the test is blind: nothing changed in row {row}"
