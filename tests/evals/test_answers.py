"""Answers are asked once, merged in the plan's order, and are enough to compute every table again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import vlmprune

import vlmprune as vp
from vlmprune import tiny
from vlmprune.evals import answering, answers, asking
from vlmprune.evals.answering import answer, settings_of
from vlmprune.evals.answers import UNPRUNED, Answered, Answers, Asked
from vlmprune.evals.asking import Asking
from vlmprune.evals.questions import open_questions
from vlmprune.evals.store import Store
from vlmprune.evals.sweep import everything, table
from vlmprune.evals.sweep_old import ROWS
from vlmprune.evals.sweep_plan import Plan, Point, make_plan

pytestmark = pytest.mark.xdist_group("answers")


@pytest.fixture(scope="module")
def embedded():
    return tiny.load()


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, int]]:
    """The recipe and batch of everything that was really asked."""
    found, measure = [], Asking.measure_batch

    def counting(self, model, number, run=None):
        found.append((UNPRUNED if run is None else str(run.recipe), number))
        return measure(self, model, number, run)

    monkeypatch.setattr(asking.Asking, "measure_batch", counting)
    return found


# --- asking ----------------------------------------------------------------------------------------------------------


def test_an_interrupted_sweep_goes_on_and_asks_nothing_twice(embedded, asked, tmp_path):
    model, processor = embedded
    plan = make_plan(model, ["uniform"], [0.25])
    sets = [open_questions(images=2, seed=seed) for seed in range(2)]
    batches = [Asking(processor, one, 12, encode_once=True) for one in sets]
    todo = everything(plan, 2, 2)
    settings = settings_of("tiny", model, processor, sets[0], 12)

    def run(code: str = "") -> Answered:
        asked.clear()
        with Store(tmp_path, settings, code) as store:
            return answer(model, batches, todo, store)

    first = run()
    expected = [
        (name, batch)
        for seed in (0, 1)
        for name in (UNPRUNED, str(Point("random", 0.25, (0,), (0.25,)).recipe(seed)), "uniform:layer=0,fraction=0.25")
        for batch in (0, 1)
    ]
    assert asked == expected
    again = run()
    assert asked == []
    assert again.answers == first.answers
    (file,) = tmp_path.glob("answers-*.jsonl")
    file.write_text(file.read_text()[:-20])  # interrupted while writing the last row
    assert {pair: row.given for pair, row in run().answers.items()} == {pair: row.given for pair, row in first.answers.items()}
    assert asked == expected[-1:]
    run("edited")
    assert asked == expected, "answers of edited code were taken up"


def test_a_recipe_of_other_code_is_another_one(embedded, asked, monkeypatch):
    """Red: a method of one's own is edited, and its old answers are taken up."""
    model, processor = embedded
    batches = [Asking(processor, open_questions(images=1), 20)]
    with Store(None, {}) as store:
        for version in ("first", "first", "second"):
            monkeypatch.setattr(answering, "recipe_fingerprint", lambda recipe, version=version: version)
            answer(model, batches, [(0, vp.Recipe.parse("uniform:fraction=0.5")), (0, None)], store)
    assert len(asked) == 4


# --- the merged file -------------------------------------------------------------------------------------------------


def made_up() -> Answered:
    sets = [Asked(["a", "b"], ["?", "?"], [["yes"], ["no"]], ["x", "y"], ["one", "two"]) for _ in range(2)]
    rows = [
        Answers(UNPRUNED, 0, ["yes", "no"], [1, 1], 1.0, [4, 4], 9.0),
        Answers(UNPRUNED, 1, ["yes", "no"], [1, 1], 1.0, [4, 4], 9.0),
        Answers("r", 0, ["yes", "yes"], [1, 0], 0.5, [2, 2], 3.0),
        Answers("r", 1, ["no", "yes"], [0, 0], 0.3, [2, 2], 5.0),
        Answers("r2", 0, ["no", "no"], [0, 1], 0.4, [2, 2], 1.0),
    ]
    return Answered(sets, rows)


def test_the_file_holds_everything_but_times(tmp_path):
    made_up().write(tmp_path)
    found = answers.read(tmp_path)
    assert found.asked == made_up().asked
    assert {pair: row.given for pair, row in found.answers.items()} == {
        pair: row.given for pair, row in made_up().answers.items()
    }
    assert "seconds" not in (tmp_path / answers.FILE).read_text()
    assert found.answers["r", 1].seconds == 0


def test_scenes_of_several_seeds_are_joined_and_draws_about_the_same_questions_are_averaged():
    joined = made_up().scored([("r", 0), ("r", 1)])
    assert joined.score.tolist() == [1, 0, 0, 0]
    assert joined.unit.tolist() == [0, 1, 2, 3]
    assert joined.loyal.tolist() == [1, 0, 0, 0]
    assert (joined.share, joined.seconds) == (0.4, 4.0)
    averaged = made_up().scored([("r", 0), ("r2", 0)])
    assert averaged.score.tolist() == [0.5, 0.5]
    assert averaged.loyal.tolist() == [0.5, 0.5]
    assert averaged.group == ["x", "y"]


@pytest.mark.parametrize("text", [None, "{", '{"recipe": 3}\n'])
def test_a_file_that_cannot_be_read(tmp_path, text):
    if text is not None:
        (tmp_path / answers.FILE).write_text(text)
    with pytest.raises(vp.UsageError, match=r"there is no answers\.jsonl in|answers\.jsonl cannot be read"):
        answers.read(tmp_path)


# --- the command -----------------------------------------------------------------------------------------------------

SWEEP = ("sweep", "--method", "cls", "--budget", 0.25, "--images", 2)


def numbers(folder: Path) -> dict:
    return json.loads((folder / "sweep.json").read_text())


def test_tables_are_computed_again_from_stored_answers(monkeypatch, capsys, tmp_path, asked):
    """Also from `rows.jsonl` of earlier versions; nothing is asked, and everything is as it was."""
    assert vlmprune(monkeypatch, *SWEEP, "--seeds", 2, "--out", tmp_path) == 0
    first, said = numbers(tmp_path), (tmp_path / "sweep.md").read_text()
    asked.clear()
    (tmp_path / "sweep.md").unlink()
    assert vlmprune(monkeypatch, "sweep", "--recompute", "--out", tmp_path) == 0
    assert (numbers(tmp_path), (tmp_path / "sweep.md").read_text()) == (first, said)

    rows = [
        {"recipe": row.recipe, "code": "x", "seed": row.asked, "split": "test", "images": 2, "given": row.given}
        | {"share": row.share, "seconds": 1.0}
        for row in answers.read(tmp_path).answers.values()
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    other_scenes = json.dumps({**rows[0], "images": 3}) + "\n"
    (tmp_path / answers.FILE).unlink()
    (tmp_path / ROWS).write_text(other_scenes + text + text[:30])
    assert vlmprune(monkeypatch, "sweep", "--recompute", "--out", tmp_path) == 0
    assert numbers(tmp_path) == first
    assert asked == []
    capsys.readouterr()
    (tmp_path / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert vlmprune(monkeypatch, "sweep", "--recompute", "--out", tmp_path) == 2
    assert f"{tmp_path} lacks the answers of 1 of 6 recipes, the first is {rows[-1]['recipe']}" in capsys.readouterr().err


def test_other_settings_in_the_folder_are_refused(monkeypatch, capsys, tmp_path):
    assert vlmprune(monkeypatch, *SWEEP, "--seeds", 1, "--out", tmp_path) == 0
    capsys.readouterr()
    assert vlmprune(monkeypatch, *SWEEP[:-1], 3, "--seeds", 1, "--out", tmp_path) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'sweep-answers'} holds answers of other settings: images 2 there, 3 here; questions '" in said
    assert vlmprune(monkeypatch, *SWEEP, "--seeds", 2, "--method", "divprune", "--out", tmp_path) == 0, "more is not other"


def test_a_full_disk_ends_a_sweep_with_one_sentence(monkeypatch, capsys, tmp_path, asked):
    """Red: a traceback; or the parts that were on disk are asked again."""
    import os

    write, left = os.fsync, [4]  # the settings, and three parts

    def fsync(file):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        write(file)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        assert vlmprune(full, *SWEEP, "--batch", 8, "--seeds", 1, "--out", tmp_path) == 2
    said = capsys.readouterr().err
    assert "(No space left on device): the 3 finished parts are kept; free space on that disk" in said
    assert said.count("\n") == 1
    before = asked[:3]
    asked.clear()
    assert vlmprune(monkeypatch, *SWEEP, "--batch", 8, "--seeds", 1, "--out", tmp_path) == 0
    assert not set(asked) & set(before)


def test_own_questions(monkeypatch, capsys, tmp_path, asked):
    """Every seed asks the same questions: a method without a seed once, and a question counts once."""
    folder = tmp_path / "questions"
    folder.mkdir()
    lines = []
    for number, question in enumerate(open_questions(images=2)):
        if number in (0, 2, 11, 13):
            question.images[0].save(folder / f"{number}.png")
            lines.append({"image": f"{number}.png", "question": question.text, "answer": question.answers[0]})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("sweep", "--method", "cls", "--budget", 0.25, "--seeds", 2, "--model", "tiny", "--data", folder)
    assert vlmprune(monkeypatch, *arguments, "--out", tmp_path / "out", "--batch", 2) == 0
    seeds = [str(Point("random", 0.25, (0,), (0.25,)).recipe(seed)) for seed in (0, 1)]
    names = [UNPRUNED, seeds[0], "cls:layer=0,fraction=0.25", seeds[1]]
    assert asked == [(name, batch) for name in names for batch in (0, 1)]
    found = numbers(tmp_path / "out")
    assert found["unpruned"]["by_skill"]["all"]["n"] == 4
    assert found["data"] == str(folder)
    assert "4 questions of" in " ".join(capsys.readouterr().out.split())
    capsys.readouterr()
    assert vlmprune(monkeypatch, "sweep", "--model", folder) == 2
    assert "the built-in scenes are for the embedded model: give --data" in capsys.readouterr().err


def test_a_table_needs_no_order(embedded):
    """The unit of a question is its picture, whatever its name: numbers are given in the order of the questions."""
    units = made_up().scored([("r", 1)]).unit
    assert units.dtype.kind == "i"
    found = table(Plan(), 2, made_up()).unpruned
    assert (found.mean, found.by_skill["x"].n) == (1.0, 2)
    assert np.isclose(found.loyalty, 1)
