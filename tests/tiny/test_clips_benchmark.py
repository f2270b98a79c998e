"""Questions about clips reach a model through `evals`, and the benchmark on them compares at equal counts."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

import vlmprune
from vlmprune.evals.answers import UNPRUNED
from vlmprune.evals.asking import Asking, batches_of
from vlmprune.evals.questions import open_questions
from vlmprune.evals.results import stamp
from vlmprune.evals.store import Store
from vlmprune.loading.prompts import placeholders
from vlmprune.tiny import load, load_for_clips
from vlmprune.tiny.clip_model import build_clip_processor
from vlmprune.tiny.clips import FRAMES

ROOT = Path(vlmprune.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model():
    return load_for_clips()[0]


@pytest.fixture(scope="module")
def questions():
    return open_questions("clips", 2)


def test_clips_are_questions(questions) -> None:
    again, dev = open_questions("clips", 2), open_questions("clips", 2, split="dev")
    assert questions.fingerprint == again.fingerprint != dev.fingerprint
    assert len({question.unit for question in questions}) == 2
    assert all(len(question.clips()) == 1 and len(question.clips()[0]) == FRAMES for question in questions)
    blank = replace(questions[0], videos=([*questions[0].clips()[0][:-1], questions[0].clips()[0][0]],))
    assert vlmprune.evals.questions.fingerprint_of([blank], str) != vlmprune.evals.questions.fingerprint_of([questions[0]], str)
    with pytest.raises(vlmprune.UsageError, match="unknown split"):
        open_questions("clips", 2, split="tset")


def test_videos_have_batches_of_their_own(questions) -> None:
    mixed = [questions[0], replace(questions[1], id="x", videos=()), questions[2]]
    assert batches_of(mixed, 8) == [[0, 2], [1]]


def test_a_model_without_videos_says_so(questions) -> None:
    with pytest.raises(vlmprune.UsageError, match="reads no videos"):
        Asking(load()[1], questions)


def test_clips_encoded_once_are_answered_alike(model, questions) -> None:
    plain, once = (Asking(build_clip_processor(), questions, 16, encode_once=once) for once in (False, True))
    assert placeholders(model, plain._inputs(0)) == [288] * len(plain.batches[0])
    assert plain.measure_batch(model, 0).given == once.measure_batch(model, 0).given
    with vlmprune.wrap(model, "random:per=frame,tokens=9") as run:
        one, other = plain.measure_batch(model, 0, run), once.measure_batch(model, 0, run)
    assert (one.given, one.kept) == (other.given, [72] * len(one.given))


def test_lines_are_compared_at_equal_counts(model, questions, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("clips")
    asking = Asking(build_clip_processor(), questions, 16, encode_once=True)
    answered = script.measure(model, asking, Store(None, {}), (40,))
    assert {row.recipe for row in answered.answers.values()} >= {UNPRUNED, "evs:layer=0,tokens=40"}
    for row in answered.answers.values():
        assert set(row.kept) == {288 if row.recipe == UNPRUNED else 40}
    numbers = {**stamp("python benchmarks/clips.py"), **script.numbers_of(answered, (40,))}
    over = {row["name"]: row["over_random_per_frame"] for row in numbers["rows"]}
    assert over[script.PER_FRAME] is None
    assert over[UNPRUNED] is None
    assert set(over) == {UNPRUNED, *script.METHODS}
    text = script.result(numbers).markdown()
    assert "40 of 288 tokens kept" in text
    assert text.count("| evs |") == 1
