"""Pictures that `inputs_embeds` holds already: where they are is said in a block; the rest is as from ids."""

from __future__ import annotations

import pytest
import torch
from families.table import BATCHES, make_inputs, shared, visual_columns
from generation.inputs import merged

import vlmprune as vp

pytestmark = pytest.mark.usefixtures("no_grad")

RECIPE = "divprune:layer=0|2,fraction=0.6|0.3"


@pytest.fixture(scope="module")
def given():
    model = shared("llava", "sdpa")
    inputs = make_inputs("llava", BATCHES["ragged"])
    return model, inputs, merged("llava", model, inputs)


def numbered(inputs):
    """The number of each token's picture in its row, from the runs of placeholders."""
    there = visual_columns(inputs).int()
    begins = (there.diff(dim=1, prepend=torch.zeros(len(there), 1, dtype=torch.int)) == 1).cumsum(1)
    return begins * there


@pytest.mark.parametrize(
    "say", [visual_columns, numbered, lambda inputs: visual_columns(inputs).tolist(), lambda inputs: numbered(inputs).numpy()]
)
def test_the_same_as_from_ids(given, say):
    """Red: pictures are cut at other places, or decided together."""
    model, inputs, embedded = given
    with vp.wrap(model, RECIPE) as run:
        expected = model.generate(**inputs, max_new_tokens=5)[:, -5:]
        kept = [(found.sample, found.layer, found.index.tolist()) for found in run.last.kept]
        with run.override(image_positions=say(inputs)):
            assert torch.equal(model.generate(**embedded, max_new_tokens=5), expected)
            assert [(found.sample, found.layer, found.index.tolist()) for found in run.last.kept] == kept
            beams = model.generate(**embedded, max_new_tokens=5, num_beams=2, num_return_sequences=2)
            assert len(run.last.keep[0]) == 2 * len(expected)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, num_beams=2, num_return_sequences=2)[:, -5:], beams)


def test_a_budget_and_places_go_together(given):
    model, inputs, embedded = given
    with vp.wrap(model, "divprune:fraction=0.5") as run, run.override(tokens=2, image_positions=visual_columns(inputs)):
        model.generate(**embedded, max_new_tokens=2)
        assert {len(found.index) for found in run.last.kept} == {2}


def test_a_later_turn_with_embeddings(given):
    """The places are those of the whole conversation, as its embeddings are."""
    model, inputs, embedded = given
    words = torch.randint(8, 96, (3, 4), generator=torch.Generator().manual_seed(4))
    with vp.wrap(model, RECIPE) as run, run.override(image_positions=visual_columns(inputs)):
        first = model.generate(**embedded, max_new_tokens=3, return_dict_in_generate=True)
        asked = torch.cat([inputs["input_ids"], first.sequences, words], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, asked.shape[1] - inputs["input_ids"].shape[1]).long()], 1)
        turn = {"input_ids": asked, "attention_mask": mask, "past_key_values": first.past_key_values}
        by_embeddings = model.generate(**turn, max_new_tokens=4)[:, -4:]
    with vp.wrap(model, RECIPE):
        first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
        turn["past_key_values"] = first.past_key_values
        assert torch.equal(model.generate(**turn, max_new_tokens=4)[:, -4:], by_embeddings)


WRONG = [
    ("here", "image_positions must be [batch, token]"),
    ([[0, 1], [1]], "image_positions must be [batch, token]"),
    ([0, 1, 1], "image_positions must be [batch, token]"),
    (torch.ones(3, 4), "image_positions must be [batch, token]"),
    ([[0, 2, 2]], "numbers the pictures of row 0 as [2]: number them 1, 2"),
    ([[0, 1, 1, 2, 1]], "numbers the pictures of row 0 as [1, 2]"),
    ([[0, -1, -1]], "numbers the pictures of row 0 as [-1]"),
]


@pytest.mark.parametrize(("places", "sentence"), WRONG, ids=[str(places)[:20] for places, _ in WRONG])
def test_wrong_places_are_refused_where_they_are_said(given, places, sentence):
    with vp.wrap(given[0], RECIPE) as run, pytest.raises(vp.UsageError) as refusal, run.override(image_positions=places):
        pass
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_places_that_do_not_fit_the_call(given):
    model, inputs, embedded = given
    there = visual_columns(inputs)
    with vp.wrap(model, RECIPE) as run:
        for places in (there[:, 1:], there[:2]):
            with run.override(image_positions=places), pytest.raises(vp.UsageError, match="image_positions has the shape"):
                model.generate(**embedded, max_new_tokens=2)
        with run.override(image_positions=there):
            with pytest.raises(vp.UsageError, match="but this prompt has input_ids: leave it out"):
                model.generate(**inputs, max_new_tokens=2)
            with pytest.raises(vp.UsageError, match="brings pixels or features beside them"):
                model(**embedded, pixel_values=inputs["pixel_values"])
        with pytest.raises(vp.UsageError, match=r"say them in `with run.override\(image_positions=…\):`"):
            model.generate(**embedded, max_new_tokens=2)


@pytest.mark.parametrize("recipe", ["evs:fraction=0.6", "vidcom2:fraction=0.6", "fastvid:fraction=0.6"])
def test_frames_among_embeddings_are_not_known(recipe):
    """Red: a video is taken for a picture, in which EVS finds nothing that is repeated."""
    model, inputs = shared("qwen2_5_vl", "sdpa"), make_inputs("qwen2_5_vl", BATCHES["video"])
    embedded = merged("qwen2_5_vl", model, inputs)
    sentence = "image_positions says where pictures are, but not which tokens are frames"
    with (
        vp.wrap(model, recipe) as run,
        run.override(image_positions=visual_columns(inputs)),
        pytest.raises(vp.UsageError, match=sentence),
    ):
        model.generate(**embedded, max_new_tokens=2)


def test_methods_that_read_words_still_need_ids(given):
    from cases import ROWS

    model, inputs, embedded = given
    recipe = ROWS["cdpruner"].recipe("fraction=0.5")
    with vp.wrap(model, recipe) as run, run.override(image_positions=visual_columns(inputs)):
        model.generate(**embedded, max_new_tokens=2)  # reads embeddings of words
        assert run.last.kept
    with vp.wrap(model, "cls:fraction=0.5") as run:
        encoded = merged("llava", model, inputs)
        with run.override(image_positions=visual_columns(inputs)):
            model.generate(**encoded, max_new_tokens=2)  # what the tower saw is found by the features
            assert run.last.kept
        strange = {**embedded, "inputs_embeds": embedded["inputs_embeds"] * 1.01}
        with (
            run.override(image_positions=visual_columns(inputs)),
            pytest.raises(vp.UsageError, match="features of a picture are"),
        ):
            model.generate(**strange, max_new_tokens=2)
