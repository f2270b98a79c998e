"""From a picture file and a question to an answer, through the loader of the command line, without torchvision."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from families.folders import FOLDERS, PATCH, SIDE
from PIL import Image
from transformers.models.smolvlm import processing_smolvlm
from typer.testing import CliRunner

import vlmprune as vp
from vlmprune.adapters.registry import FAMILIES
from vlmprune.cli import app
from vlmprune.loading.frames import KINDS
from vlmprune.loading.models import load_model
from vlmprune.loading.prompts import make_inputs, prompt_text
from vlmprune.loading.questions import ReadyQuestion
from vlmprune.loading.videos import video_of

pytestmark = pytest.mark.usefixtures("no_grad")
_kept = TemporaryDirectory()
TILE = (SIDE // PATCH // 2) ** 2


@cache
def folder(name: str) -> Path:
    """Made once for all tests, when it is first wanted."""
    path = Path(_kept.name) / name
    path.mkdir()
    return FOLDERS[name](path)


@pytest.fixture(autouse=True)
def spelled_numbers(monkeypatch):
    """SmolVLM's processor spells the number of a video's frames with a package that is not needed for pictures."""
    if processing_smolvlm.num2words is None:
        monkeypatch.setattr(processing_smolvlm, "num2words", str)


def noise(width: int = 120, height: int = 70) -> Image.Image:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


SPLIT = [*((f"crop {row}, {column}", 3, 3) for row in (1, 2) for column in (1, 2)), ("whole picture", 3, 3)]
PACKED = [("whole picture", 6, 6), *((f"crop {row}, {column}", 6, 6) for row in (1, 2) for column in (1, 2))]
CROPS = {
    "qwen3_vl": [("picture", 4, 8)],
    "glm4v": [("picture", 4, 8)],
    "mistral3": [("picture", 4, 6)],
    "gemma3": [("picture", 3, 3)],
    "internvl": [("crop 1, 1", 3, 3), ("crop 1, 2", 3, 3), ("whole picture", 3, 3)],
    "idefics3": SPLIT,
    "smolvlm": SPLIT,
    "llava_onevision": PACKED,
    "llava_next_video": PACKED,
}
"""Rasters of the tokens of a picture of 120 × 70 pixels, in the order of its pixels: name, rows, columns."""


@pytest.mark.parametrize("name", FOLDERS)
def test_from_a_picture_and_a_question_to_an_answer(name, tmp_path):
    """Red: the processor wants torchvision, its tokens are not the model's, or kept tokens are drawn in other places."""
    if name not in FAMILIES:
        pytest.skip("not supported yet")
    picture, target = tmp_path / "noise.png", tmp_path / "kept.png"
    noise().save(picture)
    arguments = ["run", "--model", str(folder(name)), "--image", str(picture), "--prompt", "what is this ?", "--json"]
    more = ["--recipe", "divprune:fraction=0.5", "--max-new-tokens", "3", "--draw", str(target)]
    result = CliRunner().invoke(app, [*arguments, *more])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert isinstance(answer["pruned"]["answer"], str)
    views = answer["views"]
    assert [(view["name"], view["rows"], view["columns"]) for view in views] == CROPS[name]
    assert sum(view["tokens"] for view in views) == answer["unpruned"]["visual_tokens"]
    assert sum(len(view["kept"]) for view in views) == len(answer["kept"]) == answer["pruned"]["visual_tokens"]
    across = max(column for column in (int(crop[0][-1]) if "crop" in crop[0] else 1 for crop in CROPS[name]))
    assert Image.open(target).size[0] == 384 * across + 12 * (across - 1)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_processor_writes_the_models_tokens(name):
    """Oracle: the model itself. Red: a token too many; a part of the processor is left out that pictures need."""
    model, processor = load_model(str(folder(name)), "cpu") if name in FAMILIES else (None, None)
    if model is None:
        pytest.skip("not supported yet")
    inputs = make_inputs(processor, noise(), prompt_text(processor, "what is this ?"), "cpu")
    text = model.model.get_input_embeddings()
    entered = []
    handle = (getattr(model.model, "language_model", None) or model.model.text_model).register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    image = FAMILIES[name].image_token(model.config)
    changed = (entered[0] != text(inputs["input_ids"])).any(-1)
    if name != "gemma3":  # which multiplies embeddings
        assert torch.equal(changed, inputs["input_ids"] == image)
    with vp.wrap(model, "random:layer=1,fraction=0.5") as run:
        generated = model.generate(**inputs, max_new_tokens=3)
    assert len({picture.ordinal for picture in run.last.kept}) == 1
    assert isinstance(processor.tokenizer.decode(generated[0]), str)
    if find_spec("torchvision") is None:
        assert hasattr(processor, "video_processor") == (name in KINDS)
    assert type(processor).__name__ == json.loads((folder(name) / "processor_config.json").read_text())["processor_class"]


@pytest.mark.parametrize("name", [name for name in FOLDERS if name in KINDS])
def test_the_processor_writes_the_tokens_of_a_video(name):
    """Oracle: the model itself, which is given what our part for videos makes. Red: a token too many, or other frames."""
    model, processor = load_model(str(folder(name)), "cpu")
    video = video_of([noise() for _ in range(4)])
    shown = "<|begin_of_video|><|video|><|end_of_video|>" if name == "glm4v" else processor.video_token
    inputs = make_inputs(processor, None, f"{shown} what is this ?", "cpu", video)
    with vp.wrap(model, "evs:fraction=0.6") as run:
        model.generate(**inputs, max_new_tokens=2)
    (kept,) = run.last.kept
    grid = FAMILIES[name].videos.grids(inputs, model.config)[0]
    assert kept.original - np.prod(grid) in (0, 1)  # a separator at the end
    assert kept.index[: grid[1] * grid[2]].tolist() == list(range(grid[1] * grid[2]))


@pytest.mark.parametrize(
    ("name", "sizes", "tokens"),
    [
        ("idefics3", [(120, 70), (70, 120)], [5 * TILE, 5 * TILE]),
        ("smolvlm", [(120, 70), (70, 120)], [5 * TILE, 5 * TILE]),
        ("internvl", [(120, 70), (40, 40)], [3 * TILE, TILE]),
        ("mistral3", [(120, 70), (40, 40)], [24, 9]),
        ("llava_onevision", [(120, 70), (40, 40)], [(SIDE // PATCH) ** 2] * 2),
    ],
)
@pytest.mark.parametrize("between", ["", " and "])
def test_pictures_of_one_prompt_are_told_apart(name, sizes, tokens, between):
    """A budget counts a picture's tokens, all tiles together. Red: a picture ends at a tile, or goes on in the next picture."""
    model, processor = load_model(str(folder(name)), "cpu")
    token = processor.image_token
    pictures = [noise(*size) for size in sizes]
    given = [pictures] if name == "llava_onevision" else pictures  # of one prompt, which then has base views only
    inputs = processor(images=given, text=f"what {token}{between}{token} ?", return_tensors="pt")
    with vp.wrap(model, "random:layer=0,tokens=4") as run:
        model.generate(**inputs, max_new_tokens=2)
    assert [picture.original for picture in run.last.kept] == tokens
    assert [len(picture.index) for picture in run.last.kept] == [4, 4]


def question(name: str, picture: Image.Image) -> ReadyQuestion:
    model, processor = load_model(str(folder(name)), "cpu")
    inputs = make_inputs(processor, picture, prompt_text(processor, "what is this ?"), "cpu")
    return ReadyQuestion(model, processor, inputs, picture)


def pooled(name: str, model: Any, tower: torch.Tensor) -> torch.Tensor:
    """What the model itself makes of a tower's output `[tile, patch, dim]` before its projection: `[tile, token, …]`."""
    side = SIDE // PATCH
    if name == "internvl":
        return model.model.pixel_shuffle(tower.view(-1, side, side, tower.shape[-1]), scale_factor=0.5).flatten(1, 2)
    return model.model.connector.pixel_shuffle(tower, 2)


@pytest.mark.parametrize("name", ["internvl", "idefics3", "smolvlm"])
def test_cells_are_where_the_model_takes_tokens_from(name):
    """Oracle: the model's own shuffle, of numbered patches. Red: columns for rows, or crops in another order."""
    asked = question(name, noise())
    tiles, side = len(asked.seen()), SIDE // PATCH
    numbered = torch.arange(tiles * side * side).view(tiles, side * side, 1).float()
    tokens = pooled(name, asked.model, numbered).flatten(0, 1)
    for number, crop in enumerate(asked.crops()):
        for row, cells in enumerate(crop.cells.tolist()):
            for column, token in enumerate(cells):
                mine = {number * side**2 + (2 * row + down) * side + 2 * column + right for down in (0, 1) for right in (0, 1)}
                assert set(tokens[token].int().tolist()) == mine


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="with torchvision, the processor is transformers' own")
def test_rows_of_mistral_end_with_a_break():
    processor = load_model(str(folder("mistral3")), "cpu")[1]
    inputs = make_inputs(processor, noise(), prompt_text(processor, "what ?"), "cpu")
    image, stop, end = processor.tokenizer.convert_tokens_to_ids(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    ids = [token for token in inputs["input_ids"][0].tolist() if token in (image, stop, end)]
    assert ids == [*([*[image] * 6, stop] * 3), *[image] * 6, end]


def test_a_package_that_is_missing_is_named(monkeypatch):
    """Red: SmolVLM fails with a trace, or is said to be broken."""
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(vp.UsageError) as refusal:
        load_model(str(folder("smolvlm")), "cpu")
    assert "num2words" in str(refusal.value)
    assert "install it" in str(refusal.value)
    assert "\n" not in str(refusal.value)
