"""`vlmprune run --why TOKEN`: what every stage decided about a visual token, by which numbers."""

from __future__ import annotations

import json

import pytest
from command_line import vlmprune
from folders import FOLDERS
from PIL import Image

ASK = ("--prompt", "what ?", "--max-new-tokens", 1)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_noise((120, 100), 60).convert("RGB").save(path)
    return path


def run(monkeypatch, capsys, picture, *more, model="tiny"):
    code = vlmprune(monkeypatch, "run", "--model", model, "--image", picture, *ASK, *more)
    return code, capsys.readouterr()


def test_the_same_as_in_python(monkeypatch, capsys, picture):
    """Red: another token is explained than the one that was named, or with another verdict than the kept tokens show."""
    tokens = (0, 57, 143)
    wanted = [word for token in tokens for word in ("--why", token)]
    code, said = run(monkeypatch, capsys, picture, "--recipe", "fastv:layer=2,tokens=72", *wanted, "--json")
    assert code == 0
    found = json.loads(said.out)
    assert [why["token"] for why in found["why"]] == list(tokens)
    assert [why["kept"] for why in found["why"]] == [token in found["kept"] for token in tokens]
    (verdict,) = found["why"][1]["verdicts"]
    assert (verdict["rank"] <= 72) is found["why"][1]["kept"]
    assert (verdict["score"] >= verdict["last_kept_score"]) is found["why"][1]["kept"]


def test_it_is_printed(monkeypatch, capsys, picture):
    code, said = run(monkeypatch, capsys, picture, "--recipe", "fastv:layer=2,tokens=5", "--why", 57)
    assert code == 0
    printed = " ".join(said.out.split())
    assert "Token 57 of 144" in printed
    assert "rank" in printed
    assert "score" in printed


def test_nothing_is_explained_unless_asked(monkeypatch, capsys, picture):
    """Red: every `run` computes and keeps scores."""
    from vlmprune.cli import asking

    wrap = asking.wrap
    asked = []
    monkeypatch.setattr(asking, "wrap", lambda *methods, **more: asked.append(more) or wrap(*methods, **more))
    code, said = run(monkeypatch, capsys, picture, "--json")
    assert code == 0
    assert "why" not in json.loads(said.out)
    assert asked == [{"explain": False}] * 2


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--why", 144), "there is no token 144: the picture has 144, numbered 0 to 143."),
        (("--why", "last"), "Invalid value for '--why'"),
        (("--why", -1), "Invalid value for '--why'"),
        (("--recipe", "zerotuning:gain=2", "--why", 5), "drops no visual tokens, so that there is nothing to explain"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_refused_before_the_first_answer(monkeypatch, capsys, picture, more, sentence):
    """Red: a token that does not exist is found out after minutes of answering."""
    monkeypatch.setattr("vlmprune.cli.asking.ask", lambda *arguments: pytest.fail("asked"))
    code, said = run(monkeypatch, capsys, picture, *more)
    assert code == 2
    assert sentence in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_tokens_of_crops(monkeypatch, capsys, picture, tmp_path):
    """The last token of a picture with crops has a number below what the crops hold together: padding has none."""
    folder = FOLDERS["llava_next"](tmp_path / "model")
    code, said = run(monkeypatch, capsys, picture, "--recipe", "random:tokens=30", "--json", model=folder)
    assert code == 0
    tokens = sum(crop["tokens"] for crop in json.loads(said.out)["views"])
    code, said = run(monkeypatch, capsys, picture, "--recipe", "random:tokens=30", "--why", tokens - 1, "--json", model=folder)
    assert code == 0
    assert json.loads(said.out)["why"][0]["tokens"] == tokens
    monkeypatch.setattr("vlmprune.cli.asking.ask", lambda *arguments: pytest.fail("asked"))
    code, said = run(monkeypatch, capsys, picture, "--recipe", "random:tokens=30", "--why", tokens, model=folder)
    assert code == 2
    assert f"numbered 0 to {tokens - 1}" in said.err
