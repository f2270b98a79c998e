"""docs/generation.md says what the tests found, of the cells that there are."""

from __future__ import annotations

import json

import pytest
from generation import page
from generation.ways import CELLS, refusal_of


@pytest.fixture(scope="module")
def results():
    return json.loads(page.RESULTS.read_text())


def test_the_page_agrees_with_the_results(results):
    """Red: somebody edited it by hand, or took new results and did not run tests/generation/page.py."""
    assert page.PAGE.read_text() == page.page(results, json.loads(page.FAMILIES.read_text()))


def test_the_results_are_of_todays_cells(results):
    """Red: a cell or a family was added, or another one is refused, and the cells were not run again."""
    assert set(results["cells"]) == {cell.id for cell in CELLS}
    for cell in CELLS:
        found, expected = results["cells"][cell.id], refusal_of(cell)
        reason = "" if expected is None else expected.reason
        assert (found["outcome"], found["reason"]) == ("skipped" if reason else "passed", reason), cell.id


def test_a_wrong_table_is_noticed(results):
    """Red: the comparison of texts cannot fail."""
    cell = next(cell for cell in CELLS if refusal_of(cell) is None)
    changed = {**results, "cells": {**results["cells"], cell.id: {"outcome": "skipped", "reason": "no reason"}}}
    assert page.page(changed, json.loads(page.FAMILIES.read_text())) != page.PAGE.read_text()
