"""The command line: tables for people, JSON for programs, one sentence and exit code 2 for mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from command_line import vlmprune
from PIL import Image

import vlmprune as vp
from vlmprune import names
from vlmprune.cli import app
from vlmprune.cli.details import describe
from vlmprune.methods.parameters import ALLOWED, Range


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
        (("run", "--recipe", "fastvv"), "unknown method 'fastvv': did you mean 'fastv' or 'fastvid'?"),
        (("run", "--recipe", "fastv:layer=99"), "fastv prunes at layer 99, but the model has layers 0 to 7"),
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
        *((("run", "--device", name), f"the device '{name}' holds shapes and no numbers") for name in ("meta", "meta:0")),
        (("sinks", "--device", "meta"), "holds shapes and no numbers"),
        (("bench", "--device", "meta"), "holds shapes and no numbers"),
        (("bench", "--device", "zzz"), "cannot use device 'zzz'"),
        (("rnu",), "unknown command 'rnu': did you mean 'run'?"),
        (("fastv", "--help"), "fastv is a method, not a command: `vlmprune methods fastv` describes it"),
        (("run", "--recipee", "x"), "No such option: --recipee"),
        (("run", "--max-new-tokens", "many"), "Invalid value for '--max-new-tokens'"),
        (("run", "--max-new-tokens", "0"), "Invalid value for '--max-new-tokens'"),
        (("tune", "--method"), "Option '--method' requires an argument; `vlmprune tune -h` lists all options"),
        (("run", "extra"), "unexpected extra argument"),
        (("view",), "Missing option '--prompt'"),
        (("view", "--prompt", "x"), "nothing is shown: give --image with a picture, or --video"),
        (("tune",), "tune needs an accuracy budget, for example --max-drop 1.0, or one method"),
        (("tune", "--method", "adaptinfr"), "unknown method 'adaptinfr': did you mean 'adaptinfer'?"),
        (("tune", "--method", "fastv"), "the methods that can be tuned are: adaptinfer; found 'fastv'"),
        (("sweep", "--method", "divprun"), "unknown method 'divprun': did you mean 'divprune'"),
        (("bench", "--recipe", "zzz"), "unknown method 'zzz'"),
        (("bench", "--shape", "llava-1.5-7"), "unknown shape 'llava-1.5-7': did you mean 'llava-1.5-7b'"),
        (
            ("view", "--image", "{whole}", "--prompt", "x", "--recipe", "vra"),
            "did you mean 'vhr' or 'var'",
        ),
        (("view", "--image", "{whole}", "--prompt", "x", "--recipe", "fastv"), "the view of sinks needs var in the recipe"),
        (("view", "--image", "{whole}", "--prompt", " "), "the prompt is empty"),
        (("methods", "zerotunin"), "unknown method 'zerotunin': did you mean 'zerotuning'?"),
        (("run", "--draw", "{folder}"), "cannot draw to"),
        (("--nothing",), "No such option: --nothing"),
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
        "whole": tmp_path / "whole.png",
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


# -- the first second ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "printed"),
    [
        (("--version",), 0, f"vlmprune {vp.__version__}"),
        (("-h",), 0, "Usage: vlmprune [OPTIONS] COMMAND"),
        (("run", "-h"), 0, "Usage: vlmprune run"),
        ((), 0, "Usage: vlmprune"),
        (("rnu",), 2, "did you mean 'run'?"),
        (
            ("run", "--model", "tiny", "--image", "a.png", "--prompt", "x", "--recipe", "fastvv:layer=2"),
            2,
            "did you mean 'fastv' or 'fastvid'?",
        ),
        (("run", "--model", "tiny", "--image", "a.png", "--prompt", "x"), 2, "there is no picture at a.png"),
        (("methods", "divprun"), 2, "did you mean 'divprune'"),
        (("demo", "--recipe", "zzz"), 2, "unknown method 'zzz'"),
        (("eval", "--recipe", "zzz"), 2, "unknown method 'zzz'"),
        (("sweep", "--method", "zzz"), 2, "unknown method 'zzz'"),
        (("bench", "--recipe", "zzz"), 2, "unknown method 'zzz'"),
        (("tune", "--method", "zzz"), 2, "unknown method 'zzz'"),
        (("demo", "--recipe", "fastv:layr=2"), 2, "unknown parameter of fastv 'layr': did you mean 'layer'"),
        (("eval", "--recipe", "var:kep=0.5"), 2, "unknown parameter of var 'kep': did you mean 'keep'"),
        (("eval", "--recipe", "fastv:fraction=10%"), 2, "fraction must be a number, found '10%'"),
        (("eval", "--recipe", "fastv:layer"), 2, "cannot read 'layer' in 'fastv:layer'"),
        (("sweep", "--method", "var"), 2, "var redistributes attention, and `vlmprune sweep` takes pruning methods"),
        (
            ("tune", "--method", "zerotuning"),
            2,
            "zerotuning redistributes attention, and `vlmprune tune` takes pruning methods",
        ),
        (("eval", "--recipe", "my-recipe"), 2, "There is no file or folder of this name either."),
        (("demo", "--recipe", ""), 2, "the recipe is empty: name a method"),
        (("bench", "--recipe", "fastv + "), 2, "a part of the recipe 'fastv + ' is empty"),
        (("view", "--image", "a.png", "--prompt", "x", "--recipe", "zzz"), 2, "unknown method 'zzz'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_answered_without_torch(arguments, code, printed, tmp_path):
    """`python -m vlmprune`, as torchrun starts it. Red: a mistyped name is answered after torch was imported, or not by a
    sentence; there is no `-h` or `--version`."""
    program = (
        "import sys, runpy\n"
        "try: runpy.run_module('vlmprune', run_name='__main__')\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    before = os.times()
    root = os.path.dirname(os.path.dirname(vp.__file__))
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "COLUMNS": "100"},
    )
    after = os.times()
    taken = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == code, done.stderr
    assert printed in done.stdout + done.stderr
    assert done.stdout.strip().endswith("False False"), "torch or transformers was imported"
    assert taken < 5, "a second of computing"
    if code:
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("module", ["vlmprune.cli", "typer", "rich.console", "vlmprune.errors", "vlmprune.cli.asking"])
def test_interrupted_while_importing(module, tmp_path, picture):
    """Ctrl-C in the first tenth of a second, or while torch is loaded. Red: a traceback."""
    program = (
        "import sys, runpy\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *more):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "runpy.run_module('vlmprune', run_name='__main__')"
    )
    arguments = ["run", "--model", "tiny", "--image", str(picture), "--prompt", "x"]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(vp.__file__))}
    run = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_names_are_those_of_the_methods():
    """Red: a method's file is named otherwise than the method, so that the command line does not know it."""
    assert names.method_names("pruning") == sorted(vp.METHODS)
    assert names.method_names("redistribution") == sorted(vp.REDISTRIBUTORS)


@pytest.mark.parametrize("name", names.method_names())
def test_parameters_are_those_of_the_methods(name):
    """Red: what is read from a method's file is not what its class takes."""
    real = {row["parameter"] for row in describe(name)["parameters"]} - {"schedule"}
    assert set(names.parameters(name)) == real


@pytest.mark.parametrize(
    ("recipe", "file"),
    [
        ("fastv", False),
        ("fastv:layer=2", False),
        ("fastvv", False),
        ("divprune:tokens=64 + random:layer=20,fraction=0.1", False),
        ("some/repository", True),
        ("recipe.json", True),
        ("missing/recipe.json", True),
        (".", True),
    ],
)
def test_what_is_a_recipe_file(recipe, file):
    assert names.is_file(recipe) is file


def test_a_folder_named_as_a_method_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adaptinfer").mkdir()
    assert not names.is_file("adaptinfer")
    assert names.is_file("./adaptinfer")
    vp.Recipe.parse("random:fraction=0.5").save_pretrained("adaptinfer")
    with pytest.raises(vp.UsageError, match=r"is a method, and a folder with a recipe: write \./adaptinfer"):
        names.is_file("adaptinfer")
    assert not names.is_file("adaptinfer:")
    assert vp.Recipe.parse("adaptinfer:") == vp.Recipe.parse("adaptinfer")


# -- methods in detail -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names.method_names())
def test_a_method_in_detail(monkeypatch, capsys, name):
    """Red: a parameter has no type or meaning, or the example is no recipe."""
    assert vlmprune(monkeypatch, "methods", name, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (method,) = vp.Recipe.parse(found["example"]).methods
    assert method.name == name
    parameters = {row["parameter"]: row for row in found["parameters"]}
    assert {field.name for field in fields(method)} <= set(parameters)
    for row in parameters.values():
        assert row["meaning"]
        assert row["type"] in ("text", "number", "whole number", "object, in Python only")
        if row["type"] in ("number", "whole number"):
            assert row["allowed"], row
    assert vlmprune(monkeypatch, "methods", name) == 0
    printed = capsys.readouterr().out
    assert f'--recipe "{found["example"]}"' in printed
    meanings = [row["meaning"] for row in found["parameters"]]
    assert len(set(meanings)) == len(meanings), "two parameters share one meaning"
    assert not any(meaning.startswith("or ") for meaning in meanings), "'or' than what?"
    objects = [row["type"] == "object, in Python only" for row in found["parameters"]]
    assert objects == sorted(objects), "what no recipe string can hold comes last"


@pytest.fixture(scope="module")
def embedded():
    """The embedded model with one question, and its logits."""
    from vlmprune import tiny
    from vlmprune.tiny.scenes import make_scene

    model, processor = tiny.load()
    inputs = processor(images=make_scene(1).image, text=tiny.prompt("What is this?"), return_tensors="pt")
    with torch.no_grad():
        return model, inputs, model(**inputs).logits[:, -1]


@pytest.mark.parametrize("name", names.method_names())
def test_the_example_runs_as_printed(embedded, name):
    """`--model tiny` stands beside it. Red: the example prunes at layers of a larger model, wants sink dimensions that nobody
    knows, or changes nothing."""
    model, inputs, plain = embedded
    with vp.wrap(model, describe(name)["example"]) as run, torch.no_grad():
        logits = model(**inputs).logits[:, -1]
        assert name == "var" or not torch.equal(logits, plain)  # var finds no head with sinks to take from in this picture
        assert run.report().edits or len(run.last.kept[-1].index) < 144


LIMITS = [
    (name, field, limits)
    for name in names.method_names()
    for field, made in {**vp.METHODS, **vp.REDISTRIBUTORS}[name].__dataclass_fields__.items()
    if (limits := made.metadata.get(ALLOWED)) is not None
]


@pytest.mark.parametrize(("name", "field", "limits"), LIMITS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_limits_that_are_printed_hold(name, field, limits):
    """Red: `vlmprune methods` prints a range that nobody checks."""
    method = {**vp.METHODS, **vp.REDISTRIBUTORS}[name]
    row = next(row for row in describe(name)["parameters"] if row["parameter"] == field)
    outside = ["zzz", None]
    if isinstance(limits, Range):
        outside = [limits.low - 1, limits.high + 1, True, "many", *([limits.low + 0.5] if limits.whole else [])]
        assert str(limits) == row["allowed"]
    else:
        assert row["allowed"] == ", ".join(map(str, limits))
    pair = {"global_threshold": "individual_threshold", "individual_threshold": "global_threshold"}
    for value in outside:
        if value is None or value in (float("inf"), float("-inf")) or value != value:
            continue
        with pytest.raises(vp.UsageError, match=field):
            method(**{field: value}, **({pair[field]: 0.1} if field in pair else {}))


# -- view ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--sinks",), ("--recipe", "var:sink_dims=cosine,keep=0.1")], ids=" ".join)
def test_view_with_its_defaults(monkeypatch, capsys, tmp_path, picture, more):
    """Red: `view` is refused unless it is given `--sinks` and a recipe."""
    target = tmp_path / "figure.png"
    arguments = ("view", "--image", picture, "--prompt", "how many objects are there ?", "--out", target)
    assert vlmprune(monkeypatch, *arguments, *more) == 0
    assert Image.open(target).size[0] > 1000
    assert ("recipe var:sink_dims=cosine" in capsys.readouterr().out) is ("--recipe" not in more)


def test_view_takes_known_sink_dimensions():
    """Where a model's sink dimensions are known, the default is the paper's. Red: `view` draws another method's sinks."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vlmprune.evals.sink_view import default_recipe
    from vlmprune.methods.sink_dims import KNOWN

    known = next(known for known in KNOWN if known.trusted and known.shape[0] == "llama")
    _, size, layers, heads, mlp = known.shape
    config = LlamaConfig(
        hidden_size=size, num_hidden_layers=layers, num_key_value_heads=heads, intermediate_size=mlp, num_attention_heads=heads
    )
    for key, value in known.facts.items():
        setattr(config, key, value)
        config.rope_parameters = {**(config.rope_parameters or {}), key: value}
    tower = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    for hidden, recipe in ((size, "var"), (size // 2, "var:sink_dims=cosine")):  # no model of this width is known
        config.hidden_size = hidden
        with torch.device("meta"):  # the default is chosen by the config
            model = LlavaForConditionalGeneration(LlavaConfig(text_config=config, vision_config=tower))
        assert default_recipe(model) == recipe


@pytest.mark.parametrize(
    ("recipe", "label"),
    [("fastv:layer=2", "pruned"), ("zerotuning:gain=2", "redistributed"), ("zerotuning:gain=2 + fastv:layer=2", "pruned")],
)
def test_what_run_prints(monkeypatch, capsys, picture, recipe, label):
    """Red: what only redistributes is called pruned; stderr has empty lines."""
    arguments = ("run", "--model", "tiny", "--image", picture, "--prompt", "what ?", "--max-new-tokens", 2)
    assert vlmprune(monkeypatch, *arguments, "--recipe", recipe) == 0
    said = capsys.readouterr()
    assert re.search(f"┃ +{label} ┃", said.out)
    assert said.out.splitlines()[1].startswith(f"{label}  ")
    assert said.err == f"vlmprune: {label} answer: 2 tokens\nvlmprune: un-pruned answer: 2 tokens\n"


def test_no_empty_line_before_the_sentence(monkeypatch, capsys, picture):
    """Red: the progress bar leaves one where it is not drawn."""
    arguments = ("run", "--model", "tiny", "--image", picture, "--prompt", "what ?", "--recipe", "fastv:layer=99")
    assert vlmprune(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.startswith("vlmprune: ")


def test_fewer_questions_than_asked_for(monkeypatch, capsys, tmp_path, picture):
    """Red: `--images 99` takes the two there are, in silence."""
    line = json.dumps({"image": picture.name, "question": "how many circles are there ?", "answer": "1"})
    (tmp_path / "questions.jsonl").write_text(f"{line}\n{line}\n")
    arguments = ("horizon", "--data", tmp_path, "--layer", 2, "--window", 6, "--json")
    assert vlmprune(monkeypatch, *arguments, "--images", 99) == 0
    said = capsys.readouterr()
    assert "vlmprune: note: there are 2 questions, fewer than the 99 asked for\n" in said.err
    assert json.loads(said.out)["notes"] == ["there are 2 questions, fewer than the 99 asked for"]
    assert vlmprune(monkeypatch, *arguments, "--images", 2) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_eval_and_sweep_show_one_bar_only(monkeypatch, capsys):
    """Red: transformers' bar of loading weights stands above ours."""
    from transformers.utils import logging

    for arguments in (("eval", "--recipe", "fastv:layer=99"), ("sweep", "--budget", 7)):
        logging.enable_progress_bar()
        assert vlmprune(monkeypatch, *arguments) == 2
        assert "Loading weights" not in capsys.readouterr().err


def test_every_command_has_help(capsys):
    for command in app.registered_commands:
        assert (command.callback.__doc__ or "").strip()


def test_units_for_people(monkeypatch, capsys, picture):
    """Red: costs are printed in one unit whatever their size, and times that nobody asked for."""
    arguments = (
        "run",
        "--model",
        "tiny",
        "--image",
        picture,
        "--prompt",
        "how many objects are there ?",
        "--max-new-tokens",
        2,
    )
    assert vlmprune(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert "MFLOPs" in printed
    assert "MiB" in printed or "KiB" in printed
    assert " ms" not in printed


@pytest.mark.parametrize("command", ["eval", "sweep"])
def test_scipy_is_missed_before_anything_is_asked(command, monkeypatch, capsys):
    """Red: all questions were answered first, and without --out the answers were lost."""
    monkeypatch.setattr("vlmprune.loading.outputs.find_spec", lambda name: None)
    assert vlmprune(monkeypatch, command) == 2
    assert "measuring accuracy needs scipy: install it with `pip install 'vlmprune[evals]'`" in capsys.readouterr().err
