"""What dropping before the tower costs and saves: FLOPs as torch counts them, gradients, and how often values are read."""

from __future__ import annotations

import sys

import pytest
import torch
from families.table import build, shared
from pixels.pictures import NAMES, RAGGED, repetitive
from torch.utils.flop_counter import FlopCounterMode

import vlmprune as vp

RECIPES = ("pixelprune", "random:site=pixels,fraction=0.5")


def counted(model, inputs) -> int:
    """FLOPs of the tower and the projector, by torch's own counter."""
    with torch.no_grad(), FlopCounterMode(display=False, depth=8) as counter:
        model(**inputs)
    parts = counter.get_flop_counts().items()
    return sum(
        sum(flops.values()) for name, flops in parts if name.endswith((".visual", ".vision_tower", ".multi_modal_projector"))
    )


@pytest.mark.parametrize("name", [*NAMES, "llava_next"])
def test_flops_are_those_that_torch_counts(name):
    """Red: windows, early mergers or padding are counted as something else than what is multiplied."""
    model, inputs = build(name, "eager"), repetitive(name, RAGGED)
    whole = counted(model, inputs)
    for recipe in RECIPES:
        with vp.wrap(model, recipe) as run:
            pruned, report = counted(model, inputs), run.report()
        assert (report.tower_flops, report.tower_flops_unpruned) == (pruned, whole)
        assert pruned < whole
        assert "vision tower FLOPs" in str(report)
    with vp.wrap(model, "divprune:layer=0,fraction=0.5") as run, torch.no_grad():
        model(**inputs)
    assert run.report().tower_flops_unpruned == 0
    assert "vision tower FLOPs" not in str(run.report())


def test_a_method_between_blocks_is_counted_too():
    model, inputs = build("qwen2_vl", "eager"), repetitive("qwen2_vl", RAGGED)
    whole = counted(model, inputs)
    with vp.wrap(model, "pixelprune + flowcut:fraction=0.2") as run:
        pruned = counted(model, inputs)
    assert (run.report().tower_flops, run.report().tower_flops_unpruned) == (pruned, whole)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_gradients_reach_the_patch_embedding_with_and_without_checkpointing(name):
    """Red: blocks that run again for the gradient are given other patches; or the way back to the first block is cut."""
    found = []
    for checkpointing in (False, True):
        model, inputs = build(name), repetitive(name, [["text3", "image", "text4"]])
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        labels = inputs["input_ids"].clone()
        labels[:, :-4] = -100
        with vp.wrap(model, "pixelprune"):
            model(**inputs, labels=labels).loss.backward()
        tower = model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower
        found.append([weight.grad for weight in tower.parameters() if weight.grad is not None])
    assert max(grad.abs().max() for grad in found[0]) > 1e-4
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_values_are_read_as_often_whatever_the_number_of_pictures(name, monkeypatch):
    """Before the tower: which tokens stay, once for pictures of one size. Red: a wait for each picture."""
    model, reads = shared(name), []
    doors = [module for key, module in sys.modules.items() if key.startswith("vlmprune.") and hasattr(module, "on_host")]
    real = doors[0].on_host
    for module in doors:
        monkeypatch.setattr(module, "on_host", lambda x: (reads.append(tuple(x.shape)), real(x))[1])
    counts = []
    for rows in (2, 4):
        inputs = repetitive(name, [["text2", "image"]] * rows)
        reads.clear()
        with vp.wrap(model, "pixelprune"), torch.no_grad():
            model(**inputs)
        counts.append(len(reads))
    assert counts[1] - counts[0] <= (4 if name == "qwen2_5_vl" else 0), reads
    assert counts[0] <= 10
