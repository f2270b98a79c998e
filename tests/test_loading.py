"""What a user names is loaded, or the true reason is said in one sentence, within seconds and before weights are read."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import sys
import threading
import time
from importlib.util import find_spec

import pytest
import torch
from command_line import vlmprune
from folders import FOLDERS
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import vlmprune as vp
from vlmprune.cli import app, asking
from vlmprune.loading import models as loading
from vlmprune.loading import outputs, questions
from vlmprune.loading.frames import FramesProcessor
from vlmprune.loading.models import load_decoder, load_model
from vlmprune.loading.prompts import make_inputs, prompt_text
from vlmprune.loading.questions import ReadyQuestion
from vlmprune.recipe import hub as the_hub
from vlmprune.tiny.scenes import held_out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One folder per family."""
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in FOLDERS.items()}


@pytest.fixture
def folder(made, tmp_path):
    """A LLaVA folder to break."""
    return shutil.copytree(made["llava"], tmp_path / "llava")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "wide.png"
    Image.effect_noise((120, 70), 60).convert("RGB").save(path)
    return path


# -- what is loaded --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FOLDERS)
def test_run_on_every_family(made, picture, tmp_path, family):
    """Red: LLaVA-NeXT is refused after all its work; Qwen's processor wants torchvision."""
    target = tmp_path / "kept.png"
    arguments = ["run", "--model", str(made[family]), "--image", str(picture), "--prompt", "what is this ?", "--json"]
    more = ["--recipe", "divprune:fraction=0.5", "--max-new-tokens", "3", "--draw", str(target)]
    result = CliRunner().invoke(app, [*arguments, *more])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert sum(len(view["kept"]) for view in answer["views"]) == len(answer["kept"]) == answer["pruned"]["visual_tokens"]
    assert sum(view["tokens"] for view in answer["views"]) == answer["unpruned"]["visual_tokens"]
    assert Image.open(target).size[0] == (384 if family != "llava_next" else 2 * 384 + 12)
    assert "un-pruned answer: 3 tokens" in result.stderr


def test_two_generations_and_no_more(made, picture, monkeypatch):
    """Red: `run` generates fourteen times for its medians."""
    model, processor = load_model(str(made["llava"]), "cpu")
    calls = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **more: calls.append(more["max_new_tokens"]) or generate(**more))
    monkeypatch.setattr(questions, "open_model", lambda *where, **more: (processor, lambda: model))
    asking.ask_once("x", picture, "what ?", "divprune:fraction=0.5", 5, "cpu", None)
    assert calls == [5, 5]


def test_a_recipe_that_cannot_run_is_refused_before_the_first_answer(made, picture, monkeypatch):
    """Red: the un-pruned model works first, for minutes."""
    model, processor = load_model(str(made["llava"]), "cpu")
    monkeypatch.setattr(model, "generate", lambda **more: pytest.fail("generated"))
    monkeypatch.setattr(questions, "open_model", lambda *where, **more: (processor, lambda: model))
    with pytest.raises(vp.UsageError, match="fastv prunes at layer 30"):
        asking.ask_once("x", picture, "what ?", "fastv:layer=30,fraction=0.5", 5, "cpu", None)


def test_cells_of_packed_pictures(made):
    """Base view and crops count the tokens of the model; padding has none. Oracle: what is packed, by marked features."""
    from vlmprune.adapters.registry import family_of

    model, processor = load_model(str(made["llava_next"]), "cpu")
    family = family_of(model.config)
    for size in ((96, 96), (120, 70), (70, 120), (200, 50), (47, 96), (96, 60)):
        inputs = make_inputs(processor, Image.new("RGB", size, "grey"), prompt_text(processor, "what ?"), "cpu")
        (rows,) = family.cells(inputs, model.config)
        views = [view for row in rows for view in row]
        marked = torch.arange(len(views) * 36).view(len(views), 36, 1).float()  # a number for every patch of every view
        newline = torch.tensor([-1.0])
        packed, _ = model.model.pack_image_features([marked], inputs["image_sizes"], "default", newline)
        tokens = [int(value) for value in packed[0].flatten() if value >= 0]
        for number, view in enumerate(views):
            for cell, token in enumerate(view.flatten().tolist()):
                place = number * 36 + cell
                assert (token == -1) == (place not in tokens)
                assert token == -1 or tokens[token] == place
        assert len(tokens) == sum(int((view >= 0).sum()) for view in views)


def test_kept_cells_are_drawn_where_they_are(made):
    """A kept token of a crop is framed in that crop; its padding never is."""
    model, processor = load_model(str(made["llava_next"]), "cpu")
    picture = Image.effect_noise((120, 70), 60).convert("RGB")
    inputs = make_inputs(processor, picture, prompt_text(processor, "what ?"), "cpu")
    question = ReadyQuestion(model, processor, inputs, picture)
    kept = asking.ask(question, vp.Recipe.of("random:tokens=30"), 1)
    names = [crop.name for crop in kept.crops]
    assert names == ["whole picture", "crop 1, 1", "crop 1, 2", "crop 2, 1", "crop 2, 2"]
    seen = question.seen()
    assert len(seen) == 5
    assert seen[0].size == (48, 48)
    first_row_of_padding = {cell for cell in kept.crops[1].kept if cell < 6}
    assert not first_row_of_padding, "the upper crops begin with padding"
    assert asking.draw_kept(question, kept.crops).width == 2 * 384 + 12


def test_images_of_qwen_need_no_torchvision(made, monkeypatch):
    """The processor, with our part for videos, makes what the parts make."""
    processor = load_model(str(made["qwen2_5_vl"]), "cpu")[1]
    picture = Image.effect_noise((120, 70), 60).convert("RGB")
    inputs = make_inputs(processor, picture, prompt_text(processor, "what ?"), "cpu")
    alone = processor.image_processor(images=[picture], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], alone["pixel_values"])
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == int(alone["image_grid_thw"].prod()) // 4
    if find_spec("torchvision") is None:
        assert type(processor.video_processor) is FramesProcessor
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"


@pytest.mark.parametrize("form", ["fast", "nested", "with a file for videos"])
def test_other_ways_in_which_processors_are_saved(made, tmp_path, form):
    """Red: an image processor that was saved as `…Fast`, or with a part for videos, is refused without torchvision."""
    folder = shutil.copytree(made["qwen2_5_vl"], tmp_path / "qwen")
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    if form == "fast":
        path.write_text(json.dumps({**settings, "image_processor_type": "Qwen2VLImageProcessorFast"}))
    elif form == "nested":
        path.unlink()
        nested = {"image_processor": settings, "video_processor": videos, "processor_class": "Qwen2_5_VLProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(nested))
    else:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    assert load_model(str(folder), "cpu")[1].image_processor.merge_size == 2


# -- what is missing or broken ---------------------------------------------------------------------------------------------


def replaced(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def without(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def weights_cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def fewer_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {key: value for key, value in tensors.items() if "q_proj" not in key}, folder / "model.safetensors", {"format": "pt"}
    )


def sharded(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def an_adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def gguf_only(folder):
    (folder / "config.json").unlink()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")


def one_too_deep(folder):
    (folder / "checkpoint-100").mkdir()
    (folder / "config.json").rename(folder / "checkpoint-100" / "config.json")


def old_processor(folder):
    replaced("processor_config.json", patch_size=None)(folder)


BROKEN = {
    "no processor": (
        without("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
        "lacks preprocessor_config.json and",
    ),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "no whole processor: it lacks tokenizer.json"),
    "no image processor": (without("processor_config.json"), "no whole processor: it lacks preprocessor_config.json"),
    "no weights": (without("model.safetensors"), "has a config but no weights: looked for model.safetensors"),
    "no config": (without("config.json"), "the folder has no config.json"),
    "one folder too high": (one_too_deep, "but its folder checkpoint-100/ has one: give that"),
    "an adapter": (an_adapter, "it holds a PEFT adapter, not a model"),
    "GGUF": (gguf_only, "it holds GGUF files only"),
    "config is no JSON": (written("config.json", b'{"model_type": '), "config.json is broken (Expecting value"),
    "config is another thing": (written("config.json", b"{}"), "names no model_type"),
    "unknown architecture": (replaced("config.json", model_type="zzz"), "unknown model family"),
    "remote code": (
        replaced("config.json", model_type="zzz", auto_map={"AutoConfig": "code.Config"}),
        "unknown model family",
    ),
    "a known one that is not supported": (
        replaced("config.json", model_type="blip-2"),
        "the model family 'blip-2' is not supported: learned queries stand for a picture",
    ),
    "processor is no JSON": (written("processor_config.json", b"{,}"), "processor_config.json is broken"),
    "tokenizer is no JSON": (written("tokenizer.json", b"[1, 2"), "tokenizer.json is broken"),
    "tokenizer is an empty object": (written("tokenizer.json", b"{}"), "tokenizer.json is broken (it holds no model"),
    "tokenizer is a list": (
        written("tokenizer.json", b"[]"),
        "tokenizer.json is broken (a JSON object is wanted, found a list)",
    ),
    "tokenizer is a pointer": (
        written("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n"),
        "tokenizer.json is broken (a pointer of Git LFS)",
    ),
    "tokenizer's settings are a list": (written("tokenizer_config.json", b"[]"), "tokenizer_config.json is broken (a JSON"),
    "special tokens are no JSON": (written("special_tokens_map.json", b"{"), "special_tokens_map.json is broken"),
    "added tokens are a number": (written("added_tokens.json", b"7"), "added_tokens.json is broken (a JSON object"),
    "processor is an empty object": (written("processor_config.json", b"{}"), "processor_config.json is broken (it is an"),
    "processor is a list": (written("processor_config.json", b"[]"), "processor_config.json is broken (a JSON object"),
    "template is no text": (written("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja is broken ('utf-8' codec"),
    "generation config is a list": (written("generation_config.json", b"[]"), "generation_config.json is broken (a JSON"),
    "config is a list": (written("config.json", b"[]"), "config.json is broken (a JSON object is wanted, found a list)"),
    "weights are cut off": (weights_cut, "model.safetensors is broken or cut off"),
    "weights are text": (written("model.safetensors", b"<html>" * 10), "model.safetensors is broken or cut off"),
    "weights are a pointer": (
        written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "is a pointer of Git LFS",
    ),
    "weights are empty": (written("model.safetensors", b""), "model.safetensors is empty"),
    "a shard is missing": (sharded, "lacks 1 of 2 files with weights (such as model-00002-of-00002.safetensors)"),
    "the index is broken": (written("model.safetensors.index.json", b"{"), None),
    "generation config is no JSON": (written("generation_config.json", b"{'a'"), "generation_config.json is broken"),
    "another model's processor": (
        replaced("config.json", image_token_id=5),
        "do not belong together: <image> is token",
    ),
    "an old processor": (old_processor, "has no patch_size"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_true_reasons(folder, case, monkeypatch):
    """Red: everything is "no model at"; or found after the weights were loaded; or a traceback."""
    change, sentence = BROKEN[case]
    change(folder)
    if sentence is None:  # the whole file is there, and an index beside it does not matter
        assert load_model(str(folder), "cpu")
        return
    monkeypatch.setattr(loading, "load_weights", lambda *arguments: pytest.fail("weights were read"))
    start = time.process_time()
    with pytest.raises(vp.UsageError) as error:
        load_model(str(folder), "cpu")
    assert time.process_time() - start < 5
    assert sentence in str(error.value)
    assert folder.name in str(error.value) or "model family" in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_all_there(folder):
    """Red: what is missing in the file is random in silence, and the model babbles."""
    fewer_weights(folder)
    with pytest.raises(vp.UsageError, match=r"lack \d+ of the model's tensors \(such as .*q_proj.*they would be random"):
        load_model(str(folder), "cpu")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_weights_that_the_config_has_no_place_for(folder, part):
    """Red: the model answers from half of its layers."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config[part]["num_hidden_layers"] -= 2
    path.write_text(json.dumps(config))
    with pytest.raises(vp.UsageError, match=r"hold \d+ tensors that its config.json has no place for \(such as .*layers\."):
        load_model(str(folder), "cpu")


def test_weights_that_every_version_ignores(folder):
    """Buffers that older versions saved are no mistake."""
    tensors = load_file(folder / "model.safetensors")
    query = next(key for key in tensors if key.endswith("layers.0.self_attn.q_proj.weight") and "vision" not in key)
    tensors[query.replace("q_proj.weight", "rotary_emb.inv_freq")] = torch.ones(8)
    places = next(key for key in tensors if key.endswith("position_embedding.weight"))
    tensors[places.replace("position_embedding.weight", "position_ids")] = torch.ones(1, 145)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert load_model(str(folder), "cpu")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"no weights at all", "pytorch_model.bin is broken or cut off"),
        (b"PK\x03\x04 cut", "pytorch_model.bin is broken or cut off"),
        (b"\x80\x02K\x01.", "cannot be loaded (Invalid magic number; corrupt file?): fetch or save it again"),
    ],
    ids=["text", "zip", "pickle"],
)
def test_weights_in_the_old_format(folder, content, sentence):
    """Red: a broken `pytorch_model.bin` ends in a traceback."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(vp.UsageError) as error:
        load_model(str(folder), "cpu")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_token_of_prompts_that_stands_for_others(made):
    """Gemma 3: prompts have the token that begins a picture, and the processor puts the model's placeholders behind it."""
    from types import SimpleNamespace

    from vlmprune.loading.processor import _check_fits

    model, processor = load_model(str(made["llava"]), "cpu")
    source = SimpleNamespace(name="x")
    processor.image_token = "?"
    _check_fits(source, processor, model.config)
    processor.tokenizer.image_token = None
    with pytest.raises(vp.UsageError, match=r"do not belong together: \? is token"):
        _check_fits(source, processor, model.config)


def test_weights_in_the_old_format_that_are_whole(folder):
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model, _ = load_model(str(folder), "cpu")
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_the_prompt_is_refused_before_the_weights_are_read(made, picture, monkeypatch):
    """Red: a prompt with two image tokens is refused after gigabytes were read; in `run`, `view` and calibration."""
    monkeypatch.setattr(loading, "load_weights", lambda *arguments: pytest.fail("weights were read"))
    for command in ("run", "view"):
        arguments = [command, "--model", str(made["llava"]), "--image", str(picture), "--prompt", "<image> <image> ?"]
        assert "2 <image> for one picture" in str(CliRunner().invoke(app, arguments).exception)
    lines = {"image": picture.name, "question": "what ?", "answer": "zebra"}
    (picture.parent / "questions.jsonl").write_text(json.dumps(lines))
    arguments = ["horizon", "--model", str(made["llava"]), "--data", str(picture.parent)]
    assert "no token for the answer 'zebra'" in str(CliRunner().invoke(app, arguments).exception)


def test_weights_of_another_shape(folder):
    change = json.loads((folder / "config.json").read_text())
    change["text_config"]["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps(change))
    with pytest.raises(
        vp.UsageError, match=r"\d+ tensors have another shape \(such as .*: \[96, 64\]|\[64, 96\], by the config"
    ):
        load_model(str(folder), "cpu")


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(vp.UsageError, match="it is a file, give the folder that holds it"):
        load_model(str(folder / "config.json"), "cpu")
    (folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(vp.UsageError, match="it is a GGUF file"):
        load_model(str(folder / "model.gguf"), "cpu")


def test_a_template_without_pictures(made):
    """Red: the picture is left out of the prompt, and the count of tokens is blamed."""
    processor = load_model(str(made["llava"]), "cpu")[1]
    processor.chat_template = "{% for m in messages %}{{ m['content'][1]['text'] }}{% endfor %}"
    with pytest.raises(vp.UsageError, match="places 0 pictures instead of one: put <image> into the prompt"):
        prompt_text(processor, "what ?")
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(vp.UsageError, match=r"fails on a picture \(roles must alternate\): put <image>"):
        prompt_text(processor, "what ?")


def test_a_picture_that_a_processor_cannot_take(made, tmp_path):
    Image.new("RGB", (4000, 4)).save(tmp_path / "line.png")
    arguments = ["run", "--model", str(made["qwen2_5_vl"]), "--image", str(tmp_path / "line.png"), "--prompt", "what ?"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, vp.UsageError)
    assert "cannot take this picture of 4000 × 4 pixels and prompt: absolute aspect ratio" in str(result.exception)


def test_torchvision_that_does_not_fit(monkeypatch, tmp_path, made):
    """Red: "operator torchvision::nms does not exist", from within transformers."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(vp.UsageError, match=r"does not fit this torch \(operator torchvision::nms does not exist\): uninstall"):
        load_model(str(made["llava"]), "cpu")


def test_decoders(made, folder):
    """`vlmprune sinks` says the same."""
    model, tokenize = load_decoder(str(made["llava"]), None, "cpu")
    assert model(tokenize("what is this ?")).logits.shape[0] == 1
    weights_cut(folder)
    with pytest.raises(vp.UsageError, match="is broken or cut off"):
        load_decoder(str(folder), None, "cpu")
    with pytest.raises(vp.UsageError, match=r"unknown GGUF file 'b.gguf': known: none"):
        load_decoder(str(folder), "b.gguf", "cpu")
    (folder / "model.Q4.gguf").write_bytes(b"GGUF")
    monkey = "cannot read model.Q4.gguf: the package gguf is missing"
    if find_spec("gguf") is None:
        with pytest.raises(vp.UsageError, match=monkey):
            load_decoder(str(folder), "model.Q4.gguf", "cpu")


def test_gguf_without_its_folder(monkeypatch, capsys):
    """Red: the option is ignored, and the embedded model's sinks are printed."""
    assert vlmprune(monkeypatch, "sinks", "--gguf", "x.gguf") == 2
    assert "--gguf x.gguf is a file in the folder of a model: give that folder as --model" in capsys.readouterr().err
    with pytest.raises(vp.UsageError, match="no GGUF file"):
        load_decoder("tiny", "x.gguf", "cpu")


def test_figures_without_matplotlib(monkeypatch, picture, tmp_path):
    """Red: a traceback after everything was computed."""
    monkeypatch.setattr(outputs, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    monkeypatch.setattr("vlmprune.tiny.load", lambda *more: pytest.fail("the model was loaded"))
    for command in (["eval", "--out", str(tmp_path)], ["view", "--image", str(picture), "--prompt", "what ?"]):
        result = CliRunner().invoke(app, command)
        assert "needs matplotlib: install it with `pip install matplotlib`" in str(result.exception)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("run", f"kept.{ending}") for ending in ("xbm", "msp", "palm", "wmf", "h5", "blp", "svg", "foo", "")),
        *(("view", f"sinks.{ending}") for ending in ("bmp", "xbm", "foo", "")),
        ("run", "/proc/x.png"),
        ("view", "/proc/x.png"),
        ("run", "x" * 300 + ".png"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_work(monkeypatch, picture, tmp_path, command, name):
    """Red: Pillow knows the ending but cannot write it, matplotlib cannot, or the folder is read-only: found after all work."""
    monkeypatch.setattr(questions, "open_model", lambda *where, **more: pytest.fail("the model was loaded"))
    option = "--draw" if command == "run" else "--out"
    arguments = [command, "--model", "tiny", "--image", str(picture), "--prompt", "what ?", option, str(tmp_path / name)]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, vp.UsageError)
    assert str(error).startswith(("cannot draw to", "cannot write to /proc"))
    assert not list(tmp_path.glob("kept*"))


@pytest.mark.parametrize(
    ("figure", "endings"), [(False, ("png", "jpg", "GIF", "pdf", "webp", "ppm")), (True, ("png", "svg", "pdf"))]
)
def test_what_can_be_drawn(tmp_path, figure, endings):
    for ending in endings:
        outputs.check_target(tmp_path / f"x.{ending}", "x.png", figure)
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    (tmp_path / "x.png").write_bytes(b"before")
    outputs.check_target(tmp_path / "x.png", "x.png", figure)
    assert (tmp_path / "x.png").read_bytes() == b"before"


def test_answers_are_printed_before_the_picture_is_written(monkeypatch, capsys, picture, tmp_path):
    """Red: a full disk costs the answers."""

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(asking.draw, "kept_patches", lambda *arguments: type("Full", (), {"save": full})())
    arguments = ("run", "--model", "tiny", "--image", picture, "--prompt", "what ?", "--max-new-tokens", 2)
    assert vlmprune(monkeypatch, *arguments, "--draw", tmp_path / "kept.png") == 2
    said = capsys.readouterr()
    assert "un-pruned" in said.out
    assert "No space left on device); the answers are printed above" in said.err


def test_numbers_of_view_are_printed_before_its_figure_is_written(monkeypatch, capsys, picture, tmp_path):
    """Red: a full disk costs the numbers, and ends in a traceback."""

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlmprune.evals.sink_view.draw", full)
    arguments = ("view", "--image", picture, "--prompt", "what ?", "--out", tmp_path / "sinks.png")
    assert vlmprune(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert "sinks per layer" in said.out
    assert "No space left on device); the numbers are printed above" in said.err


# -- the hub ---------------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the asked name ends with."""

    def do_GET(self):
        code = int(self.path[-3:]) if self.path[-3:].isdecimal() else 404
        self.send_response(code)
        if code in (403, 404):
            self.send_header("X-Error-Code", {403: "GatedRepo", 404: "RepoNotFound"}[code])
        body = json.dumps({"id": "a/b", "siblings": [{"rfilename": "model.gguf"}]}).encode() if code == 200 else b"{}"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, and an empty cache."""
    from huggingface_hub import constants, hf_api

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def point(port):
        for module in (constants, hf_api.constants):
            monkeypatch.setattr(module, "ENDPOINT", f"http://127.0.0.1:{port}")

    point(server.server_port)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield point
    server.shutdown()
    server.server_close()


PATIENT = 25.0
"""Seconds: half of what silent retries take, and far more than an answer takes on a busy machine."""


def no_model(name, *sentences):
    """Refused in time with one of the sentences."""
    start = time.perf_counter()
    with pytest.raises(vp.UsageError) as error:
        load_model(name, "cpu")
    assert time.perf_counter() - start < PATIENT
    assert any(sentence in str(error.value) for sentence in sentences), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("some/name-401", "on the hub no such repository, or a private one"),
        ("some/name-403", "the repository is gated; ask for access at http://127.0.0.1"),
        ("some/name-404", "on the hub no such repository, or a private one"),
        ("some/name-503", "the hub answered with error 503"),
        ("some/name-200", "the repository holds GGUF files only"),
        ("no hub id", "there is no such folder, and it cannot be a hub id"),
        ("one/two/three", "there is no such folder"),
        ("./missing", "there is no such folder"),
    ],
)
def test_hub_answers(hub, name, sentence):
    """Red: a private repository, a gated one and an error of the hub are all "no model at"."""
    no_model(name, sentence)


def test_no_network(hub):
    """Red: 50 to 80 seconds of silent retries."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        hub(closed.getsockname()[1])
        no_model("some/name", "the hub cannot be asked (no network: ")


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    monkeypatch.setattr(the_hub, "PATIENCE", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hub(silent.getsockname()[1])
        # On a busy machine our own patience may end before the client's.
        no_model("some/name", "the hub cannot be asked (no network: ", "the hub cannot be asked (no answer within 1 s)")


def test_an_address_that_is_looked_up_for_ever(hub, monkeypatch):
    """No client can bound how long the system looks for a host."""
    import huggingface_hub

    found = threading.Event()
    monkeypatch.setattr(the_hub, "PATIENCE", 0.5)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *name, **more: found.wait(2 * PATIENT))
    try:
        no_model("some/name", "the hub cannot be asked (no answer within 0.5 s)")
    finally:
        found.set()


def test_offline(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    no_model("some/name", "the hub cannot be asked (HF_HUB_OFFLINE is set), and its cache")


@pytest.mark.parametrize(
    ("left", "lacks"),
    [
        (("config.json",), "the weights"),
        (("config.json", "model.safetensors"), "preprocessor_config.json and tokenizer.json"),
        (("config.json", "processor_config.json", "tokenizer.json"), "the weights"),
        (("config.json", "model.safetensors.index.json"), "2 of 2 files with weights"),
        (None, ""),
    ],
)
def test_half_a_download_without_network(hub, made, monkeypatch, tmp_path, left, lacks):
    """Red: what the download has not brought yet is said to be missing in the model, and to be saved from another."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "cache" / "models--some--name"
    shutil.copytree(made["llava"], cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    if left is None:
        assert load_model("some/name", "cpu"), "the whole of it needs no network"
        return
    for file in (cache / "snapshots" / "abc").iterdir():
        if file.name not in left:
            file.unlink()
    if "model.safetensors.index.json" in left:
        (cache / "snapshots" / "abc" / "model.safetensors.index.json").write_text(json.dumps(index))
    no_model("some/name", f"the download of 'some/name' is not complete: the cache on this machine lacks {lacks}")
    if "model.safetensors" in left:  # of a decoder only the tokenizer is wanted
        with pytest.raises(vp.UsageError, match="is not complete: the cache on this machine lacks the tokenizer"):
            load_decoder("some/name", None, "cpu")
    no_model("some/name", "and the hub cannot be asked (HF_HUB_OFFLINE is set); try again with network")


def test_a_recipe_without_network(hub):
    """A recipe's repository is looked for as patiently."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        hub(closed.getsockname()[1])
        start = time.perf_counter()
        with pytest.raises(vp.UsageError, match="the hub cannot be asked"):
            vp.Recipe.from_pretrained("some/name")
        assert time.perf_counter() - start < PATIENT


def test_ask_once_gives_both_answers_and_writes_the_picture(tmp_path):
    """The same from Python as `vlmprune run`: fault scripts of users call it so."""
    scene = next(held_out(1, "test"))
    scene.image.save(tmp_path / "a.png")
    target = tmp_path / "kept.png"
    result = asking.ask_once("tiny", tmp_path / "a.png", scene.questions[0].text, "divprune:fraction=0.5", 2, "cpu", target)
    assert (result["pruned"]["visual_tokens"], result["unpruned"]["visual_tokens"]) == (72, 144)
    assert target.exists()
