"""The oracles themselves, and the inputs that all tests use."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    TOLERANCE,
    LiveMaskOracle,
    assert_equals_masked,
    columns_of_image,
    decoder_layers,
    generate_logits,
    image_columns,
    masked_logits,
    naively_dropped_logits,
    random_keep,
)
from promises.stages import BATCHES, families, implementations
from tiny_models import (
    FAMILIES,
    LAYERS,
    image_lengths,
    make_inputs,
    make_single,
    shared,
)

pytestmark = pytest.mark.usefixtures("no_grad")


@implementations
def test_oracle_without_masks_is_the_model(family, attn):
    """Red: the oracle feeds other tokens, positions or masks than the model itself would."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, BATCHES["ragged"])
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(masked_logits(model, inputs, {})[real], model(**inputs).logits[real], atol=TOLERANCE, rtol=0)


@implementations
@pytest.mark.parametrize("fractions", [{0: 0.5}, {2: 0.5}, {1: 0.6, 3: 0.3}], ids=str)
def test_oracles_agree(family, attn, fractions):
    """Red: masking in one full forward, masking step by step with a cache, and naive dropping do not agree."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, BATCHES["ragged"])
    keep = random_keep(model, inputs, fractions)
    with LiveMaskOracle(model, keep):
        _, generated, logits = generate_logits(model, inputs)
    assert_equals_masked(model, inputs, keep, generated, logits)

    masked = masked_logits(model, inputs, keep)
    for row, real in enumerate(inputs["attention_mask"].bool()):
        single = make_single(family, model, BATCHES["ragged"], row)
        alone = {layer: mask[row : row + 1, real] for layer, mask in keep.items()}
        dropped, columns = naively_dropped_logits(model, single, alone)
        torch.testing.assert_close(dropped[0], masked[row, real][columns], atol=TOLERANCE, rtol=0)


def test_oracle_leaves_no_hooks():
    """Red: later tests would compare against a masked "stock" model."""
    model = shared("llava")
    inputs = make_inputs("llava", model, BATCHES["one image"])
    before = model(**inputs).logits
    with LiveMaskOracle(model, random_keep(model, inputs, {1: 0.2})):
        assert (model(**inputs).logits - before).abs().max() > 0.1
    masked_logits(model, inputs, random_keep(model, inputs, {1: 0.2}))
    assert torch.equal(model(**inputs).logits, before)


@families
def test_inputs_do_not_depend_on_the_batch(family):
    """Red: "batch == singles" would compare different prompts."""
    model = shared(family)
    batch = make_inputs(family, model, BATCHES["ragged"])
    pixels = []
    for row in range(3):
        single = make_single(family, model, BATCHES["ragged"], row)
        assert torch.equal(batch["input_ids"][row][batch["attention_mask"][row].bool()], single["input_ids"][0])
        pixels.append(single["pixel_values"])
    assert torch.equal(torch.cat(pixels), batch["pixel_values"])


def test_image_columns_of_the_tests():
    """Red: the tests' own idea of where images are is wrong."""
    for family in FAMILIES:
        model = shared(family)
        inputs = make_inputs(family, model, BATCHES["with text row"])
        found = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for row, images in enumerate(image_lengths(family, BATCHES["with text row"])):
            for ordinal, length in enumerate(images):
                columns = columns_of_image(model, inputs, row, ordinal)
                assert len(columns) == length
                found[row, columns] = True
        assert torch.equal(found, image_columns(model, inputs["input_ids"]))


def test_layers_of_the_tests():
    """Red: the schedules above are not inside the models."""
    for family in FAMILIES:
        assert len(decoder_layers(shared(family))) == LAYERS
