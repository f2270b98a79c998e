"""Crops of a prompt become pictures, and entries without a token become none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families.configs import NEXT_SIDE, PATCH
from families.table import build

from vlmprune.adapters.crops import crops_of_pictures, without_gap
from vlmprune.adapters.registry import FAMILIES
from vlmprune.live.layout import Layout, Tokens

IMAGE, FAKE, BREAK, ROW, WHOLE, WORD = 1, 2, 3, 4, 5, 9


def layout(rows: list[list[int]], counts: list[int], joins) -> list[tuple[int, int, list[int]]]:
    ids = np.array(rows)
    prompt = Tokens.of(ids, np.ones(ids.shape, dtype=bool), ids == IMAGE)
    images = Layout.find(prompt, counts, torch.device("cpu"), joins).images
    return [(image.sample, image.ordinal, image.places.tolist()) for image in images]


@pytest.mark.parametrize("joins", [None, without_gap])
def test_entries_without_a_token_are_no_pictures(joins):
    """Red: a sample without a picture, whose entry is empty, fails, or shifts the pictures after it."""
    rows = [[WORD, IMAGE, IMAGE, WORD], [WORD] * 4, [IMAGE, WORD, WORD, WORD]]
    assert layout(rows, [0, 2, 0, 1, 0], joins) == [(0, 0, [1, 2]), (2, 0, [0])]


def test_crops_without_a_gap_are_one_picture():
    rows = [[WORD, *[IMAGE] * 4, WORD, *[IMAGE] * 2, WORD], [*[IMAGE] * 6, WORD, WORD, WORD]]
    alone = [(0, 0, [1, 2]), (0, 1, [3, 4]), (0, 2, [6, 7]), (1, 0, [0, 1]), (1, 1, [2, 3]), (1, 2, [4, 5])]
    assert layout(rows, [2] * 6, None) == alone
    assert layout(rows, [2] * 6, without_gap) == [(0, 0, [1, 2, 3, 4]), (0, 1, [6, 7]), (1, 0, [0, 1, 2, 3, 4, 5])]


def test_crops_with_words_between_them_are_one_picture():
    """As Idefics3's processor writes them: two rows of two crops and the whole picture; then a small picture."""
    crop = [IMAGE, IMAGE]
    line = [FAKE, ROW, *crop, FAKE, ROW, *crop, BREAK]
    large = [*line, *line, BREAK, FAKE, WHOLE, *crop, FAKE]
    small = [FAKE, WHOLE, *crop, FAKE]
    for between in ([], [WORD], [WORD, BREAK, WORD]):
        row = [WORD, *large, *between, *small, *between, *small, WORD]
        found = layout([row], [2] * 7, FAMILIES["idefics3"].joins)
        assert [len(places) for _, _, places in found] == [10, 2, 2]
        seen = list(crops_of_pictures(torch.tensor([row]), IMAGE, 2, FAMILIES["idefics3"].joins))
        assert [len(picture) for picture in seen] == [5, 1, 1]


def test_crops_with_one_token_between_them_are_one_picture():
    """As Ovis2's processor writes them: a token that says which between crops, an end and a beginning between pictures."""
    begin, grid, column, line, end = 20, 21, 22, 23, 24
    crop = [IMAGE]
    large = [begin, *crop, grid, *crop, column, *crop, line, *crop, column, *crop, end]
    row = [*large, *large, WORD, begin, *crop, grid, end]
    found = layout([row], [1] * 11, FAMILIES["ovis2"].joins)
    assert [len(places) for _, _, places in found] == [5, 5, 1]


SIZES = [(10, 10), (23, 15), (15, 23), (24, 24), (7, 24), (24, 5), (12, 24)]


@pytest.mark.parametrize("most", [1, 2, 9])
def test_tokens_of_packed_crops_are_counted_as_the_model_packs_them(most):
    """Oracle: the stock model packs numbered patches. Red: another number of tokens, or cells whose token is another patch."""
    model, family = build("llava_onevision"), FAMILIES["llava_onevision"]
    model.config.vision_aspect_ratio = f"anyres_max_{most}"
    side = NEXT_SIDE
    smaller = 0
    for size in SIZES:
        call = {"pixel_values": torch.zeros(1), "image_sizes": torch.tensor([size])}
        (rows,) = family.cells(call, model.config)
        views = [view for row in rows for view in row]
        marked = torch.arange(len(views) * side * side).view(len(views), side * side, 1).float()
        packed, lengths = model.model.pack_image_features(
            [marked], torch.tensor([size]), torch.tensor([-1.0]), model.config.vision_aspect_ratio
        )
        assert family.tokens_per_image(call, model.config) == lengths.tolist()
        tokens = [round(float(value), 3) for value in packed[0].flatten() if value >= 0]
        indices = torch.cat([view.flatten() for view in views])
        assert sorted(set(indices.tolist()) - {-1}) == list(range(len(tokens)))
        if len(tokens) == int((indices >= 0).sum()):
            places = {token: place for place, token in enumerate(indices.tolist()) if token >= 0}
            assert [places[index] for index in range(len(tokens))] == tokens
        else:
            smaller += 1
    assert bool(smaller) == (most < 3)
    assert PATCH * side == 12, "the sizes above are pixels of such crops"
