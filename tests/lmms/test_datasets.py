"""Questions from Hugging Face dataset folders. They need the package `datasets`, which the environment of lmms-eval has."""

from __future__ import annotations

import io
import json

import datasets
import pytest
from command_line import vlmprune
from PIL import Image

from vlmprune.errors import UsageError
from vlmprune.evals.questions import open_questions


def png(colour="red", size=(8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


ROWS = [
    {"image": {"bytes": png(colour), "path": None}, "question": f"{colour} ?", "answer": "yes", "category": "colour", "id": n}
    for n, colour in enumerate(("red", "blue", "red"))
]
FEATURES = {
    "image": datasets.Image(),
    "question": datasets.Value("string"),
    "answer": datasets.Value("string"),
    "category": datasets.Value("string"),
    "id": datasets.Value("int64"),
}


def made(rows=ROWS, **features):
    return datasets.Dataset.from_list(rows, features=datasets.Features({**FEATURES, **features} if rows is ROWS else features))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own for what `load_dataset` prepares."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("form", ["saved", "saved with one split", "parquet", "json"])
def test_forms_of_a_folder(tmp_path, form, cache):
    folder = tmp_path / "data"
    if form == "saved":
        made().save_to_disk(folder)
    elif form == "parquet":
        (folder / "data").mkdir(parents=True)
        made().to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    elif form == "json":
        folder.mkdir()
        lines = []
        for number, row in enumerate(ROWS):
            (folder / f"{number}.png").write_bytes(row["image"]["bytes"])
            lines.append(json.dumps({**row, "image": f"{number}.png"}))
        (folder / "test.jsonl").write_text("\n".join(lines))
    else:
        datasets.DatasetDict({"test": made()}).save_to_disk(folder)
    found = open_questions(folder)
    assert [(one.id, one.text, one.answers, one.group) for one in found] == [
        (str(row["id"]), row["question"], ("yes",), "colour") for row in ROWS
    ]
    assert [one.pictures()[0].getpixel((0, 0)) for one in found] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert found[0].unit == found[2].unit != found[1].unit, "the same pixels are the same picture"
    assert found.scorers == ["normalised"]
    assert found.notes[0].startswith("columns read: id as id, question as question, answer as answer, category as group")


def test_splits(tmp_path):
    datasets.DatasetDict({"test": made(), "train": made()}).save_to_disk(tmp_path)
    with pytest.raises(UsageError, match=r"has the splits test, train: name one of them \(--split\)"):
        open_questions(tmp_path)
    with pytest.raises(UsageError, match="unknown split 'tset': did you mean 'test'"):
        open_questions(tmp_path, split="tset")
    assert len(open_questions(tmp_path, split="train")) == 3


def test_columns(tmp_path):
    made().rename_columns({"question": "ask", "category": "kind"}).save_to_disk(tmp_path)
    with pytest.raises(UsageError) as refusal:
        open_questions(tmp_path)
    assert "no column for the question with a usual name; its columns are image, ask, answer, kind, id" in str(refusal.value)
    assert "--column question=…" in str(refusal.value)
    with pytest.raises(UsageError, match="unknown column 'askk': did you mean 'ask'"):
        open_questions(tmp_path, columns={"question": "askk"})
    found = open_questions(tmp_path, columns={"question": "ask", "group": "kind"})
    assert (found[1].text, found[1].group) == ("blue ?", "colour")


FORMS = {
    "ten people": ({"answers": [{"answer": "4", "answer_id": n} for n in range(10)]}, ("4",) * 10),
    "a list": ({"answer": ["4", "four"]}, ("4", "four")),
    "a number": ({"answer": 4}, ("4",)),
    "a truth": ({"answer": True}, ("yes",)),
    "the number of a choice": ({"choices": ["three", "four"], "answer": 1}, ("four",)),
    "choices in a text": ({"options": "['three', 'four']", "answer": "B"}, ("B",)),
    "a column for each choice": ({"A": "three", "B": "four", "C": None, "answer": "B"}, ("B",)),
}


@pytest.mark.parametrize(("columns", "answers"), FORMS.values(), ids=FORMS)
def test_forms_of_answers(tmp_path, columns, answers):
    datasets.Dataset.from_list([{"question": "2 + 2 ?", **columns}] * 2).save_to_disk(tmp_path)
    (one, _) = open_questions(tmp_path)
    assert one.answers == answers
    if len(columns) > 1:
        assert one.choices == ("three", "four")
        assert one.text == "2 + 2 ?\nA. three\nB. four\nAnswer with the option's letter."
        assert one.scorer == "choice"


def test_classes(tmp_path):
    rows = [{"question": "which ?", "label": 1}]
    made(rows, question=datasets.Value("string"), label=datasets.ClassLabel(names=["cat", "dog"])).save_to_disk(tmp_path)
    assert open_questions(tmp_path)[0].answers == ("dog",)


def test_several_pictures(tmp_path):
    picture = {"bytes": png(), "path": None}
    rows = [{"question": "?", "answer": "x", "image_2": picture, "image_10": picture, "image_1": None, "image_3": picture}]
    each = {name: datasets.Image() for name in ("image_1", "image_2", "image_3", "image_10")}
    made(rows, question=datasets.Value("string"), answer=datasets.Value("string"), **each).save_to_disk(tmp_path / "columns")
    (one,) = open_questions(tmp_path / "columns")
    assert len(one.pictures()) == 3
    rows = [{"question": "?", "answer": "x", "images": [picture, picture]}]
    texts = dict.fromkeys(("question", "answer"), datasets.Value("string"))
    made(rows, **texts, images=datasets.List(datasets.Image())).save_to_disk(tmp_path / "list")
    (one,) = open_questions(tmp_path / "list")
    assert len(one.pictures()) == 2


def test_a_broken_picture_spoils_its_own_row_only(tmp_path):
    rows = [dict(row) for row in ROWS]
    rows[1]["image"] = {"bytes": b"nothing", "path": None}  # one that is cut off is read once lmms_eval is imported
    datasets.Dataset.from_list(rows, features=datasets.Features(FEATURES)).save_to_disk(tmp_path)
    with pytest.raises(UsageError, match="question 1: picture 1 of row 1 is not a picture that can be read"):
        open_questions(tmp_path)
    found = open_questions(tmp_path, skip_bad=True)
    assert found.skipped == ("1",)
    assert len(found) == 2


def test_rows_without_names_of_their_own(tmp_path):
    rows = [{**row, "id": 5} for row in ROWS]
    datasets.Dataset.from_list(rows, features=datasets.Features(FEATURES)).save_to_disk(tmp_path)
    found = open_questions(tmp_path)
    assert [one.id for one in found] == ["0", "1", "2"]
    assert "the column id names several rows alike, so that rows are named by their numbers" in found.notes


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"question": "", "answer": "x"}, "row 0 needs a text as its question: found ''"),
        ({"question": "?", "answer": None}, "row 0 has no right answer: found None"),
        ({"question": "?", "answer": "C", "choices": ["a", "b"]}, "the answer 'C' is none of its choices a, b"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_asked(tmp_path, row, sentence):
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path)
    with pytest.raises(UsageError) as refusal:
        open_questions(tmp_path)
    assert sentence in str(refusal.value)


def test_a_dataset_that_is_broken(tmp_path):
    made().save_to_disk(tmp_path)
    for file in tmp_path.glob("*.arrow"):
        file.write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"the dataset in .* cannot be read \(.*\): save or fetch it again"):
        open_questions(tmp_path)


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    from vlmprune.tiny.scenes import held_out

    rows = [
        {"picture": scene.image, "ask": asked.text, "reply": asked.answer} for scene in held_out(2) for asked in scene.questions
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    command = ("eval", "--data", tmp_path / "data", "--recipe", "divprune:fraction=0.5", "--json")
    assert vlmprune(monkeypatch, *command) == 2
    assert "no column for the question" in capsys.readouterr().err
    assert vlmprune(monkeypatch, *command, "--column", "question=ask", "--column", "answer=reply") == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["questions"] == len(rows)
    assert numbers["pictures"] == 2
