"""Zero-shot accuracy and recall of a CLIP model of transformers, on pictures by class and with captions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from command_line import vlmprune
from methods.clip import clip, tokenizer
from PIL import Image
from transformers import CLIPImageProcessor

import vlmprune as vp
from vlmprune.evals import zero_shot, zero_shot_report
from vlmprune.evals.store import Store
from vlmprune.evals.zero_shot import measure, ranks
from vlmprune.evals.zero_shot_data import is_picture_set, open_pictures
from vlmprune.loading.image_text import load_image_text

COLOURS = {"deep_red": (200, 30, 30), "green": (20, 180, 40), "blue": (30, 40, 210)}

CAPTIONS = (["red as a rose"], ["a green leaf", "grass on a hill"], ["the deep blue sea"])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    made = clip(32)
    made.config.vision_config.num_hidden_layers = 1
    made.save_pretrained(place)
    tokenizer(marks=True).save_pretrained(place)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def model(model_folder):
    return load_image_text(model_folder, "cpu")


def noisy(colour, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 40, (20, 24, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    for number, (name, colour) in enumerate(COLOURS.items()):
        (folder / name).mkdir()
        for seed in range(3 + number):
            noisy(colour, 10 * number + seed).save(folder / name / f"{seed}.PNG")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    lines = []
    for number, colour in enumerate(COLOURS.values()):
        noisy(colour, number).save(folder / f"{number}.png")
        texts = CAPTIONS[number]
        lines.append({"image": f"{number}.png", "captions": texts})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return folder


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_pictures_by_class(by_class, captioned, tmp_path):
    found = open_pictures(str(by_class))
    assert found.classes == ("blue", "deep red", "green")
    assert [by_class / path.relative_to(by_class) for path in found.paths] == list(found.paths)
    assert found.labels == (0,) * 5 + (1,) * 3 + (2,) * 4
    assert len(found.first(7)) == 7
    assert found.first(7) == found.first(7) != found.first(8)
    assert found.fingerprint != found.first(7).fingerprint
    assert is_picture_set(str(by_class))
    assert is_picture_set(str(captioned))
    assert not is_picture_set(None)
    assert not is_picture_set(str(tmp_path))
    assert not is_picture_set("pope")


def test_a_line_for_each_caption(captioned, tmp_path):
    """Red: a picture counts as several, so that its other captions are wrong answers."""
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((captioned / name).read_bytes())
    lines = [("0.png", "a"), ("1.png", "b"), ("0.png", "c")]
    text = "\n".join(json.dumps({"image": name, "captions": caption}) for name, caption in lines)
    (tmp_path / "captions.jsonl").write_text(text)
    found = open_pictures(str(tmp_path))
    assert ([path.name for path in found.paths], found.captions) == (["0.png", "1.png"], (("a", "c"), ("b",)))


def test_names_of_classes(by_class, tmp_path):
    for name in COLOURS:
        (tmp_path / name).mkdir()
        noisy((1, 2, 3), 0).save(tmp_path / name / "0.jpg")
    (tmp_path / "classes.json").write_text('{"blue": "sky", "deep_red": "rose", "green": "grass", "other": "x"}')
    assert open_pictures(str(tmp_path)).classes == ("sky", "rose", "grass")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "holds pictures of 0 classes"),
        ({"classes.json": "[1]"}, "must hold the names of classes by their folders"),
        ({"classes.json": "{"}, "is no JSON"),
        ({"classes.json": '{"a": "one"}'}, "has no name for 1 folders (such as 'b')"),
        ({"classes.json": '{"a": "one", "b": "one"}'}, "two classes in"),
        ({"captions.jsonl": '{"image": "x.png"}'}, "line 1 must be"),
        ({"captions.jsonl": '\n{"image": "x.png", "captions": ["a"]}'}, "line 2: there is no picture at"),
        ({"captions.jsonl": '{"image": "a/0.png", "captions": "a dog"}'}, "names 1 pictures: retrieval needs at least two"),
    ],
)
def test_pictures_that_cannot_be_used(files, sentence, tmp_path):
    if files:
        for name in "ab":
            (tmp_path / name).mkdir()
            noisy((1, 2, 3), 0).save(tmp_path / name / "0.png")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(vp.UsageError) as error:
        open_pictures(str(tmp_path))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_ranks():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.5, 0.5, 0.5], [0.3, 0.2, 0.1]])
    assert ranks(scores, [2, 1, 0]) == [1, 1, 0]  # of equal ones, the first column is the first


def embedded(model, pictures, recipe=None):
    """`[picture, dim]` of pictures one by one, in loops of the test's own."""
    rows = []
    for path in pictures.paths:
        pixels = model.pixels([Image.open(path).convert("RGB")])
        with torch.no_grad():
            if recipe is None:
                rows.append(model.model.get_image_features(pixel_values=pixels).pooler_output[0])
            else:
                with vp.wrap(model.model, recipe):
                    rows.append(model.model.get_image_features(pixel_values=pixels).pooler_output[0])
    return torch.stack(rows)


@torch.no_grad()
def test_accuracy_is_that_of_loops(model, by_class):
    """Red: a recipe's own features, the mean over templates, or the order of pictures and labels is not what is scored."""
    pictures, templates = open_pictures(str(by_class)), ["a {}", "{} things"]
    recipes = {"one": vp.Recipe.of("random:layer=0,tokens=1"), "all": vp.Recipe.of("random:layer=0,fraction=1.0")}
    rows = {row.recipe: row for row in measure(model, pictures, recipes, templates, batch=5)}
    for name, recipe in (("un-pruned", None), *recipes.items()):
        right = 0
        for own, label in zip(embedded(model, pictures, recipe), pictures.labels, strict=True):
            best = []
            for written in pictures.classes:
                ids = [model.tokenizer(template.format(written), return_tensors="pt") for template in templates]
                texts = [model.model.get_text_features(**one).pooler_output[0] for one in ids]
                mean = sum(text / text.norm() for text in texts)
                best.append(float(own @ mean / mean.norm()))
            right += best.index(max(best)) == label
        assert rows[name].scores["top-1"].value == pytest.approx(right / len(pictures))
        assert rows[name].scores["top-5"].value == 1.0
        assert rows[name].scores["top-1"].n == 12
    assert rows["all"].scores == rows["un-pruned"].scores
    assert rows["all"].bound == 1.0
    assert rows["one"].bound > 1.5
    assert rows["one"].lost["top-1"].value == pytest.approx(
        rows["un-pruned"].scores["top-1"].value - rows["one"].scores["top-1"].value
    )
    assert rows["one"].per_second > 0
    assert rows["un-pruned"].speedup == (1.0, 1.0, 1.0)


@torch.no_grad()
def test_recall_is_that_of_loops(model, captioned):
    pictures = open_pictures(str(captioned))
    assert pictures.captions == tuple(map(tuple, CAPTIONS))
    (row, other) = measure(model, pictures, {"one": vp.Recipe.of("random:layer=0,tokens=1")}, batch=2)
    for found, recipe in ((row, None), (other, "random:layer=0,tokens=1")):
        images = embedded(model, pictures, recipe)
        captions = [(text, number) for number, texts in enumerate(pictures.captions) for text in texts]
        texts = [
            model.model.get_text_features(**model.tokenizer(text, return_tensors="pt")).pooler_output[0] for text, _ in captions
        ]
        score = [[float(x @ t / x.norm() / t.norm()) for t in texts] for x in images]
        to_text = [captions[row_.index(max(row_))][1] == number for number, row_ in enumerate(score)]
        to_image = [max(range(3), key=lambda p, c=column: score[p][c]) == owner for column, (_, owner) in enumerate(captions)]
        assert found.scores["text R@1"].value == pytest.approx(sum(to_text) / 3)
        assert found.scores["image R@1"].value == pytest.approx(sum(to_image) / 4)
        assert found.scores["image R@5"].value == found.scores["text R@10"].value == 1.0
        assert (found.scores["image R@1"].n, found.scores["image R@1"].units) == (4, 3)


def test_an_interrupted_run_goes_on(model, by_class, tmp_path, monkeypatch):
    """Red: finished batches are computed again, or count for another recipe."""
    pictures, recipes = open_pictures(str(by_class)), {"one": vp.Recipe.of("random:layer=0,tokens=1")}
    embed, calls = zero_shot._embed, []

    def until(limit):
        def stops(*args):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(args)
            return embed(*args)

        return stops

    monkeypatch.setattr(zero_shot, "_embed", until(3))
    with Store(tmp_path / "store", {"a": 1}) as store, pytest.raises(KeyboardInterrupt):
        measure(model, pictures, recipes, batch=5, store=store)
    monkeypatch.setattr(zero_shot, "_embed", until(100))
    with Store(tmp_path / "store", {"a": 1}) as store:
        rows = measure(model, pictures, recipes, batch=5, store=store)
    assert len(calls) == 3 + 4  # three batches, twice; the one that was interrupted began again, for its times
    whole = measure(model, pictures, recipes, batch=5)
    assert [row.scores for row in rows] == [row.scores for row in whole]


def test_speed_is_that_of_one_day(model, by_class, monkeypatch):
    """Red: a recipe that was added later is compared with the un-pruned seconds of another day."""
    embed, seconds = zero_shot._embed, {"un-pruned": 8.0, "random": 4.0}

    def timed(loaded, recipe, pixels):
        features, row = embed(loaded, recipe, pixels)
        return features, row | {"seconds": seconds["random" if recipe else "un-pruned"]}

    monkeypatch.setattr(zero_shot, "_embed", timed)
    pictures, recipes = open_pictures(str(by_class)), {"one": vp.Recipe.of("random:layer=0,tokens=1")}
    with Store(None, {}) as store:
        measure(model, pictures, recipes, batch=6, store=store)
        seconds |= {"un-pruned": 2.0, "random": 1.0}  # a machine with nothing else to do
        rows = measure(model, pictures, {**recipes, "two": vp.Recipe.of("random:layer=0,tokens=2")}, batch=6, store=store)
    assert [row.speedup[0] for row in rows] == [1.0, 2.0, 2.0]


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(model_folder, by_class, tmp_path, monkeypatch):
    out = tmp_path / "out"
    given = ("eval", "--model", model_folder, "--data", by_class, "--batch", 4, "--out", out)
    given = (*given, "--recipe", "random:layer=0,tokens=1", "--template", "a {}")
    assert vlmprune(monkeypatch, *given) == 0
    numbers = json.loads((out / "zero_shot.json").read_text())
    assert [row["recipe"] for row in numbers["rows"]] == ["un-pruned", "random:layer=0,tokens=1"]
    assert (numbers["pictures"], numbers["classes"], numbers["templates"]) == (12, 3, ["a {}"])
    assert zero_shot_report.result(numbers).markdown() + "\n" == (out / "zero_shot.md").read_text()
    assert "top-1, %" in (out / "zero_shot.md").read_text()
    assert vlmprune(monkeypatch, *given) == 0
    assert json.loads((out / "zero_shot.json").read_text())["rows"] == numbers["rows"]  # from the store, seconds too


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--model", "tiny"), "the embedded model answers questions"),
        (("--model", "MODEL", "--template", "a photo"), "has no single place for the class"),
        (("--model", "MODEL", "--template", "a {.photo}"), "has no single place for the class"),
        (("--model", "MODEL", "--template", "a {{}}"), "has no single place for the class"),
        (("--model", "MODEL", "--scorer", "vqa", "--split", "test"), "--split and --scorer are about questions"),
        (("--model", "MODEL", "--recipe", "fastv:layer=2,fraction=0.5"), "fastv looks at"),
    ],
)
def test_refused(more, sentence, model_folder, by_class, monkeypatch, capsys):
    given = [model_folder if one == "MODEL" else one for one in more]
    assert vlmprune(monkeypatch, "eval", "--data", by_class, *given) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_an_image_tower_answers_no_questions(tmp_path, monkeypatch, capsys):
    (tmp_path / "questions.jsonl").write_text("")
    for data in ((), ("--data", tmp_path)):
        assert vlmprune(monkeypatch, "eval", "--model", "open_clip:ViT-B-32/openai", *data) == 2
        assert "an image tower answers no questions: give --data a folder" in capsys.readouterr().err
