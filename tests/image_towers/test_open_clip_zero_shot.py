"""`vlmprune eval` on a model of open_clip, and its texts against open_clip's own zero-shot classifier."""

from __future__ import annotations

import json

import open_clip
import torch
from command_line import vlmprune
from image_towers.converted import saved, small
from PIL import Image

from vlmprune.evals.zero_shot import class_texts
from vlmprune.loading.image_text import load_image_text

CLASSES = ["a cat", "dog", "traffic light"]


@torch.no_grad()
def test_classes_are_those_of_open_clip(tmp_path):
    """What `build_zero_shot_classifier` makes of the same names and templates; and pictures are what `encode_image` gives."""
    found = load_image_text(f"open_clip:{saved(small('ViT'), tmp_path)}", "cpu")
    templates = ["a photo of {}.", "art of {}"]
    words = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    expected = open_clip.build_zero_shot_classifier(found.model, words, CLASSES, templates)
    torch.testing.assert_close(class_texts(found, CLASSES, templates), expected.T, atol=1e-6, rtol=0)
    pixels = found.pixels([Image.new("RGB", (50, 30), (200, 30, 60)), Image.new("RGB", (40, 40), (0, 90, 250))])
    assert pixels.shape == (2, 3, 40, 40)
    torch.testing.assert_close(found.images(pixels), found.model.encode_image(pixels, normalize=True))


def test_the_command_on_open_clip(tmp_path, monkeypatch):
    """The usual recipes, each of which this tower can host."""
    data, out, place = tmp_path / "data", tmp_path / "out", tmp_path / "model"
    place.mkdir()
    name = f"open_clip:{saved(small('ViT'), place)}"
    for number, folder in enumerate(CLASSES):
        (data / folder).mkdir(parents=True)
        for shade in range(2):
            Image.new("RGB", (40, 40), (80 * number, 255 - 60 * number, 90 * shade)).save(data / folder / f"{shade}.png")
    assert vlmprune(monkeypatch, "eval", "--model", name, "--data", data, "--batch", 2, "--out", out) == 0
    numbers = json.loads((out / "zero_shot.json").read_text())
    assert [row["recipe"].partition(":")[0] for row in numbers["rows"]] == [
        "un-pruned",
        *sorted(["evit", "flowcut"] * 2),
        *["random"] * 2,
        *["tome"] * 2,
    ]
    assert all(row["bound"] > 1.05 for row in numbers["rows"][1:] if not row["recipe"].startswith("flowcut"))
    assert numbers["notes"] == []
