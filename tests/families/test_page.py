"""docs/families.md and the table of README.md say what the tests found, of the cells and families that there are."""

from __future__ import annotations

import json

import pytest
from families import matrix
from families.cells import CELLS, refusal_of
from families.table import NAMES, TINY
from video.cells import CELLS as OF_VIDEOS
from video.cells import refusal_of as refusal_of_video

from vlmprune.adapters.registry import FAMILIES


@pytest.fixture(scope="module")
def results():
    return json.loads(matrix.RESULTS.read_text())


def test_the_pages_agree_with_the_results():
    """Red: somebody edited a table by hand, or took new results and did not run tests/families/matrix.py."""
    assert matrix.differing() == []


def test_the_results_are_of_todays_cells(results):
    """Red: a cell or a family was added, and the matrix was not run again."""
    assert set(results["cells"]) == {cell.id for cell in CELLS}
    assert set(matrix.SHORT) == set(NAMES)


def test_the_oldest_version_ran_every_family():
    """Red: a family was added, and not run on the oldest supported transformers; or it does not run there."""
    oldest = json.loads(matrix.OLDEST.read_text())
    assert set(oldest["cells"]) == {cell.id for cell in CELLS if cell.oldest}
    assert {cell.family for cell in CELLS if cell.oldest} == set(NAMES)
    wanted = (matrix.ROOT / "constraints-oldest.txt").read_text()
    assert f"transformers=={oldest['versions']['transformers']}\n" in wanted
    for cell in CELLS:
        if cell.oldest:
            expected = "passed" if refusal_of(cell) is None else "skipped"
            assert oldest["cells"][cell.id]["outcome"] == expected, cell.id


def test_what_is_refused_stands_in_the_table_of_refusals(results):
    """Red: the results are of a time when other cells were refused, or a registered family was not supported yet."""
    for cell in CELLS:
        found, expected = results["cells"][cell.id], refusal_of(cell)
        known = TINY[cell.family].model_type in FAMILIES
        reason = "not supported yet" if not known else "" if expected is None else expected.reason
        assert (found["outcome"], found["reason"]) == ("skipped" if reason else "passed", reason), cell.id


def test_the_results_of_videos_are_of_todays_cells():
    """Red: a cell of videos was added, or another one is refused, and `make test-video` was not run."""
    found = json.loads(matrix.VIDEOS.read_text())["cells"]
    assert set(found) == {cell.id for cell in OF_VIDEOS}
    for cell in OF_VIDEOS:
        expected = refusal_of_video(cell)
        reason = "" if expected is None else expected.reason
        assert (found[cell.id]["outcome"], found[cell.id]["reason"]) == ("skipped" if reason else "passed", reason), cell.id


def test_a_wrong_table_is_noticed(results):
    """Red: the comparison of texts cannot fail."""
    cell = next(cell for cell in CELLS if refusal_of(cell) is None)
    changed = {**results, "cells": {**results["cells"], cell.id: {"outcome": "skipped", "reason": "no reason"}}}
    assert matrix.page(changed) != matrix.PAGE.read_text()
    readme = matrix.README.read_text()
    assert matrix.with_table(readme, changed) != readme
