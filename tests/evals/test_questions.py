"""One kind of question from every source: read as written, checked early, fingerprinted by all that is asked."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vlmprune.errors import UsageError
from vlmprune.evals.question import Question, QuestionSet
from vlmprune.evals.questions import open_questions
from vlmprune.tiny.answers import LONGEST_ANSWER
from vlmprune.tiny.scenes import held_out


@pytest.fixture
def folder(tmp_path):
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder, *lines):
    (folder / "questions.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return folder


# -- scenes ------------------------------------------------------------------------------------------------------------------


def test_scenes_are_the_embedded_models():
    found = open_questions("scenes", 3)
    scenes = list(held_out(3))
    assert [question.text for question in found] == [asked.text for scene in scenes for asked in scene.questions]
    assert [question.answers for question in found] == [(asked.answer,) for scene in scenes for asked in scene.questions]
    assert [question.group for question in found] == [asked.skill for scene in scenes for asked in scene.questions]
    assert len({question.unit for question in found}) == 3
    assert found[0].images[0] == scenes[0].image
    assert found.scorers == ["exact"]
    assert found.max_new_tokens == LONGEST_ANSWER
    assert len({question.id for question in found}) == len(found)


def test_other_seeds_and_splits_are_other_scenes():
    prints = {open_questions("scenes", 2, split=split, seed=seed).fingerprint for split in ("dev", "test") for seed in (0, 1)}
    assert len(prints) == 4
    assert [one.text for one in open_questions("scenes", 4)][-3:] == [one.text for one in open_questions("scenes", 2, seed=1)][
        -3:
    ]


# -- a folder ----------------------------------------------------------------------------------------------------------------


def test_everything_that_a_line_can_say(folder):
    write(
        folder,
        {"image": "0.png", "question": "red ?", "answer": "yes"},
        {"images": ["0.png", "1.png"], "question": "which is red ?", "answer": "A", "choices": ["first", "second"]},
        {"question": "what is 2 + 2 ?", "answers": ["4", "four"], "scorer": "exact", "group": "sums", "unit": "u", "id": "sum"},
        {"image": "1.png", "question": "blue or red ?", "answer": "blue", "choices": ["blue", "red"]},
    )
    plain, several, text_only, named = open_questions(folder)
    assert plain == Question("1 0.png", (folder / "0.png",), "red ?", ("yes",), unit="0.png", scorer="normalised")
    assert several.images == (folder / "0.png", folder / "1.png")
    assert several.text == "which is red ?\nA. first\nB. second\nAnswer with the option's letter."
    assert (several.answers, several.choices, several.scorer) == (("A",), ("first", "second"), "choice")
    assert several.unit == "0.png, 1.png"
    assert text_only == Question("sum", (), "what is 2 + 2 ?", ("4", "four"), group="sums", unit="u", scorer="exact")
    assert named.text == "blue or red ?", "the choices stand in the question already"
    assert [picture.getpixel((0, 0)) for picture in several.pictures()] == [(255, 0, 0), (0, 0, 255)]
    assert open_questions(folder, scorer="anls").scorers == ["anls", "exact"]


def test_the_first_questions_and_their_number(folder):
    write(folder, *[{"image": "0.png", "question": f"{number} ?", "answer": "x"} for number in range(3)])
    assert [question.text for question in open_questions(folder, 2)] == ["0 ?", "1 ?"]
    assert open_questions(folder, 9).notes == ("there are 3 questions, fewer than the 9 asked for",)


def test_keys_that_are_not_read_are_named(folder):
    write(folder, {"image": "0.png", "question": "x", "answer": "y", "choises": ["y", "z"], "source": 3})
    assert open_questions(folder).notes == ("questions.jsonl has keys that are not read: choises, source",)


LINE = {"image": "0.png", "question": "red ?", "answer": "yes"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({**LINE, "answers": ["no"]}, "line 1 has both 'answer' and 'answers': give one of them"),
        ({**LINE, "images": ["1.png"]}, "line 1 has both 'image' and 'images'"),
        ({"question": "?", "answers": "yes"}, "line 1 needs a list of texts as 'answers': found 'yes'"),
        ({"question": "?", "answers": []}, "line 1 needs a list of texts as 'answers': found []"),
        ({"question": "?", "answers": [4]}, "line 1 needs a list of texts as 'answers': found [4]"),
        ({**LINE, "choices": "yes, no"}, "line 1 needs a list of texts as 'choices'"),
        ({**LINE, "scorer": "exakt"}, "line 1: unknown scorer 'exakt': did you mean 'exact'"),
        ({**LINE, "scorer": "vqa"}, "question 1 0.png has 1 answers, and the scorer vqa needs more than 3"),
        ({**LINE, "choices": ["left", "right"]}, "the answer 'yes' is none of its choices left, right"),
        ({**LINE, "group": 4}, "line 1 needs a text as 'group': found 4"),
        ({"question": "?"}, "line 1 needs a text as 'answer': found only question"),
        ({**LINE, "image": "."}, "line 1: "),
    ],
    ids=str,
)
def test_bad_lines(folder, line, sentence):
    write(folder, line)
    with pytest.raises(UsageError) as refusal:
        open_questions(folder)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_byte_order_mark_and_separators_inside_a_text(folder):
    line = json.dumps({**LINE, "question": "red\u2028or blue\x85?"}, ensure_ascii=False)
    (folder / "questions.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n".encode())
    assert [question.text for question in open_questions(folder)] == ["red\u2028or blue\x85?"]


def test_two_questions_with_one_id(folder):
    write(folder, {**LINE, "id": "a"}, {**LINE, "id": "a"})
    with pytest.raises(UsageError, match="two questions have the id 'a'"):
        open_questions(folder)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            "no/where",
            "there is no folder no/where: give one that holds questions.jsonl and the pictures; a dataset of the hub must",
        ),
        ("./no", "there is no folder ./no: give one that holds questions.jsonl and the pictures."),
    ],
)
def test_there_is_no_folder(spec, sentence):
    with pytest.raises(UsageError) as refusal:
        open_questions(spec)
    assert sentence in str(refusal.value)


def test_an_unknown_scorer_or_split_is_refused_first(folder):
    with pytest.raises(UsageError, match="unknown scorer 'exakt': did you mean 'exact'"):
        open_questions(folder, scorer="exakt")
    with pytest.raises(UsageError, match="unknown split 'tset': did you mean 'test'"):
        open_questions("scenes", 2, split="tset")


def test_a_dataset_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setattr("vlmprune.loading.outputs.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"a Hugging Face dataset needs datasets: install it with `pip install datasets`"):
        open_questions(tmp_path)


def test_a_task_without_lmms_eval(monkeypatch):
    monkeypatch.setattr("vlmprune.evals.question_tasks.find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"there is no folder pope: .*; if it is a task of lmms-eval, install that package first"
    ):
        open_questions("pope")


# -- broken pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(folder):
    """Five questions; two pictures of three cannot be read, and three questions need one of them."""
    (folder / "bad.png").write_bytes((folder / "0.png").read_bytes()[:40])
    lines = [{"image": name, "question": "?", "answer": "x"} for name in ("0.png", "bad.png", "gone.png", "bad.png")]
    return write(folder, *lines, {"question": "?", "answer": "x"})


def test_broken_pictures_are_counted_and_named(spoiled):
    with pytest.raises(UsageError) as refusal:
        open_questions(spoiled)
    said = str(refusal.value)
    assert said.startswith("2 of 3 pictures cannot be read, which 3 of 5 questions need: ")
    assert "bad.png" in said
    assert f"there is no picture at {spoiled / 'gone.png'}" in said
    assert said.endswith("repair them, or leave these questions out with --skip-bad.")


def test_broken_pictures_are_left_out_on_request_only(spoiled):
    found = open_questions(spoiled, skip_bad=True)
    assert [question.id for question in found] == ["1 0.png", "5"]
    assert found.skipped == ("2 bad.png", "3 gone.png", "4 bad.png")
    (note,) = found.notes
    assert note.startswith("3 of 5 questions were left out; pictures that cannot be read: 2, ")
    assert "bad.png" in note
    assert "gone.png" in note


def test_no_question_is_left(folder):
    write(folder, {"image": "gone.png", "question": "?", "answer": "x"})
    with pytest.raises(UsageError, match="no question is left: of 1 pictures none can be read; the first: there is no picture"):
        open_questions(folder, skip_bad=True)


# -- fingerprint -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"question": "blue ?"},
        {"answer": "no"},
        {"image": "1.png"},
        {"scorer": "exact"},
        {"group": "colour"},
        {"choices": ["yes", "no"]},
    ],
    ids=str,
)
def test_the_fingerprint_covers_everything_that_is_asked(folder, change):
    first = open_questions(write(folder, LINE)).fingerprint
    assert open_questions(write(folder, LINE)).fingerprint == first
    assert open_questions(write(folder, {**LINE, **change})).fingerprint != first


def test_the_fingerprint_is_of_pixels_not_of_files(folder):
    first = open_questions(write(folder, LINE)).fingerprint
    Image.open(folder / "0.png").save(folder / "0.png", compress_level=1)
    assert open_questions(folder).fingerprint == first
    with Image.open(folder / "0.png") as picture:
        picture.putpixel((3, 3), (254, 0, 0))
        picture.save(folder / "0.png")
    assert open_questions(folder).fingerprint != first


def test_questions_about_the_same_picture_belong_together(folder):
    same = Image.open(folder / "0.png").convert("RGB")
    from vlmprune.evals.questions import read_pictures

    asked = [Question(str(n), images, "?", ("x",)) for n, images in enumerate([(same,), (same.copy(),), (), ()])]
    kept, _, notes, _ = read_pictures(asked)
    assert kept[0].unit == kept[1].unit
    assert [question.unit for question in kept[2:]] == ["2", "3"]
    assert notes == []
    assert QuestionSet("x", tuple(kept), "").scorers == ["exact"]
