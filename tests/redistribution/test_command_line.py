"""`vlmprune sinks`, `view --sinks`, `run` and reports with redistribution."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from tiny_models import make_inputs, shared
from typer.testing import CliRunner

import vlmprune as vp
from vlmprune import tiny
from vlmprune.cli import app
from vlmprune.evals import sink_view
from vlmprune.loading.models import load_decoder
from vlmprune.tiny.scenes import make_scene

VAR = "var:sink_dims=5|40,tau=2,keep=0.2,max_sink_share=0.6,min_image_mass=0.1"
runner = CliRunner()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    make_scene(1).image.save(path)
    return path


def test_sinks_of_the_embedded_model():
    """It has none, and is told so."""
    result = runner.invoke(app, ["sinks", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["dims"] == []
    assert "No sink dimensions" in found["advice"]
    assert "No sink dimensions" in runner.invoke(app, ["sinks"]).output


def test_sinks_of_nothing():
    with pytest.raises(vp.UsageError, match="no model at"):
        load_decoder("/nowhere", None, "cpu")


def test_view(picture, tmp_path):
    target = tmp_path / "figure.png"
    arguments = ["view", "--image", str(picture), "--prompt", "how many circles are there?", "--out", str(target)]
    result = runner.invoke(app, [*arguments, "--sinks", "--recipe", "random:fraction=0.5 + var:sink_dims=cosine"])
    assert result.exit_code == 0, result.output
    assert Image.open(target).size[0] > 1000
    assert "needs var in the recipe" in str(runner.invoke(app, [*arguments, "--sinks", "--recipe", "pai"]).exception)


def test_view_shows_what_var_moves():
    """Red: before and after are swapped, or count other tokens than the picture's."""
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text5", "image", "text4"]])
    view = sink_view.look(model, inputs, VAR + ",layers=0:")
    assert view.layers == tuple(range(6))
    assert view.sinks.shape == (6, 16)
    assert (view.after >= view.before - 1e-6).all(), "attention goes to the picture, never from it"
    assert (view.after > view.before + 1e-3).any()
    sdpa = model(**inputs).logits  # and nothing is left behind
    assert torch.equal(sdpa, model(**inputs).logits)


def test_run_with_redistribution_only(picture):
    result = runner.invoke(
        app,
        [
            *("run", "--model", "tiny", "--image", str(picture), "--prompt", "is there a circle?", "--json"),
            *("--recipe", "zerotuning:gain=2", "--max-new-tokens", "2"),
        ],
    )
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["pruned"]["visual_tokens"] == answer["unpruned"]["visual_tokens"] == len(answer["kept"])


def test_run_says_what_was_edited(picture):
    """Red: `vlmprune run` answers under a redistribution method and does not say what it did."""
    ask = ["run", "--model", "tiny", "--image", str(picture), "--prompt", "is there a circle?", "--max-new-tokens", "1"]
    dims = "sink_dims=11|29|111,sink_energy=0.05,max_sink_share=1"
    printed = " ".join(runner.invoke(app, [*ask, "--recipe", f"var:{dims}"]).output.split())
    assert "redistributed (var) layers 2–6," in printed
    assert "of heads and rows edited" in printed
    assert "redistributed (vhr) layers 1, 4–7, 50.0% of heads scaled" in " ".join(
        runner.invoke(app, [*ask, "--recipe", "vhr"]).output.split()
    )
    answer = json.loads(runner.invoke(app, [*ask, "--json", "--recipe", f"var:{dims}"]).stdout)
    (edit,) = answer["edits"]
    assert edit["method"] == "var"
    assert edit["edited"] > 0
    assert "tokens marked, by group" in edit["summary"]
    assert json.loads(runner.invoke(app, [*ask, "--json", "--recipe", "random:fraction=0.5"]).stdout)["edits"] == []


def test_the_figure_names_the_layers(picture, tmp_path, monkeypatch):
    """Red: behind pruning, the axis of the sink map counts from zero."""
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda _: None)
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text5", "image", "text4"]])
    found = sink_view.look(model, inputs, f"random:layer=1,tokens=5 + {VAR}")
    sink_view.draw(found, Image.open(picture), None, "what?", tmp_path / "figure.png")
    figure = pyplot.gcf()
    for axis in figure.axes[1:4]:
        if axis.get_ylabel() == "layer":
            assert [label.get_text() for label in axis.get_yticklabels()] == ["2", "3", "4"]
    assert figure.axes[1].get_ylabel() == "layer"
    assert "not the plain model" in figure.get_supxlabel()
    pyplot.close("all")


def test_report():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text5", "image", "text4"], ["text2", "image", "text7"]])
    with vp.wrap(model, f"random:layer=2,tokens=8 + {VAR}") as run, torch.no_grad():
        model(**inputs)
        report = run.report()
    (edit,) = report.edits
    assert edit.method == "var"
    assert edit.layers == (2, 3, 4)
    assert edit.marked[0] + edit.marked[1] == pytest.approx(8)
    assert 0 < edit.edited < 1
    assert 0 < edit.moved < edit.edited
    assert "redistributed (var)" in str(report)
    assert "of heads and rows edited" in str(report)


def test_the_embedded_model_answers_under_every_method():
    model, processor = tiny.load()
    scene = make_scene(1)
    inputs = processor(images=scene.image, text=tiny.prompt(scene.questions[0].text), return_tensors="pt")
    for recipe in (
        "var:sink_dims=cosine",
        "pai",
        "paint",
        "vhr",
        "act",
        "zerotuning:gain=2",
        "flowcut:tokens=64 + var:sink_dims=cosine",
    ):
        with vp.wrap(model, recipe):
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert ids.shape[1] > inputs["input_ids"].shape[1], recipe
