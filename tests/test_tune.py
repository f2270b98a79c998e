"""AdaptInfer's offline analysis: the sums of eager attention, the splits of brute force, and the schedule they lead to."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from oracles import columns_of_image, visual_columns
from PIL import Image
from tiny_models import LAYERS, make_single, shared

import vlmprune as vp
from vlmprune import cli, tiny
from vlmprune.cost import nominal_average
from vlmprune.evals import tune
from vlmprune.evals.calibration import Sample, Unpruned, scenes
from vlmprune.schedule import Budget

PUBLISHED = (2, 11, 21)


@pytest.mark.parametrize(
    ("family", "prompt"),
    [
        ("llava", ["text3", "image", "text5"]),
        ("qwen2_5_vl", ["text1", "image", "text4"]),
        ("qwen2_5_vl", ["image", "text2", "image", "text4"]),
        ("llava_next", ["image", "text3"]),
    ],
    ids=str,
)
def test_sums_equal_eager_attention(family, prompt):
    inputs = make_single(family, shared(family), [prompt], 0)
    eager = shared(family, "eager")
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    pictures = prompt.count("image")
    columns = [visual_columns(eager, inputs, 0, ordinal) for ordinal in range(pictures)]
    after = columns_of_image(eager, inputs, 0, pictures - 1)[-1] + 1  # behind LLaVA-NeXT's last row separator
    expected = torch.stack([layer[0, :, after:].sum(dim=(0, 1))[torch.cat(columns)] for layer in attentions[:-1]])
    found = tune.attention_sums(shared(family), Sample(inputs))
    assert found.shape == (LAYERS - 1, sum(map(len, columns)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def squared_error(curve, length):
    return sum(((part - part.mean()) ** 2).sum() for part in (curve[:length], curve[length:]))


@pytest.mark.parametrize("layers", [2, 3, 4, 5, 7, 31])
def test_change_points_equal_brute_force(layers):
    curves = np.random.default_rng(0).random((50, layers)).cumsum(1)
    shortest = 2 if layers >= 4 else 1
    lengths = range(shortest, layers - shortest + 1)
    expected = [min(lengths, key=lambda length: squared_error(curve, length)) - 1 for curve in curves]
    assert tune.change_points(curves).tolist() == expected
    if layers > 4:
        assert len(set(expected)) > 1


def test_change_points_by_hand():
    steps = np.array([[0, 0, 5, 5, 5, 5], [9, 9, 9, 9, 0, 0], [7, 0, 0, 0, 0, 0]])
    # A single first entry is no segment of the code's; ties (a straight line of odd length) go to the later split.
    assert tune.change_points(steps).tolist() == [1, 3, 1]
    assert tune.change_points(np.arange(7)[None]).tolist() == [3]


def test_only_the_strongest_tokens_count():
    """20 tokens: the two strong ones change after layer 1 and 4, the weak ones elsewhere."""
    attention = torch.zeros(8, 20)
    attention[2:5] = 0.01  # their running sums change in the middle
    attention[:, 3], attention[:, 17] = 0, 0
    attention[0, 3] = attention[2, 3] = 1.0
    attention[5, 17] = 3.0
    assert sorted(tune.top_changes(attention).tolist()) == [1, 4]


def test_peaks():
    histogram = np.zeros(31, dtype=int)
    histogram[[1, 2, 10, 11, 12, 20, 27]] = 40, 5, 20, 30, 20, 25, 3
    assert tune.peaks(histogram, 32) == (1, 11, 20)  # 12 is beside a higher one, 27 has less than its even share
    histogram[27] = 50
    assert tune.peaks(histogram, 32) == (1, 11, 27)  # at most three, the tallest
    assert tune.peaks(np.array([0, 0, 9, 9, 0, 0, 0]), 8) == (2,)  # a plateau is one peak
    assert tune.peaks(np.array([0, 4]), 3) == (1,)


def test_published_counts_come_out_of_their_budget():
    counts = tune.scaled_counts(576, 32, PUBLISHED, 128.8125)
    assert counts == pytest.approx([290, 72, 18], abs=1e-3)


@pytest.mark.parametrize("layers", [(2,), (3, 9), PUBLISHED])
@pytest.mark.parametrize("average", [80, 200, 500, 575])
def test_budget_is_met(layers, average):
    counts = tune.scaled_counts(576, 32, layers, average)
    assert nominal_average(576, 32, dict(zip(layers, counts, strict=True))) == pytest.approx(average, abs=1e-3)
    assert counts == sorted(counts, reverse=True)
    assert max(counts) <= 576


def test_impossible_budgets():
    for average in (17, 18, 576, 600):
        with pytest.raises(vp.UsageError, match=rf"an average of {average} .* between 18.0 .* and 576"):
            tune.scaled_counts(576, 32, PUBLISHED, average)


def planted(model, sample):
    """Attention of a model with 32 layers whose strongest tokens' sums change after layers 1, 10 and 20."""
    attention = torch.full((31, 576), 1e-6)
    for token, layer in enumerate([1] * 30 + [10] * 17 + [20] * 11):
        attention[layer + 1, token] = 1.0
    return attention[:, : sample.inputs["visual"]]


def test_planted_changes_give_the_published_schedule(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "attention_sums", planted)
    shares = []
    samples = [Sample({"visual": 576})] * 5
    found = tune.tune(None, samples, Budget(tokens=129), tick=shares.append)
    assert found.peaks == (1, 10, 20)
    assert found.agreement == 1
    assert sum(found.histogram) == 58 * 5
    assert sum(shares) == 5
    stages = found.recipe.methods[0].stages
    assert tuple(stage.layer for stage in stages) == PUBLISHED
    assert [stage.budget.tokens for stage in stages] == pytest.approx([290, 72, 18], abs=1)
    assert found.nominal_average == pytest.approx(129, abs=0.5)
    found.recipe.save_pretrained(tmp_path)
    assert vp.Recipe.from_pretrained(tmp_path) == found.recipe
    share = tune.tune(None, samples, Budget(fraction=129 / 576))
    assert [stage.budget.fraction for stage in share.recipe.methods[0].stages] == pytest.approx(
        [290 / 576, 72 / 576, 18 / 576], abs=1e-3
    )
    assert share.nominal_average == pytest.approx(129, abs=0.1)


def test_disagreement_shows(monkeypatch):
    """Half of the samples change elsewhere: the same peaks do not come out of every draw."""

    def attention(model, sample):
        layer = 3 if sample.name == "a" else 12
        values = torch.full((31, 20), 1e-6)
        values[layer + 1, :2] = 1.0
        return values

    monkeypatch.setattr(tune, "attention_sums", attention)
    found = tune.tune(None, [Sample({}, name="a"), Sample({}, name="b")], Budget(fraction=0.5))
    assert found.peaks == (3, 12)
    assert [found.histogram[layer] for layer in found.peaks] == [2, 2]
    assert [(found.low[layer], found.high[layer]) for layer in found.peaks] == [(0, 4), (0, 4)]
    assert 0.3 < found.agreement < 0.7  # both samples are drawn half of the time


def test_refusals(monkeypatch):
    with pytest.raises(vp.UsageError, match="the methods that can be tuned are: adaptinfer; found 'pdrop'"):
        tune.tune(None, [], Budget(tokens=5), "pdrop")
    with pytest.raises(vp.UsageError, match="no sample to tune on"):
        tune.tune(None, [], Budget(tokens=5))
    monkeypatch.setattr(tune, "run_unpruned", lambda model, sample: Unpruned(2, (16,), torch.zeros(1)))
    with pytest.raises(vp.UsageError, match="at least three decoder layers, found 2"):
        tune.attention_sums(None, Sample({}))


def vlmprune(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["vlmprune", *map(str, arguments)])
    cli.main()


def test_command(monkeypatch, capsys, tmp_path):
    command = ("tune", "--method", "adaptinfer", "--images", 4)
    with pytest.raises(SystemExit) as stop:
        vlmprune(monkeypatch, *command, "--tokens", 72, "--out", tmp_path / "out")
    assert not stop.value.code
    assert "Attention moves on after layer" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert numbers["nominal_average"] == pytest.approx(72, abs=0.5)
    assert len(numbers["histogram"]) == 7
    assert sum(numbers["histogram"]) == 4 * 14
    assert "change points" in (tmp_path / "out" / "tune.md").read_text()
    assert Image.open(tmp_path / "out" / "tune.png").width > 500
    recipe = vp.Recipe.from_pretrained(tmp_path / "out")
    assert str(recipe) == numbers["recipe"]
    vp.wrap(tiny.load()[0], recipe).remove()

    scene = scenes(1)[0]
    scene.images[0].save(tmp_path / "scene.png")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"image": "scene.png", "question": scene.text}))  # no answer needed
    with pytest.raises(SystemExit) as stop:
        vlmprune(monkeypatch, "tune", "--method", "adaptinfer", "--data", tmp_path, "--fraction", 0.5, "--json")
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out)["nominal_average"] == pytest.approx(72, abs=0.1)
