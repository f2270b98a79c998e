"""`eval`, `horizon` and `tune` on a model and questions of one's own, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import vlmprune
from folders import llava, llava_next, qwen2_5_vl
from PIL import Image

import vlmprune as vp
from vlmprune.evals import accuracy
from vlmprune.evals.asking import Asking
from vlmprune.evals.stats import estimate
from vlmprune.tiny.scenes import held_out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models with random weights, as a user has them."""
    made = {"llava": llava, "llava_next": llava_next, "qwen2_5_vl": qwen2_5_vl}
    return {name: make(tmp_path_factory.mktemp(name) / "model", layers=4) for name, make in made.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions about four pictures, and one about none; two of the pictures have several."""
    folder = tmp_path_factory.mktemp("data")
    lines = [{"question": "is red a colour ?", "answers": ["yes", "no"], "group": "text"}]
    for number, scene in enumerate(held_out(4)):
        scene.image.save(folder / f"{number}.png")
        for asked in scene.questions[: 1 + 2 * (number < 2)]:
            lines.append({"image": f"{number}.png", "question": asked.text, "answer": asked.answer, "group": asked.skill})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def pictured(data, tmp_path_factory):
    """Those about a picture."""
    folder = tmp_path_factory.mktemp("pictured")
    for picture in data.glob("*.png"):
        (folder / picture.name).write_bytes(picture.read_bytes())
    lines = [line for line in (data / "questions.jsonl").read_text().splitlines() if '"image"' in line]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


# -- eval --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_eval_on_another_model(models, data, monkeypatch, capsys, tmp_path, family):
    out = tmp_path / "out"
    recipes = ("random:layer=0,fraction=1", "divprune:layer=1,fraction=0.5")
    command = ("eval", "--model", models[family], "--data", data, "--max-new-tokens", 3, "--out", out)
    assert vlmprune(monkeypatch, *command, *(word for recipe in recipes for word in ("--recipe", recipe))) == 0
    shown = capsys.readouterr().out
    numbers = json.loads((out / "accuracy.json").read_text())
    assert (numbers["questions"], numbers["pictures"], numbers["scorers"]) == (9, 5, ["normalised"])
    assert (numbers["model"], numbers["data"], numbers["batch"]) == (str(models[family]), str(data), 8)
    plain, whole, half = numbers["rows"]
    assert [row["recipe"] for row in numbers["rows"]] == ["un-pruned", *recipes]
    assert plain["share"] == whole["share"] == whole["loyalty"] == 1
    assert half["share"] == pytest.approx(0.625, abs=0.02)  # one of four layers has all tokens
    assert plain["kept"] > half["kept"] > 0.3 * plain["kept"]
    assert set(plain["by_skill"]) >= {"text", "existence"}
    text = (out / "accuracy.md").read_text()
    for written in (shown.replace("\n", " "), text):
        assert "Scored by normalised: 9 questions about 5 pictures. Questions per group: text 1" in written
    assert "No difference from un-pruned could be seen" in text
    assert f"score in %, {data.name}: 9 questions, 5 pictures, by normalised" in shown.replace("\n", " ")
    assert Image.open(out / "accuracy.png").width > 500
    assert accuracy.result(numbers).markdown() == text.strip()


def test_right_answers_of_the_embedded_model_through_a_folder(data, monkeypatch, capsys):
    """The embedded model on a user's copy of scenes answers as on the scenes themselves."""
    assert vlmprune(monkeypatch, "eval", "--data", data, "--recipe", "random:layer=0,tokens=1", "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    plain, pruned = numbers["rows"]
    assert plain["overall"] >= 8 / 9  # all but the one about no picture
    assert plain["overall"] > pruned["overall"]
    assert plain["mean"] == pytest.approx(np.mean([entry["value"] for entry in plain["by_skill"].values()]))
    assert pruned["lost"] == pytest.approx(plain["mean"] - pruned["mean"])


def test_a_table_is_made_from_the_answers(data, monkeypatch, capsys, tmp_path):
    """Red: a row's numbers are another recipe's, or groups and pictures are mixed up."""
    command = ("eval", "--data", data, "--recipe", "divprune:fraction=0.1", "--recipe", "fastv:layer=2,fraction=0.5")
    assert vlmprune(monkeypatch, *command, "--out", tmp_path) == 0
    rows = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    asked, *answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == len(rows) == 3
    for row, given in zip(rows, answers, strict=True):
        whole = estimate(given["scores"], asked["units"], asked["groups"])
        assert (row["mean"], *row["interval"]) == (whole.value, whole.low, whole.high)
        same = [one == other for one, other in zip(given["given"], answers[0]["given"], strict=True)]
        assert row["loyalty"] == np.mean(same)
        assert row["kept"] == np.mean(given["kept"])


def test_an_interrupted_evaluation_goes_on(data, monkeypatch, capsys, tmp_path):
    asked, ask = [], Asking.measure_batch

    def counting(self, model, number, run=None):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(number)
        return ask(self, model, number, run)

    command = ("eval", "--data", data, "--recipe", "divprune:fraction=0.5", "--batch", 4, "--out", tmp_path)
    monkeypatch.setattr(Asking, "measure_batch", counting)
    assert vlmprune(monkeypatch, *command) == 130
    monkeypatch.setattr(Asking, "measure_batch", lambda *more: asked.append(more[2]) or ask(*more))
    assert vlmprune(monkeypatch, *command) == 0
    assert len(asked) == 2 * 3, "nothing is asked twice"
    assert vlmprune(monkeypatch, *command) == 0
    assert len(asked) == 6
    capsys.readouterr()
    assert vlmprune(monkeypatch, *command[:-1], tmp_path, "--max-new-tokens", 2) == 2
    assert "holds answers of other settings: max_new_tokens 32 there, 2 here" in capsys.readouterr().err


def test_a_recipe_from_a_folder(monkeypatch, capsys, tmp_path):
    """Red: after all answers the figure failed, because it read the folder's name as a recipe. The result names the recipe."""
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": "is red a colour ?", "answer": "yes"}))
    recipe = vp.Recipe.of("divprune:fraction=0.5")
    recipe.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "out"
    assert vlmprune(monkeypatch, "eval", "--data", tmp_path, "--recipe", tmp_path / "tuned", "--out", out) == 0
    assert f"the recipe in {tmp_path / 'tuned'} is {recipe}" in capsys.readouterr().err.replace("\n", " ")
    numbers = json.loads((out / "accuracy.json").read_text())
    assert [row["recipe"] for row in numbers["rows"]] == ["un-pruned", str(recipe)]
    assert str(numbers["rows"][1]["lost"]) == "0.0", "not −0.0"
    named = {**numbers, "rows": [{**row, "recipe": "no recipe"} for row in numbers["rows"]]}
    accuracy.result(named).write(tmp_path / "named")


def test_groups_that_are_too_many_for_columns(monkeypatch, capsys, tmp_path):
    lines = [{"question": "is red a colour ?", "answer": "yes", "group": f"kind {number}"} for number in range(12)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert (
        vlmprune(monkeypatch, "eval", "--data", tmp_path, "--recipe", "divprune:fraction=0.5", "--out", tmp_path / "out") == 0
    )
    text = (tmp_path / "out" / "accuracy.md").read_text()
    assert "| recipe | all questions | mean |" in text
    assert "| group | un-pruned | divprune:fraction=0.5 |" in text
    assert "| kind 11 |" in text


def test_one_group_has_no_mean_over_groups(monkeypatch, capsys, tmp_path):
    lines = [{"question": "is red a colour ?", "answer": "yes"}] * 2
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert (
        vlmprune(monkeypatch, "eval", "--data", tmp_path, "--recipe", "divprune:fraction=0.5", "--out", tmp_path / "out") == 0
    )
    assert "| recipe | score | lost against un-pruned |" in (tmp_path / "out" / "accuracy.md").read_text()


# -- horizon and tune --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_horizon_and_tune_on_another_model(models, pictured, monkeypatch, capsys, family):
    own = ("--model", models[family], "--data", pictured, "--images", 3, "--json")
    assert vlmprune(monkeypatch, "horizon", *own, "--window", 6, "--layer", 1, "--layer", 3) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["depth"], len(numbers["samples"]), numbers["data"]) == (4, 3, str(pictured))
    assert vlmprune(monkeypatch, "tune", "--method", "adaptinfer", *own, "--fraction", 0.6) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 3


def test_two_pictures_in_one_question(models, pictured, monkeypatch, capsys):
    line = {"images": ["0.png", "1.png"], "question": "what is the number ?", "answer": "1"}
    (pictured / "two").mkdir()
    for name in ("0.png", "1.png"):
        (pictured / "two" / name).write_bytes((pictured / name).read_bytes())
    (pictured / "two" / "questions.jsonl").write_text(json.dumps(line))
    own = ("--model", models["llava"], "--data", pictured / "two", "--json")
    assert vlmprune(monkeypatch, "horizon", *own, "--window", 6, "--layer", 1) == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    assert sample["visual"] == 2 * 144


# -- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("eval",), ("horizon",), ("tune", "--method", "adaptinfer")], ids=" ".join)
def test_what_all_commands_refuse(models, pictured, command, monkeypatch, capsys):
    """Before the weights are read."""
    monkeypatch.setattr("vlmprune.loading.models.load_weights", lambda *arguments: pytest.fail("weights were read"))
    model = ("--model", models["llava"])
    for arguments, sentence in (
        (model, "the built-in scenes are for the embedded model: give --data with questions for yours."),
        ((*model, "--data", "no/where"), "there is no folder no/where"),
        ((*model, "--data", models["llava"]), "holds no questions.jsonl"),
        ((*model, "--data", pictured, "--column", "question"), "cannot read --column 'question': write meaning=name"),
        (
            (*model, "--data", pictured, "--column", "questoin=x"),
            "unknown meaning of a column 'questoin': did you mean 'question'?",
        ),
        (("--split", "tset"), "unknown split 'tset': did you mean 'test'?"),
        ((*model, "--data", pictured, "--device-map", "atuo"), "unknown device map 'atuo': did you mean 'auto'?"),
    ):
        assert vlmprune(monkeypatch, *command, *arguments) == 2, arguments
        said = capsys.readouterr().err
        assert sentence in said
        assert len(said.strip().splitlines()) == 1


def test_mistyped_names_are_answered_before_torch_is_imported():
    import subprocess
    import sys

    for arguments, sentence in (
        (("--scorer", "exakt"), "unknown scorer 'exakt': did you mean 'exact'?"),
        (("--split", "tset"), "unknown split 'tset': did you mean 'test'?"),
        (("--model", "x"), "give --data with questions for yours."),
        (("--recipe", "divprun"), "unknown method 'divprun': did you mean 'divprune'"),
    ):
        code = "import sys; sys.modules['torch'] = None; from vlmprune import cli; cli.main()"
        done = subprocess.run([sys.executable, "-c", code, "eval", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert sentence in done.stderr


@pytest.mark.parametrize(
    ("family", "recipe", "sentence"),
    [
        ("llava", "fastv:layer=30,fraction=0.5", "fastv prunes at layer 30, but the model has layers 0 to 3"),
        ("qwen2_5_vl", "visionzip:tokens=8", "visionzip"),
        ("llava", "var", "sink dimensions of this text model"),
    ],
)
def test_a_recipe_for_another_model(models, data, family, recipe, sentence, monkeypatch, capsys):
    monkeypatch.setattr(Asking, "measure_batch", lambda *more: pytest.fail("a question was asked"))
    assert vlmprune(monkeypatch, "eval", "--model", models[family], "--data", data, "--recipe", recipe) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.strip().splitlines()) == 1


def test_a_question_without_picture_is_nothing_for_horizon(data, monkeypatch, capsys):
    assert vlmprune(monkeypatch, "horizon", "--data", data) == 2
    assert "questions.jsonl line 1 needs a text as 'image': found only question, answers, group" in capsys.readouterr().err


def test_bad_pictures_on_the_command_line(pictured, tmp_path, monkeypatch, capsys):
    lines = (pictured / "questions.jsonl").read_text().splitlines()
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    for picture in pictured.glob("*.png"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    (tmp_path / "0.png").write_bytes(b"nothing")
    (tmp_path / "3.png").unlink()
    command = ("eval", "--data", tmp_path, "--recipe", "divprune:fraction=0.5", "--json")
    assert vlmprune(monkeypatch, *command) == 2
    assert "2 of 4 pictures cannot be read, which 4 of 8 questions need: " in capsys.readouterr().err
    assert vlmprune(monkeypatch, *command, "--skip-bad") == 0
    captured = capsys.readouterr()
    numbers = json.loads(captured.out)
    assert numbers["questions"] == 4
    assert len(numbers["skipped"]) == 4
    assert "vlmprune: note: 4 of 8 questions were left out; pictures that cannot be read: 2, " in captured.err


def test_a_process_of_several_needs_a_folder(data, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert vlmprune(monkeypatch, "eval", "--data", data) == 2
    assert "give --out FOLDER: the processes share their answers in it." in capsys.readouterr().err


def test_two_processes_write_what_one_writes(data, monkeypatch, capsys, tmp_path):
    command = ("eval", "--data", data, "--recipe", "divprune:fraction=0.5", "--batch", 3, "--out")
    assert vlmprune(monkeypatch, *command, tmp_path / "one") == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert vlmprune(monkeypatch, *command, tmp_path / "two") == 0
        assert (tmp_path / "two" / "accuracy.json").exists() == (rank == 0)
    one, two = ((tmp_path / name / "answers.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
