"""The small models that other tests stand on: every family runs stock, a batch equals its rows, nothing is degenerate."""

import oracles
import pytest
import torch
from tiny_models import ALL_FAMILIES, IMAGE, NEXT_SIZES, image_lengths, make_inputs, make_single, packed_tokens, shared

BATCH = [["text5", "image", "text4"], ["text2", "image", "text1", "image", "text3"], ["image", "text9"]]
ROWS = range(len(BATCH))
ROUNDING = 2e-5

families = pytest.mark.parametrize("family", ALL_FAMILIES)


@torch.no_grad()
def last_logits(model, inputs):
    return model(**inputs).logits[:, -1]


@families
def test_a_row_of_the_batch_equals_the_row_alone(family):
    model = shared(family)
    batch = make_inputs(family, model, BATCH)
    assert not batch["attention_mask"].all(), "the batch has no padding"
    alone = torch.cat([last_logits(model, make_single(family, model, BATCH, row)) for row in ROWS])
    torch.testing.assert_close(last_logits(model, batch), alone, atol=ROUNDING, rtol=0)


@families
def test_generated_tokens_of_the_batch_equal_those_of_the_row_alone(family):
    model = shared(family)
    prompt = make_inputs(family, model, BATCH)
    together = model.generate(**prompt, max_new_tokens=4)[:, -4:].tolist()
    assert together == [
        model.generate(**make_single(family, model, BATCH, row), max_new_tokens=4)[0, -4:].tolist() for row in ROWS
    ]


@families
def test_a_sample_depends_only_on_the_seed_and_its_number(family):
    model = shared(family)
    batch, other = make_inputs(family, model, BATCH), make_inputs(family, model, BATCH, seed=1)
    single = make_single(family, model, BATCH, 1)
    own = batch["attention_mask"][1].bool()
    assert torch.equal(batch["input_ids"][1, own], single["input_ids"][0])
    assert not torch.equal(batch["pixel_values"], other["pixel_values"])
    features, alone = oracles.projected_features(model, batch)[1:3], oracles.projected_features(model, single)
    for picture, same in zip(features, alone, strict=True):
        torch.testing.assert_close(picture, same, atol=ROUNDING, rtol=0)


@families
def test_logits_have_unit_deviation_and_no_softmax_is_degenerate(family):
    eager = shared(family, "eager")
    with torch.no_grad():
        output = eager(**make_inputs(family, eager, BATCH), output_attentions=True)
    assert 0.7 < float(output.logits[:, -1].std()) < 1.4
    assert float(output.logits[:, -1].softmax(-1).max()) < 0.5
    for attention in output.attentions:
        assert 0.1 < float(attention[:, :, -1].max(-1).values.mean()) < 0.7, "attention is flat or looks at one token"


@families
def test_image_lengths_are_the_numbers_of_features_and_of_placeholders(family):
    model = shared(family)
    inputs, lengths = make_inputs(family, model, BATCH), image_lengths(family, BATCH)
    assert [len(features) for features in oracles.projected_features(model, inputs)] == [n for row in lengths for n in row]
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [sum(row) for row in lengths]
    for row, pictures in enumerate(lengths):
        columns = [oracles.columns_of_image(model, inputs, row, ordinal) for ordinal in range(len(pictures))]
        assert [len(own) for own in columns] == pictures
        assert torch.equal(torch.cat(columns), (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0])


@families
def test_the_masked_oracle_with_nothing_masked_is_the_stock_model(family):
    model = shared(family)
    inputs = make_inputs(family, model, BATCH)
    masked = oracles.masked_logits(model, inputs, {})[:, -1]
    torch.testing.assert_close(masked, last_logits(model, inputs), atol=oracles.TOLERANCE, rtol=0)


def test_llava_next_pictures_differ_in_crops_and_lose_their_padding():
    model = shared("llava_next")
    crops = make_inputs("llava_next", model, BATCH)["pixel_values"].flatten(2).any(-1).sum(1)
    assert sorted(set(crops.tolist())) == [3, 5]
    assert [packed_tokens(size) for size in NEXT_SIZES] == [24, 39]
    assert packed_tokens((24, 48)) == 9 + 3 * 7, "a picture of the crops' own shape has no padding to lose"
