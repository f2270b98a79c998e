"""Scenes are reproducible, and their answers follow from what was drawn."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest

from vlmprune.tiny.drawing import PALETTE
from vlmprune.tiny.scenes import GRID, PATCH, SHAPES, SIZE, SKILLS, SPLITS, TRAINING_SEEDS, Scene, held_out, make_scene


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(held_out(120, "dev"))


def test_a_seed_determines_the_scene() -> None:
    first, again, other = make_scene(7), make_scene(7), make_scene(8)
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert (first.objects, first.sign, first.questions) == (again.objects, again.sign, again.questions)
    assert not np.array_equal(np.asarray(first.image), np.asarray(other.image))


def test_splits_are_disjoint_from_each_other_and_from_training() -> None:
    starts = sorted(SPLITS.values())
    assert starts[0] >= TRAINING_SEEDS
    assert all(later - earlier > 1 << 40 for earlier, later in pairwise(starts))
    assert next(held_out(1, "dev")).seed != next(held_out(1, "test")).seed


def test_objects_are_painted_where_they_are_said_to_be(scenes: list[Scene]) -> None:
    for scene in scenes:
        pixels = np.asarray(scene.image, float)
        for thing in scene.objects:
            if thing.shape == "ring":  # a ring's centre shows the background
                continue
            shown = pixels[thing.y - 1 : thing.y + 2, thing.x - 1 : thing.x + 2].mean((0, 1))
            nearest = min(PALETTE, key=lambda name: np.abs(shown - PALETTE[name]).sum())
            assert nearest == thing.colour


def test_signs_are_bright_with_dark_digits(scenes: list[Scene]) -> None:
    for scene in scenes:
        if scene.sign is None:
            continue
        left, top, right, bottom = scene.sign.box
        plate = np.asarray(scene.image, float)[top:bottom, left:right].mean(2)
        assert np.median(plate) > 200
        assert plate.min() < 120
        assert len(scene.sign.digits) == 3


def test_every_skill_is_asked(scenes: list[Scene]) -> None:
    asked = Counter(question.skill for scene in scenes for question in scene.questions)
    assert set(asked) == set(SKILLS)
    assert min(asked.values()) > 50


def test_answers_follow_from_the_objects(scenes: list[Scene]) -> None:
    for scene in scenes:
        for question in scene.questions:
            assert question.answer == _answer_by_hand(question.text, scene), question.text


def _answer_by_hand(text: str, scene: Scene) -> str:
    """Parse the text of a question and answer it from the scene's objects, independently of the generator."""
    words = text.removesuffix(" ?").split()
    things = scene.objects

    def named(colour: str, shape: str):
        (thing,) = [t for t in things if t.colour == colour and t.shape == shape]
        return thing

    match words:
        case ["is", "there", "a", "number"]:
            return "yes" if scene.sign else "no"
        case ["is", "there", _, colour, shape]:
            return "yes" if any(t.colour == colour and t.shape == shape for t in things) else "no"
        case ["what", "colour", "is", "the", shape]:
            (thing,) = [t for t in things if t.shape == shape]
            return thing.colour
        case ["what", "shape", "is", "the", colour, "object"]:
            (thing,) = [t for t in things if t.colour == colour]
            return thing.shape
        case ["how", "many", "objects", *_]:
            return str(len(things))
        case ["how", "many", colour, "objects", *_]:
            return str(sum(t.colour == colour for t in things))
        case ["how", "many", shapes, *_]:
            (shape,) = [s for s in SHAPES if shapes in (s + "s", s + "es")]
            return str(sum(t.shape == shape for t in things))
        case ["where", "is", "the", colour, shape]:
            thing = named(colour, shape)
            row, column = int(3 * thing.y / SIZE), int(3 * thing.x / SIZE)
            return f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}"
        case ["is", "the", colour, shape, "left", "or", "right", "of", "the", colour2, shape2]:
            return "left" if named(colour, shape).x < named(colour2, shape2).x else "right"
        case ["is", "the", colour, shape, "above", "or", "below", "the", colour2, shape2]:
            return "above" if named(colour, shape).y < named(colour2, shape2).y else "below"
        case ["what", "is", "the", "number"]:
            assert scene.sign is not None
            return " ".join(scene.sign.digits)
    raise AssertionError(f"no such question: {text}")


def test_nouns_name_the_objects_they_mean(scenes: list[Scene]) -> None:
    for scene in islice(scenes, 40):
        for question in scene.questions:
            for noun in question.nouns:
                word = question.text.split()[noun.word]
                for index in noun.objects:
                    thing = scene.objects[index]
                    assert word in {thing.shape, thing.shape + "s", thing.shape + "es", "object", "objects"}


def test_most_patches_are_background(scenes: list[Scene]) -> None:
    kinds = np.stack([scene.patch_kinds() for scene in scenes])
    assert kinds.shape[1] == GRID * GRID
    assert 0.1 < (kinds > 0).mean() < 0.3
    for scene in scenes:
        own = scene.patch_kinds().reshape(GRID, GRID)
        assert all(own[thing.y // PATCH, thing.x // PATCH] for thing in scene.objects)


def test_signs_and_objects_stand_at_every_pixel() -> None:
    scenes = list(held_out(400, "dev"))
    assert {s.sign.box[0] % PATCH for s in scenes if s.sign} == set(range(PATCH))
    assert {s.sign.box[1] % PATCH for s in scenes if s.sign} == set(range(PATCH))
    assert {(t.x % 2, t.y % 2) for s in scenes for t in s.objects} == {(0, 0), (0, 1), (1, 0), (1, 1)}
