"""Asking in fixed batches: every model and question alike, one by one or together, and what it cost."""

from __future__ import annotations

import pytest
import torch
from families.folders import FOLDERS as NEWER
from folders import FOLDERS
from PIL import Image

import vlmprune as vp
from vlmprune import tiny
from vlmprune.errors import UsageError
from vlmprune.evals.asking import Asking, batches_of, under
from vlmprune.evals.question import Question, QuestionSet
from vlmprune.evals.questions import open_questions
from vlmprune.loading.models import load_model
from vlmprune.tiny.evaluate import records
from vlmprune.tiny.scenes import held_out

RECIPES = [None, "flowcut:tokens=32", "fastv:layer=2,fraction=0.25", "var:sink_dims=cosine + divprune:fraction=0.25"]


@pytest.fixture(scope="module")
def embedded():
    return tiny.load()


FAMILIES = {**FOLDERS, **{name: NEWER[name] for name in ("gemma3", "idefics3", "qwen3_vl")}}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def other(request, tmp_path_factory):
    """A model of another family with random weights, and its processor, loaded as a user's."""
    return load_model(str(FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "model")), "cpu")


def questions(*asked: tuple[tuple, str], longest: int = 4, until: tuple[str, ...] = ()) -> QuestionSet:
    own = [Question(str(number), images, text, ("yes",)) for number, (images, text) in enumerate(asked)]
    return QuestionSet("own", tuple(own), "", max_new_tokens=longest, until=until)


def mixed() -> QuestionSet:
    """One picture, two, none; long and short texts; pictures of two sizes."""
    one, other = (scene.image for scene in held_out(2))
    wide = other.resize((96, 48))
    return questions(
        ((one,), "is there a red star ?"),
        ((), "is there a red star ?"),
        ((one, other), "what is the number ?"),
        ((wide,), "is the red star left or right of the blue circle ?"),
        ((), "how many red objects are there ?"),
        ((other,), "what is the number ?"),
    )


def answers(model, asking, recipe=None):
    given = [""] * len(asking.questions)
    with under(model, recipe and vp.Recipe.parse(recipe)):
        for number, batch in enumerate(asking.batches):
            for index, said in zip(batch, asking.ask_batch(model, number), strict=True):
                given[index] = said
    return given


# -- batches -----------------------------------------------------------------------------------------------------------------


def test_batches_are_fixed_and_hold_every_question_once():
    asked = [Question(str(number), (None,) * (number % 3 > 0), "?", ()) for number in range(10)]
    batches = batches_of(asked, 3)
    assert batches == [[0, 3, 6], [1, 2, 4], [5, 7, 8], [9]]
    assert batches_of(asked, 1) == [[number] for number in range(10)]


def test_no_batch_of_nothing(embedded):
    with pytest.raises(UsageError, match="at least one question, found 0"):
        Asking(embedded[1], mixed(), 0)


# -- answers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_scenes_are_answered_as_in_the_plain_way(embedded, recipe):
    """Red: prompt, padding or pictures differ from `vlmprune.tiny.evaluate`'s; or a picture that is encoded once changes."""
    model, processor = embedded
    found = open_questions("scenes", 3)
    with under(model, recipe and vp.Recipe.parse(recipe)):
        plain = [record.given for record in records(model, processor, held_out(3))]
    assert answers(model, Asking(processor, found, 8), recipe) == plain
    assert answers(model, Asking(processor, found, 8, encode_once=True), recipe) == plain


@pytest.mark.parametrize("recipe", RECIPES[:3])
def test_a_batch_answers_as_single_questions_do(embedded, recipe):
    model, processor = embedded
    assert answers(model, Asking(processor, mixed(), 4), recipe) == answers(model, Asking(processor, mixed(), 1), recipe)


@pytest.mark.parametrize("recipe", [None, "divprune:layer=1,fraction=0.5"])
def test_other_families_answer_batches_as_single_questions(other, recipe):
    model, processor = other
    asked = mixed()
    together, single = (answers(model, Asking(processor, asked, size), recipe) for size in (3, 1))
    assert together == single
    assert len(set(together)) > 1, "nothing to be wrong about"


def test_kept_tokens_of_other_families(other):
    """Red: placeholders are counted by the token of prompts, of which Gemma 3's processor makes others."""
    model, processor = other
    asking = Asking(processor, mixed(), 8)
    plain = asking.measure_batch(model, 0)
    with under(model, vp.Recipe.parse("random:layer=0,fraction=1")) as run:
        whole = asking.measure_batch(model, 0, run)
    with under(model, vp.Recipe.parse("random:layer=1,tokens=3")) as run:
        three = asking.measure_batch(model, 0, run)
    separators = [one - 3 * pictures for one, pictures in zip(three.kept, (1, 2, 1, 1), strict=True)]
    assert whole.kept == plain.kept
    assert (whole.share, whole.given) == (1, plain.given)
    assert all(0 <= extra < few for extra, few in zip(separators, plain.kept, strict=True))
    if model.config.model_type != "llava_next":  # which has a token at the end of each row of a picture
        assert separators == [0] * 4
        assert whole.visual == sum(plain.kept)


def test_a_question_without_picture_is_not_changed_by_a_recipe(embedded):
    """Red: a wrapped model refuses it, or drops something."""
    model, processor = embedded
    asking = Asking(processor, questions(((), "is there a red star ?"), ((), "what is the number ?")), 2)
    with under(model, vp.Recipe.parse("fastv:layer=2,fraction=0.1")) as run:
        batch = asking.measure_batch(model, 0, run)
    assert batch.given == answers(model, asking)
    assert (batch.share, batch.visual, batch.kept) == (1, 0, [0, 0])


def test_no_sampling_whatever_the_model_prefers(embedded):
    model, processor = embedded
    asking = Asking(processor, mixed(), 8)
    plain = answers(model, asking)
    usual = model.generation_config
    model.generation_config = type(usual)(**{**usual.to_dict(), "do_sample": True, "temperature": 50.0, "num_beams": 3})
    try:
        assert answers(model, asking) == plain
    finally:
        model.generation_config = usual


def test_answers_end_where_they_are_told_to(embedded):
    model, processor = embedded
    (scene,) = held_out(1)
    asked = ((scene.image,), "what is the number ?")
    (whole,) = answers(model, Asking(processor, questions(asked)))
    assert len(whole.split()) == 3
    first, *_ = whole.split()
    assert answers(model, Asking(processor, questions(asked, until=(" ",)))) == [first]
    assert answers(model, Asking(processor, questions(asked, longest=1))) == [first]


# -- costs -------------------------------------------------------------------------------------------------------------------


def test_what_a_batch_cost(embedded):
    model, processor = embedded
    asking = Asking(processor, mixed(), 4)
    assert asking.batches == [[0, 2, 3, 5], [1, 4]]
    plain = asking.measure_batch(model, 0)
    assert (plain.share, plain.visual, plain.kept) == (1, 5 * 144, [144, 288, 144, 144])
    with under(model, vp.Recipe.parse("fastv:layer=2,fraction=0.25")) as run:
        pruned = asking.measure_batch(model, 0, run)
    assert pruned.kept == [36, 72, 36, 36]
    assert pruned.share == pytest.approx((2 + 6 * 0.25) / 8)
    assert pruned.visual == 5 * 144
    assert pruned.entered == pytest.approx(pruned.share * pruned.visual)
    assert pruned.seconds > 0


def test_a_text_batch_after_one_with_pictures_costs_nothing_of_it(embedded):
    """Red: the record of the earlier prompt is taken for this one's."""
    model, processor = embedded
    asking = Asking(processor, mixed(), 4)
    with under(model, vp.Recipe.parse("fastv:layer=2,fraction=0.25")) as run:
        asking.measure_batch(model, 0, run)
        batch = asking.measure_batch(model, 1, run)
    assert (batch.share, batch.visual, batch.kept) == (1, 0, [0, 0])


# -- refusals ----------------------------------------------------------------------------------------------------------------


def test_a_question_that_cannot_be_a_prompt_is_named(embedded):
    (scene,) = held_out(1)
    with pytest.raises(UsageError, match=r"question 1: image tokens do not match the 2 pictures: 1 <image> for 2 pictures"):
        Asking(embedded[1], questions(((scene.image,), "x ?"), ((scene.image,) * 2, "<image> x ?")))


def test_a_tokenizer_that_cannot_pad(embedded, monkeypatch):
    model, processor = embedded
    asking = Asking(processor, mixed(), 4)
    alone = Asking(processor, mixed(), 1)
    wanted = answers(model, alone)
    monkeypatch.setattr(processor.tokenizer, "_pad_token", None, raising=False)
    monkeypatch.setattr(type(processor.tokenizer), "pad_token", None, raising=False)
    with pytest.raises(UsageError, match=r"no padding token, which a batch needs: .* one question at a time \(--batch 1\)"):
        asking.ask_batch(model, 0)
    assert wanted


def test_a_processor_that_cannot_take_a_picture(embedded):
    model, processor = embedded
    asking = Asking(processor, questions(((Image.new("RGB", (1, 1)),), "x ?")), 1)
    broken = type("Broken", (), {"__call__": lambda self, **_: (_ for _ in ()).throw(ValueError("too small\nmore"))})()
    broken.tokenizer = processor.tokenizer
    asking.processor = broken
    with pytest.raises(UsageError, match=r"the processor cannot take these 1 prompts: too small\."):
        asking.ask_batch(model, 0)


# -- offloaded weights -------------------------------------------------------------------------------------------------------


@pytest.fixture
def offloaded():
    """The embedded model with its weights on the CPU, moved to the device layer by layer: its own device is `meta`."""
    from accelerate import cpu_offload

    model, processor = tiny.load()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    return model, processor


@pytest.mark.parametrize("once", [False, True], ids=["plain", "encoded once"])
@pytest.mark.parametrize("recipe", [None, "fastv:layer=2,fraction=0.25"])
def test_an_offloaded_model_is_asked_where_it_computes(embedded, offloaded, recipe, once):
    """Red: inputs are moved to `model.device`, which is `meta`."""
    model, processor = offloaded
    asking = Asking(processor, open_questions("scenes", 2), 16, once)
    assert answers(model, asking, recipe) == answers(embedded[0], asking, recipe)
