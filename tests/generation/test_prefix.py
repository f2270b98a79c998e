"""A picture is pruned once, and asked many times: what is refused, what it costs, and that a prefix stays what it was."""

from __future__ import annotations

import pytest
import torch
from families.table import TINY, extended, make_inputs, shared
from generation.inputs import beginning, padded, words

import vlmprune as vp
from vlmprune.view import OF_QUESTION

pytestmark = pytest.mark.usefixtures("no_grad")

BLIND = "divprune:layer=0,fraction=0.5"


@pytest.fixture(scope="module")
def model():
    return shared("llava", "sdpa")


# -- the same answers ----------------------------------------------------------------------------------------------------------


def test_sixteen_questions_have_the_answers_of_sixteen_runs(model):
    """Red: questions of a batch see each other's padding, or stand at another place than in a prompt of their own."""
    inputs = make_inputs("llava", [["text6", "image", "text3"]], seed=3)
    questions = [words(1 + seed % 6, seed) for seed in range(16)]
    with vp.wrap(model, "divprune:layer=0|2,fraction=0.6|0.3") as run:
        alone = [model.generate(**extended("llava", inputs, question), max_new_tokens=6)[0, -6:] for question in questions]
        prefix = run.encode(**inputs)
        together = model.generate(**prefix.ask(*padded(questions)), max_new_tokens=6)[:, -6:]
        one_by_one = [model.generate(**prefix.ask(question), max_new_tokens=6)[0, -6:] for question in questions]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(torch.stack(one_by_one), torch.stack(alone))
    assert len({tuple(answer.tolist()) for answer in alone}) > 8, "the test is blind: all questions have the same answer"


STRATEGIES = [
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"do_sample": True},
    {"do_sample": True, "num_return_sequences": 3},
    {"repetition_penalty": 1.7},
    {"prefill_chunk_size": 2},
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_prefix_goes_with_every_strategy(family, strategy):
    """Chunks, too: the picture is behind them."""
    model = shared(family, "sdpa")
    inputs, question = beginning(family), words(6, 1)
    copies = max(strategy.get("num_beams", 1), strategy.get("num_return_sequences", 1))
    with vp.wrap(model, BLIND) as run:
        torch.manual_seed(2)
        plain = {name: value for name, value in strategy.items() if name != "prefill_chunk_size"}
        alone = model.generate(**extended(family, inputs, question), max_new_tokens=6, **plain)
        torch.manual_seed(2)
        asked = run.encode(**inputs).ask(question, copies=copies)
        assert torch.equal(model.generate(**asked, max_new_tokens=6, **strategy), alone)


def test_guesses_on_a_prefix_are_refused(model):
    """Transformers itself computes nonsense there: it feeds the prompt again behind its own cache."""
    with vp.wrap(model, BLIND) as run:
        asked = run.encode(**beginning("llava")).ask(words(6, 1))
        for strategy in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": shared("llava", "sdpa", 1)}):
            with pytest.raises(vp.UsageError, match="feeds the whole prompt once more where past_key_values holds"):
                model.generate(**asked, max_new_tokens=6, **strategy)


def test_beams_without_copies_are_refused(model):
    with vp.wrap(model, BLIND) as run:
        asked = run.encode(**beginning("llava")).ask(words(6, 1))
        with pytest.raises(vp.UsageError, match=r"holds the conversations of 1 row\(s\), and this call has 3"):
            model.generate(**asked, max_new_tokens=6, num_beams=3)


def test_rows_that_begin_together_may_be_continued(model):
    """Red: a cache of a prefix is changed by the conversation that goes on from it."""
    inputs = beginning("llava")
    with vp.wrap(model, BLIND) as run:
        prefix = run.encode(**inputs)
        first = model.generate(**prefix.ask(words(4, 1)), max_new_tokens=4)
        stored = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.cache().layers]
        with run.override(enabled=False):  # the prefix was pruned, whatever is set now
            assert torch.equal(model.generate(**prefix.ask(words(4, 1)), max_new_tokens=4), first)
    for layer, (keys, values) in zip(prefix.cache().layers, stored, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_an_override_counts_for_the_prefix(model):
    with vp.wrap(model, BLIND) as run:
        with run.override(tokens=2):
            small = run.encode(**beginning("llava"))
        assert run.encode(**beginning("llava")).bytes > small.bytes


def test_two_models_with_m_rope_do_not_mix(model):
    """Red: positions of a question come from what the model remembers of another prompt."""
    other = shared("qwen2_5_vl", "sdpa")
    inputs, question = beginning("qwen2_5_vl"), words(4, 1)
    with vp.wrap(other, BLIND) as run:
        alone = other.generate(**extended("qwen2_5_vl", inputs, question), max_new_tokens=5)
        prefix = run.encode(**inputs)
        other.generate(**make_inputs("qwen2_5_vl", [["text2", "image", "image", "text4"]], seed=9), max_new_tokens=2)
        assert torch.equal(other.generate(**prefix.ask(question), max_new_tokens=5), alone)


# -- memory --------------------------------------------------------------------------------------------------------------------


def test_what_questions_take(model):
    """As said: a prefix once; a batch of n questions n times beside it; a copy for one question nothing, until it answers."""
    with vp.wrap(model, BLIND) as run:
        prefix = run.encode(**beginning("llava"))
    layers = prefix.cache().layers
    assert {layer.keys.data_ptr() for layer in layers} == {layer.keys.data_ptr() for layer in prefix.cache().layers}
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert prefix.bytes == stored
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix.cache(5).layers) == 5 * stored
    assert len(prefix) == beginning("llava")["input_ids"].shape[1]
    assert f"{len(prefix)} tokens" in repr(prefix)
    kept = layers[0].keys.shape[2]
    assert kept < len(prefix)


# -- what is refused -----------------------------------------------------------------------------------------------------------

NEED_THE_QUESTION = [
    (
        "fastv:layer=2,fraction=0.4",
        "fastv needs the question: before layer 2 it looks at the attention of the last prompt token",
    ),
    ("pdrop:layer=2,fraction=0.4", "attention of the last prompt token, one layer on"),
    ("adaptinfer:layer=2,fraction=0.4", "attention"),
    ("sparsevlm:layer=2,fraction=0.4", "needs the question"),
    ("cdpruner:fraction=0.4", "embeddings of words"),
    ("dart:layer=2,fraction=0.4", "needs the question"),
    ("divprune:fraction=0.6 + fastv:layer=2,fraction=0.4", "fastv needs the question"),
    ("vscan:layer=0|3,fraction=0.5|0.25", "vscan needs the question: before layer 3"),
    ("divprune:fraction=0.6 + random:layer=4,fraction=0.2,cache_layer=2", "removes tokens from the cache after the prompt"),
    ("zerotuning:gain=2", "zerotuning marks tokens where the prompt ends"),
    ("divprune:fraction=0.5 + var:p=0.6,sink_dims=cosine", "var marks tokens where the prompt ends"),
]


@pytest.mark.parametrize(("recipe", "sentence"), NEED_THE_QUESTION, ids=[recipe for recipe, _ in NEED_THE_QUESTION])
def test_methods_that_need_the_question(model, recipe, sentence):
    """Red: a picture is pruned for no question, or for the first that is asked."""
    ran = []
    handle = model.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with vp.wrap(model, recipe) as run, pytest.raises(vp.UsageError) as refusal:
        run.encode(**beginning("llava"))
    handle.remove()
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not ran


def test_every_method_runs_or_names_the_question(model):
    """No method is forgotten: it gives the kept tokens of a whole prompt, or the refusal says what it looks at."""
    ran = []
    for name in sorted(vp.METHODS):
        try:
            run = vp.wrap(model, f"{name}:fraction=0.5")
        except vp.UsageError:
            continue
        with run:
            if any(bound.needs & OF_QUESTION for bound in run._plan.pruning.stages):
                with pytest.raises(vp.UsageError, match=f"{name} needs the question"):
                    run.encode(**beginning("llava"))
                continue
            run.encode(**beginning("llava"))
            kept = [found.index.tolist() for found in run.last.kept]
            if name != "random":  # which draws for every prompt anew
                model(**extended("llava", beginning("llava"), words(5, 1)))
                assert [found.index.tolist() for found in run.last.kept] == kept, name
            ran.append(name)
    assert {"divprune", "random", "uniform", "tome", "cls", "visionzip"} <= set(ran)


def ask(**given):
    return lambda prefix: prefix.ask(**given)


IDS = torch.tensor([[20, 21, 22]])
BAD_QUESTIONS = [
    (ask(input_ids="a word"), "questions are token ids [question, token], found 'a word'"),
    (ask(input_ids=torch.tensor([20, 21])), "questions are token ids"),
    (ask(input_ids=torch.rand(1, 3)), "questions are token ids"),
    (ask(input_ids=IDS, attention_mask=torch.ones(1, 2)), "attention_mask has the shape [1, 2], the questions [1, 3]"),
    (ask(input_ids=IDS, attention_mask=torch.zeros(1, 3)), "question 0 is empty"),
    (ask(input_ids=IDS, attention_mask=torch.tensor([[1, 0, 1]])), "the mask of question 0 has holes"),
    (ask(input_ids=torch.tensor([[20, 1, 22]])), "question 0 holds an image token"),
    (ask(input_ids=IDS, pixel_values=torch.rand(1, 3, 8, 8)), "found pixel_values: pictures belong into run.encode"),
    (lambda prefix: prefix.cache(0), "a whole number of questions from 1 on, found 0"),
    (lambda prefix: prefix.cache(True), "found True"),
    (ask(input_ids=IDS, copies=0), "copies is a whole number of sequences for each question, from 1 on, found 0"),
]


@pytest.mark.parametrize(("do", "sentence"), BAD_QUESTIONS, ids=[sentence for _, sentence in BAD_QUESTIONS])
def test_bad_questions(model, do, sentence):
    with vp.wrap(model, BLIND) as run, pytest.raises(vp.UsageError) as refusal:
        do(run.encode(**beginning("llava")))
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_token_types_of_words_are_left_out(model):
    with vp.wrap(model, BLIND) as run:
        prefix = run.encode(**beginning("llava"))
        given = prefix.ask(**{"input_ids": IDS.tolist(), "token_type_ids": torch.zeros_like(IDS)})
        assert set(given) == {"input_ids", "attention_mask", "past_key_values"}
        model.generate(**given, max_new_tokens=1)


def test_a_second_beginning_of_text_is_noticed(model, monkeypatch):
    monkeypatch.setattr(model.config.text_config, "bos_token_id", 30)
    inputs = beginning("llava")
    inputs["input_ids"][0, 0] = 30
    with vp.wrap(model, BLIND) as run, pytest.raises(vp.UsageError, match="add_special_tokens=False"):
        run.encode(**inputs).ask(torch.tensor([[30, 20, 21]]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda inputs: {"pixel_values": inputs["pixel_values"]}, "with input_ids [1, token], found pixel_values"),
        (lambda inputs: {}, "found nothing"),
        (lambda inputs: {**inputs, "input_ids": [[20, 1]]}, "input_ids are [[20, 1]], no such tensor"),
        (lambda inputs: make_inputs("llava", [["text2", "image"]] * 2), "found a batch of 2: encode them one by one"),
        (lambda inputs: make_inputs("llava", [["text9"]]), "has no picture"),
        (lambda inputs: {**inputs, "attention_mask": inputs["attention_mask"][:, 1:]}, "must have the shape of input_ids"),
        (lambda inputs: {**inputs, "past_key_values": object()}, "pass no past_key_values to encode"),
    ],
)
def test_bad_beginnings(model, change, sentence):
    with vp.wrap(model, BLIND) as run, pytest.raises(vp.UsageError) as refusal:
        run.encode(**change(beginning("llava")))
    assert sentence in str(refusal.value)


def test_a_recipe_that_is_switched_off_is_the_reason(model):
    """Red: the refusal says that there is no picture."""
    with vp.wrap(model, BLIND) as run, run.override(enabled=False), pytest.raises(vp.UsageError, match="is switched off here"):
        run.encode(**beginning("llava"))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
@pytest.mark.parametrize("recipe", ["evs:fraction=0.6", "uniform:per=frame,fraction=0.5"])
def test_a_video_is_pruned_once(family, recipe):
    model, inputs = shared(family, "sdpa"), make_inputs(family, [["text4", "video", "text2"]])
    questions = [words(1 + seed, seed) for seed in range(3)]
    with vp.wrap(model, recipe) as run:
        alone = [model.generate(**extended(family, inputs, question), max_new_tokens=4)[0, -4:] for question in questions]
        prefix = run.encode(**inputs)
        assert torch.equal(model.generate(**prefix.ask(*padded(questions)), max_new_tokens=4)[:, -4:], torch.stack(alone))


def test_a_prefix_ends_with_its_recipe(model):
    with vp.wrap(model, BLIND) as run:
        prefix = run.encode(**beginning("llava"))
    with pytest.raises(vp.UsageError, match="the recipe it began with has been removed"):
        model.generate(**prefix.ask(IDS), max_new_tokens=2)
    with pytest.raises(vp.UsageError, match="was removed from the model"):
        run.encode(**beginning("llava"))


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("qwen3_5", "layer 0 has no attention (linear_attention): padding"),
        ("gemma3", "layers see a window of 24 tokens, in which"),
    ],
)
def test_padding_behind_a_picture_is_refused_where_it_counts(family, sentence):
    """Red: in a padded batch, answers differ from those of each question alone."""
    model = shared(family, TINY[family].attentions[0])
    with vp.wrap(model, BLIND) as run:
        prefix = run.encode(**beginning(family))
        prefix.ask(*padded([words(3, 1), words(3, 2)]))
        with pytest.raises(vp.UsageError) as refusal:
            prefix.ask(*padded([words(3, 1), words(4, 2)]))
    assert sentence in str(refusal.value)
    assert "ask questions of equal length together, or one at a time" in str(refusal.value)
