"""The command line: tables for people, JSON for programs, one sentence and exit code 2 for mistakes."""

from __future__ import annotations

import json

import pytest
from command_line import vlmprune
from PIL import Image

import vlmprune as vp


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (120, 100), "grey").save(path)
    return path


def test_demo(monkeypatch, capsys, tmp_path):
    assert vlmprune(monkeypatch, "demo", "--images", 1, "--out", tmp_path / "out", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["answers"]) == 3
    assert result["pruned"]["visual_tokens"] < result["unpruned"]["visual_tokens"] == 144
    assert result["pruned"]["mflops"] < result["unpruned"]["mflops"]
    assert result["pruned"]["kv_kib"] < result["unpruned"]["kv_kib"]
    with Image.open(result["picture"]) as drawn:
        assert drawn.width > 900
    assert vlmprune(monkeypatch, "demo", "--images", 1, "--out", tmp_path / "out", "--recipe", "random:layer=1,tokens=0") == 0
    assert "Right: un-pruned" in capsys.readouterr().out


def test_run(monkeypatch, capsys, tmp_path, picture):
    drawn = tmp_path / "new" / "drawn.png"
    arguments = ("run", "--model", "tiny", "--image", picture, "--prompt", "how many objects are there ?")
    assert vlmprune(monkeypatch, *arguments, "--recipe", "divprune:tokens=9", "--draw", drawn, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["kept"]) == 9
    assert Image.open(drawn).size == (384, 384)
    vp.Recipe.parse("cls:tokens=5").save_pretrained(tmp_path)
    assert vlmprune(monkeypatch, *arguments, "--recipe", tmp_path, "--draw", drawn) == 0
    out = capsys.readouterr().out
    assert "un-pruned" in out
    assert "prefill" in out


def test_run_on_a_saved_model(monkeypatch, capsys, picture):
    from vlmprune.tiny import CHECKPOINT

    prompt = "USER: <image>\nis there a red star ? ASSISTANT:"  # the whole prompt, placeholder included
    assert vlmprune(monkeypatch, "run", "--model", CHECKPOINT, "--image", picture, "--prompt", prompt, "--json") == 0
    assert json.loads(capsys.readouterr().out)["pruned"]["visual_tokens"] == 14


def test_eval(monkeypatch, capsys, tmp_path):
    recipes = ("--recipe", "random:fraction=0.25", "--recipe", "random:fraction=0.05", "--recipe", "zerotuning:gain=2")
    assert vlmprune(monkeypatch, "eval", "--images", 3, *recipes, "--out", tmp_path) == 0
    assert "random:fraction=0.25" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "accuracy.json").read_text())
    assert [row["recipe"] for row in numbers["rows"]] == ["un-pruned", *recipes[1::2]]
    assert numbers["rows"][0]["loyalty"] == 1
    assert numbers["rows"][0]["lost"] == 0
    table = (tmp_path / "accuracy.md").read_text()
    assert table.count("\n| ") == 4
    assert Image.open(tmp_path / "accuracy.png").width > 500
    assert vlmprune(monkeypatch, "eval", "--images", 2, *recipes[:2], "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2


def test_methods_and_env(monkeypatch, capsys):
    assert vlmprune(monkeypatch, "methods", "--json") == 0
    assert {row["method"] for row in json.loads(capsys.readouterr().out)} == {*vp.METHODS, *vp.REDISTRIBUTORS}
    assert vlmprune(monkeypatch, "methods") == 0
    assert "divprune" in capsys.readouterr().out
    assert vlmprune(monkeypatch, "env", "--json") == 0
    assert json.loads(capsys.readouterr().out)["transformers"]
    assert vlmprune(monkeypatch, "env") == 0
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("run", "--image", "nowhere.png"), "there is no picture at nowhere.png"),
        (("run", "--image", "{text}"), "is not a picture that can be read"),
        (("run", "--recipe", "fastvv"), "unknown method 'fastvv': did you mean 'fastv'?"),
        (("run", "--recipe", "fastv:layer=99"), "fastv cuts at layer 99, but the model has layers 0 to 7"),
        (("run", "--image", "{cut}"), "is not a picture that can be read"),
        (("run", "--model", "{tmp}"), "no model at"),
        (("run", "--model", "{folder}"), "no model at"),
        (("run", "--prompt", "<image> <image> hi"), "image tokens do not match the picture: 2 <image> for one picture"),
        (("run", "--prompt", " "), "the prompt is empty"),
        (("run", "--draw", "kept.foo"), "cannot draw to kept.foo"),
        (("run", "--recipe", "nowhere.json"), "no recipe at 'nowhere.json'"),
        (("demo", "--out", "{text}"), "cannot write to"),
        (("eval", "--out", "{text}"), "cannot write to"),
        (("run", "--model", "{llama}"), "unknown model family"),
        (("demo", "--recipe", "divprune:tokens=-4"), "tokens must be a whole number >= 0, found -4"),
        (("demo", "--recipe", "divprune:fraction=4"), "fraction must lie in [0, 1], found 4"),
        (("eval", "--recipe", "zzz"), "unknown method 'zzz'"),
        (("eval", "--split", "zzz"), "unknown split 'zzz'"),
        (("run", "--device", "zzz"), "cannot use device 'zzz'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes(monkeypatch, capsys, tmp_path, picture, arguments, sentence):
    (tmp_path / "text.png").write_text("this is no picture")
    Image.effect_noise((64, 64), 80).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
    (tmp_path / "llama").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    places = {
        "cut": tmp_path / "cut.png",
        "folder": tmp_path,
        "text": tmp_path / "text.png",
        "tmp": tmp_path / "empty",
        "llama": tmp_path / "llama",
    }
    arguments = [argument.format(**places) for argument in arguments]
    if arguments[0] == "run":
        for option, value in (("--model", "tiny"), ("--image", picture), ("--prompt", "is there a red star ?")):
            arguments += [] if option in arguments else [option, value]
    assert vlmprune(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1
