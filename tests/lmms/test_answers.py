"""The plugin inside lmms-eval's evaluator: answers, columns, likelihoods, rounds, texts without pictures, resuming."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise

import pytest
import torch
from lmms.evaluating import answers, counts, evaluate

import vlmprune as vp
from vlmprune import tiny
from vlmprune.evals.asking import Asking
from vlmprune.evals.lmms import Chat, Simple
from vlmprune.evals.lmms_asking import Asker
from vlmprune.evals.questions import open_questions
from vlmprune.tiny.scenes import held_out

FLOWCUT = "flowcut:tokens=32"
SCENES = 3
QUESTIONS = [(scene, question) for scene in held_out(SCENES) for question in scene.questions]


@pytest.mark.parametrize("recipe", ["none", FLOWCUT])
def test_answers_are_those_of_vlmprune_eval(recipe):
    """One by one, at batch 8. Red: another prompt, other pixels, another recipe, another order, or a longer answer."""
    questions = open_questions("scenes", SCENES)
    model, processor = tiny.load()
    asking = Asking(processor, questions, encode_once=True)
    if recipe != "none":
        vp.wrap(model, recipe)
    wanted = [answer for number in range(len(asking.batches)) for answer in asking.ask_batch(model, number)]
    found = answers(evaluate("vlmprune_scenes", recipe, limit=len(questions)))
    assert len(found) == len(wanted) == len(QUESTIONS)
    assert found == wanted
    assert len(set(found)) > 5


def test_a_batch_is_its_samples():
    """And what was kept, too. Red: padding on the right, or columns of another row of the batch."""
    batched, single = (evaluate("vlmprune_scenes", FLOWCUT, batch=batch, limit=11) for batch in (8, 1))
    assert answers(batched) == answers(single)
    for name in ("input_tokens", "output_tokens", "visual_tokens", "kept_tokens", "kept_entering_layers"):
        assert [row[name] for row in counts(batched)] == [row[name] for row in counts(single)], name
    assert {row["batch"] for row in counts(batched)} == {8, 3}
    assert {row["batch"] for row in counts(single)} == {1}


def test_columns():
    """Beside each sample, and their means in lmms-eval's own table; alike for the un-pruned model."""
    plain, pruned = (evaluate("vlmprune_scenes", recipe, limit=8) for recipe in ("none", "fastv:layer=2,fraction=0.25"))
    for row in counts(plain):
        assert (row["visual_tokens"], row["kept_tokens"], row["kept_leaving_layers"]) == (144, 144, 144)
        assert row["selection_share_of_ttft"] == 0
    for row in counts(pruned):
        assert (row["visual_tokens"], row["kept_tokens"]) == (144, 36)
        assert row["kept_entering_layers"] == (2 * 144 + 6 * 36) / 8
        assert row["kept_leaving_layers"] == (144 + 7 * 36) / 8
        assert 0 < row["selection_share_of_ttft"] < 1
        assert 0 < row["prefill_ms"] < row["ttft_ms"]
    for name in ("kv_mib", "prefill_gflops"):
        assert counts(pruned)[0][name] < counts(plain)[0][name]
    means = pruned["throughput"]
    for name, values in {"avg_kept_tokens": [36], "avg_ttft_ms": [row["ttft_ms"] for row in counts(pruned)]}.items():
        assert means[name] == pytest.approx(sum(values) / len(values))


@pytest.mark.parametrize("recipe", ["none", "fastv:layer=2,fraction=0.25"])
def test_likelihood(recipe):
    """Every loss is the mean −log p of its answer, prompt first; and the best choice is the right one.

    Red: a sum, a log-probability (lmms-eval takes the smallest), or a prompt that is computed together with its answer.
    """
    results = evaluate("vlmprune_attributes_likelihood", recipe, limit=6, simple=True)
    assert results["results"]["vlmprune_attributes_likelihood"]["acc,none"] == 1
    documents = [(scene, question) for scene, question in QUESTIONS if question.skill in ("colour", "shape")]
    samples = sorted(results["samples"]["vlmprune_attributes_likelihood"], key=lambda sample: sample["doc_id"])
    model, processor = tiny.load()
    if recipe != "none":
        vp.wrap(model, recipe)
    for sample, (scene, question) in zip(samples, documents, strict=False):
        for (loss, greedy), choice in zip(sample["filtered_resps"], sample["doc"]["choices"], strict=True):
            inputs = processor(images=scene.image, text=tiny.prompt(question.text), return_tensors="pt")
            (token,) = processor.tokenizer(choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(**inputs).logits[0, -1]  # the prompt alone
            assert loss == pytest.approx(-float(logits.log_softmax(-1)[token]), abs=1e-4)
            assert greedy == (int(logits.argmax()) == token)


FUNCTIONS = """
from vlmprune.evals.scene_tasks import picture

def visuals(document):
    return picture(document) if document["picture"] else []

def rounds(document, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return document["question"]
    if round_idx == 3:
        return None, None, True, previous_output, previous_round_info
    seen = (previous_round_info or 0) + 1
    assert seen == round_idx, (seen, round_idx)
    return picture(document), f"is there a {previous_output[-1]} circle ?", False, previous_output, seen

def process(document, results):
    return {"score": len(results)}
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: data.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function functions.visuals
doc_to_text: {text}
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 3, until: [], modalities: [image]}}
process_results: !function functions.process
metric_list: [{{metric: score, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def folder(tmp_path):
    """Two tasks about documents with and without a picture: one with single questions, one with three rounds."""
    rows = [
        {"scene": scene.seed, "question": question.text, "answer": question.answer, "picture": number % 3 != 1}
        for number, (scene, question) in enumerate(QUESTIONS[:10])
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "one.yaml").write_text(TASK.format(name="some_without", kind="generate_until", text="question"))
    rounds = TASK.format(name="rounds", kind="generate_until_multi_round", text="!function functions.rounds")
    (tmp_path / "rounds.yaml").write_text(rounds)
    return tmp_path


@pytest.mark.parametrize("simple", [False, True])
def test_texts_without_a_picture(folder, simple):
    """In one task, in one batch of requests. Red: the recipe refuses them, or answers get to other documents."""
    results = evaluate("some_without", FLOWCUT, include=folder, simple=simple)
    model, processor = tiny.load()
    wanted = []
    for number, (scene, question) in enumerate(QUESTIONS[:10]):
        if number % 3 == 1:
            inputs = processor(text=f"USER: {question.text} ASSISTANT:", return_tensors="pt")
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=3)
            wanted.append(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        else:
            with vp.wrap(model, FLOWCUT):
                wanted += tiny.answers.answer(model, processor, [(scene.image, question.text)])
    assert answers(results) == wanted
    assert [row["visual_tokens"] for row in counts(results)] == [0 if number % 3 == 1 else 144 for number in range(10)]


@pytest.mark.parametrize("simple", [False, True])
def test_several_rounds(folder, simple):
    """Each round gets the answers before it, and what the task remembers. Red: one answer for all, or a conversation lost."""
    results = evaluate("rounds", FLOWCUT, include=folder, simple=simple)
    (samples,) = results["samples"].values()
    assert len(samples) == 10
    model, processor = tiny.load()
    vp.wrap(model, FLOWCUT)
    for sample in samples:
        said = sample["resps"][0][0]
        assert len(said) == 3
        scene, _ = QUESTIONS[sample["doc_id"]]
        for before, answer in pairwise(said):
            assert [answer] == tiny.answers.answer(model, processor, [(scene.image, f"is there a {before} circle ?")])


def test_resumed(tmp_path, monkeypatch):
    """A run that fails in its third batch keeps two, and the next asks the rest only. Red: lmms-eval's own cache keeps none."""
    whole = answers(evaluate("vlmprune_scenes", FLOWCUT, limit=20, batch=4))
    asked = []
    answer = Asker.answer

    def failing(self, prompts, options):
        if len(asked) == 2:
            raise RuntimeError("the machine fails")
        asked.append(len(prompts))
        return answer(self, prompts, options)

    store = tmp_path / "answers"
    monkeypatch.setattr(Asker, "answer", failing)
    with pytest.raises(RuntimeError, match="the machine fails"):
        evaluate("vlmprune_scenes", FLOWCUT, limit=20, batch=4, resume=store)
    rest = []
    monkeypatch.setattr(
        Asker, "answer", lambda self, prompts, options: (rest.append(len(prompts)), answer(self, prompts, options))[1]
    )
    assert answers(evaluate("vlmprune_scenes", FLOWCUT, limit=20, batch=4, resume=store)) == whole
    assert (sum(asked), sum(rest)) == (8, 12)
    again = evaluate("vlmprune_scenes", FLOWCUT, limit=20, batch=4, resume=store)
    assert answers(again) == whole
    assert sum(rest) == 12
    assert counts(again)[0]["kept_tokens"] == 32
    with pytest.raises(vp.UsageError, match=re.escape(f"recipe '{FLOWCUT}' there, 'none' here")):
        evaluate("vlmprune_scenes", "none", limit=20, batch=4, resume=store)


def test_refusals():
    """One sentence each, before a model is loaded or as soon as lmms-eval asks."""
    for wrong, sentence in [
        (
            {"recipe": "random:layer=0", "fraction": 0.25},
            'only half of the recipe arrived.*recipe="random:layer=0,fraction=0.25"',
        ),
        ({"recipee": "none"}, "unknown model argument 'recipee': did you mean 'recipe'"),
        ({"batch_size": "auto"}, "batch_size must be a whole number, found 'auto'"),
        ({"dtype": "float23"}, "unknown dtype 'float23'"),
        ({"system": "be brief"}, "no system role"),
    ]:
        with pytest.raises(vp.UsageError, match=sentence):
            Chat(pretrained="tiny", **wrong)
    model = Simple(pretrained="tiny", recipe='"fastv:layer=2"', system="")
    for name in ("chat_template", "apply_chat_template", "tokenizer_name"):
        with pytest.raises(vp.UsageError, match="--apply_chat_template would apply it twice"):
            getattr(model, name)
    model.clean()


def test_under_torchrun_a_failing_process_ends(monkeypatch, capsys):
    """With an error, so that torchrun ends the others. Red: lmms-eval catches the error, and they wait for hours."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some run")
    with pytest.raises(SystemExit) as stopped:
        Chat(pretrained="tiny", recipe="fastv:layer=99")
    assert stopped.value.code == 1
    assert "UsageError: fastv prunes at layer 99" in capsys.readouterr().err


def test_clean_restores_the_model_and_frees_it():
    """Red: a handle keeps the model in memory while a judge is loaded."""
    import gc
    import weakref

    model = Chat(pretrained="tiny", recipe="fastv")
    kept = weakref.ref(model._session._asker.model)
    model.clean()
    gc.collect()
    assert kept() is None


def test_yes_ratio_is_that_of_the_answers():
    """Red: the right answers are counted, as lmms-eval's POPE does, which are half yes whatever the model says."""
    results = evaluate("vlmprune_existence_random", "random:layer=0,tokens=1", limit=40)
    scores = results["results"]["vlmprune_existence_random"]
    said = [answer.split()[0] if answer else "" for answer in answers(results)]
    assert scores["yes_ratio,none"] == said.count("yes") / 40
    assert math.isclose(scores["unclear,none"], sum(word not in ("yes", "no") for word in said) / 40)
    assert scores["yes_ratio,none"] != 0.5
