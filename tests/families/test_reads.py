"""Injected layers wait for the device no more than others: the prompt is read once, before the first layer."""

from __future__ import annotations

import pytest
import torch
from families.table import BATCHES, build, make_inputs
from promises.test_waiting import ask as ask  # a fixture

import vlmprune as vp


@pytest.mark.parametrize("recipe", ["random:layer=0,tokens=4", "random:layer=0,tokens=6 + random:layer=2,tokens=3"])
def test_a_prompt_with_injected_layers_is_read_once(recipe, ask):
    """Red: which rows get features is read to the host, or a mask is an index. (What the stock model itself adds waits: a stage
    before its first layer leaves it nothing to add.)"""
    model, inputs = build("qwen3_vl"), make_inputs("qwen3_vl", BATCHES["ragged"][:2])
    with torch.no_grad():
        pixels = {name: inputs.pop(name) for name in ("pixel_values", "image_grid_thw")}
        encoded = model.model.get_image_features(**pixels, return_dict=True)
        inputs["position_ids"] = model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs.pop("mm_token_type_ids"),
            image_grid_thw=pixels["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )[0]
    encoded.pooler_output = [features.to("meta") for features in encoded.pooler_output]
    encoded.deepstack_features = [[part.to("meta") for part in features] for features in encoded.deepstack_features]
    encoded.last_hidden_state = encoded.last_hidden_state.to("meta")
    inputs["mm_encoder_outputs"] = {"image": encoded}
    model = model.to("meta")
    with vp.wrap(model, recipe):
        _, reads = ask(model, inputs)
    assert len(reads) == 1, reads
