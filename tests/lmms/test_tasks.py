"""Tasks of lmms-eval, asked by `vlmprune eval`: stock task code on local data, in the environment of lmms-eval."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import lmms_eval
import pytest
from command_line import vlmprune
from PIL import Image

from vlmprune import tiny
from vlmprune.errors import UsageError
from vlmprune.evals.asking import Asking
from vlmprune.evals.question import Question
from vlmprune.evals.questions import open_questions
from vlmprune.evals.scorers import SCORERS, score
from vlmprune.tiny.scenes import held_out

STOCK = Path(lmms_eval.__file__).parent / "tasks"
NO_ADVICE = "lmms_eval_specific_kwargs: {default: {pre_prompt: '', post_prompt: ''}}\n"
"""The embedded model knows 60 words, and none of "Answer the question using a single word or phrase"."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for what `load_dataset` prepares."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def local(tmp_path, stock: str, rows: list[dict], split: str = "test", more: str = "") -> Path:
    """The YAML file of a stock task, with local data instead of the hub's."""
    import datasets

    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    file = tmp_path / "own.yaml"
    file.write_text(
        f"include: {STOCK / stock}\ntask: own\ndataset_path: {tmp_path / 'data'}\ndataset_name: null\ndataset_kwargs: null\n"
        f"test_split: {split}\n{NO_ADVICE}{more}"
    )
    return file


def scenes(**more):
    return [
        {"image": scene.image, "question": asked.text, "answer": asked.answer, "question_id": str(number), **more}
        for number, scene in enumerate(held_out(2))
        for asked in scene.questions
        if asked.skill in ("existence", "counting")
    ]


def test_pope(tmp_path):
    rows = [{**row, "category": "random"} for row in scenes() if row["answer"] in ("yes", "no")]
    found = open_questions(local(tmp_path, "pope/pope.yaml", rows))
    assert found.metric == "pope_accuracy"
    assert found.scorers == ["pope_accuracy of lmms-eval"]
    assert found.max_new_tokens == 128
    assert [one.text for one in found] == [row["question"] for row in rows]
    assert {one.group for one in found} == {"random"}
    assert len({one.unit for one in found}) == 2
    model, processor = tiny.load()
    asking = Asking(processor, found, 4)
    given = [said for number in range(len(asking.batches)) for said in asking.ask_batch(model, number)]
    assert [score(said, one) for said, one in zip(given, found, strict=True)] == [
        float(said == row["answer"]) for said, row in zip(given, rows, strict=True)
    ]
    assert score("Yes, there is.", found[0]) == float(rows[0]["answer"] == "yes") or score("Yes, there is.", found[0]) == 0
    assert open_questions(tmp_path / "own.yaml", 2, scorer="exact").scorers == ["exact"]


def test_a_picture_that_is_none(tmp_path):
    """Red: a traceback from Pillow, --skip-bad or not. It is counted, named, and left out on request. (lmms-eval itself
    reads the first row when it loads a task, and refuses that one.)"""
    import datasets

    rows = scenes(category="adversarial")[:4]
    file = local(tmp_path, "pope/pope.yaml", rows)
    (table,) = (tmp_path / "data").glob("*.parquet")
    stored = datasets.Dataset.from_parquet(str(table)).cast_column("image", datasets.Image(decode=False))
    spoiled = [{**row, "image": {"bytes": b"none", "path": None}} if number == 1 else row for number, row in enumerate(stored)]
    datasets.Dataset.from_list(spoiled, stored.features).cast_column("image", datasets.Image()).to_parquet(table)
    with pytest.raises(UsageError, match=r"question 1: picture 1 of row 1 cannot be read .* leave it out with --skip-bad"):
        open_questions(file)
    left = open_questions(file, skip_bad=True)
    assert (len(left), left.skipped, left.metric) == (3, ("1",), "pope_accuracy")
    assert [question.id for question in left] == ["0", "2", "3"]


def test_chartqa_and_vqav2(tmp_path):
    rows = [{**row, "type": "human_test"} for row in scenes() if row["answer"].isdigit()]
    (tmp_path / "a").mkdir()
    found = open_questions(local(tmp_path / "a", "chartqa/chartqa.yaml", rows))
    assert (found.metric, found.max_new_tokens) == ("relaxed_overall", 16)
    assert score(rows[0]["answer"], found[0]) == 1
    assert score("99", found[0]) == 0
    people = [{"answer": "two", "answer_id": n} for n in range(3)] + [{"answer": "3", "answer_id": n} for n in range(3, 10)]
    (tmp_path / "b").mkdir()
    rows = [{"image": rows[0]["image"], "question": "how many ?", "answer": "3", "answers": people, "question_id": 1}] * 2
    found = open_questions(local(tmp_path / "b", "vqav2/vqav2_val.yaml", rows, "validation"))
    assert found.metric == "exact_match"
    assert score("2", found[0]) == pytest.approx(0.9)


def test_mmbench_static_needs_a_scorer_and_knows_its_choices(tmp_path):
    image = Image.new("RGB", (16, 16))
    row = {
        "image": image,
        "question": "which ?",
        "answer": "B",
        "A": "left",
        "B": "right",
        "C": "nan",
        "D": "nan",
        "hint": "nan",
    }
    rows = [{**row, "index": n, "source": "x", "split": "dev", "category": "c", "L2-category": "d"} for n in range(2)]
    file = local(tmp_path, "mmbench/mmbench_en_dev_static.yaml", rows, "validation", "metadata: {sys_prompt: 'Options:'}\n")
    file.write_text(file.read_text().replace("task: own", "task: own_static"))
    with pytest.raises(UsageError, match=r"gives no single answer a score between 0 and 1 .*: give --scorer"):
        open_questions(file)
    found = open_questions(file, scorer="choice")
    assert found[0].choices == ("left", "right")
    assert [SCORERS["choice"](said, found[0]) for said in ("B", "right", "A")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("popee", "unknown task 'popee': did you mean 'pope'"),
        ("pope", "pope needs the dataset lmms-lab-encoder/POPE, which is not in the cache on this machine"),
        ("mmbench_en_dev", "asks a language model behind an API, and neither of OPENAI_API_KEY"),
        ("pope_full", "'pope_full' is a group of tasks"),
        ("nowhere.yaml", "there is no task file nowhere.yaml"),
    ],
)
def test_tasks_that_cannot_be_asked(name, sentence, monkeypatch):
    """Within seconds: none of them waits for a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(UsageError) as refusal:
        open_questions(name)
    assert sentence in str(refusal.value)
    assert time.monotonic() - start < 20


def test_likelihood_tasks_and_own_messages_are_for_the_plugin(tmp_path):
    rows = scenes()[:2]
    likelihood = (
        "output_type: multiple_choice\ndoc_to_choice: ['yes', 'no']\ngeneration_kwargs: null\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "a").mkdir()
    file = local(tmp_path / "a", "pope/pope.yaml", rows, more=likelihood)
    with pytest.raises(
        UsageError, match="asks for multiple_choice, not for an answer in words: `vlmprune lmms` runs such tasks"
    ):
        open_questions(file)


def test_our_task_is_what_eval_asks(monkeypatch, capsys):
    """The same questions and answers by way of lmms-eval's task as without it."""
    rows = []
    for data in ((), ("--data", "vlmprune_scenes")):
        command = ("eval", *data, "--images", 20 if data else 2, "--recipe", "divprune:fraction=0.5", "--json")
        assert vlmprune(monkeypatch, *command) == 0
        rows.append(json.loads(capsys.readouterr().out))
    ours, theirs = (open_questions(*spec) for spec in (("scenes", 2), ("vlmprune_scenes", 20)))
    assert [(one.text, one.group) for one in theirs] == [(one.text, one.group) for one in ours][:20]
    assert [picture.tobytes() for one in theirs for picture in one.pictures()] == [
        picture.tobytes() for one in list(ours)[:20] for picture in one.pictures()
    ]
    assert theirs.max_new_tokens == ours.max_new_tokens
    assert len({one.unit for one in theirs}) == 2
    assert rows[1]["rows"][0]["overall"] > 0.9


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    file = local(tmp_path, "chartqa/chartqa.yaml", [{**row, "type": "human_test"} for row in scenes()])
    command = ("eval", "--data", file, "--recipe", "divprune:fraction=0.5", "--json")
    assert vlmprune(monkeypatch, *command) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["scorers"] == ["relaxed_overall of lmms-eval"]
    assert numbers["rows"][0]["mean"] > 0.8


# -- our scorers beside those of lmms-eval -----------------------------------------------------------------------------------

WORDS = (
    "two",
    "2",
    "Two.",
    "cat",
    "the cat",
    "a cat!",
    "cats",
    "1,000",
    "1000",
    "1.5",
    "red-white",
    "red white",
    "yes",
    "",
    "none",
)


def test_vqa_as_in_lmms_eval():
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    draw = random.Random(0)
    for _ in range(300):
        people = draw.choices(draw.sample(WORDS, 4), k=10)
        given = draw.choice(WORDS)
        row = {"question_id": 0, "answers": [{"answer": said, "answer_id": n} for n, said in enumerate(people)]}
        ours = SCORERS["vqa"](given, Question("0", (), "?", tuple(people)))
        assert ours == pytest.approx(vqav2_process_results(row, [given])["exact_match"]), (given, people)


def test_relaxed_as_in_lmms_eval():
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    draw = random.Random(0)
    texts = ("0", "1", "1.05", "1.06", "105%", "-1", "blue", "Blue", "1e2", "", "%")
    for _ in range(300):
        given, right = draw.choice(texts), draw.choice(texts)
        assert SCORERS["relaxed"](given, Question("0", (), "?", (right,))) == relaxed_correctness(given, right), (given, right)


def test_anls_as_in_lmms_eval():
    from lmms_eval.api.metrics import anls

    draw = random.Random(0)
    texts = ("stop", "Stop", "st", "coca cola", "coca cols", "cola", "pepsi", "kitten", "sitting")
    for _ in range(300):
        given, right = draw.choice(texts), draw.sample(texts, 2)
        ours = SCORERS["anls"](given, Question("0", (), "?", tuple(right)))
        assert ours == pytest.approx(anls(references=right, predictions=[given])["anls"]), (given, right)
