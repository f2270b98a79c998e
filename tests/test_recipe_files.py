"""Recipes that the first release wrote, as strings and as files, mean the same in every later one.

`recipes_0_1.jsonl` was written by that release: what a user gave, the string and the file that it became.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vlmprune as vp

WRITTEN = [json.loads(line) for line in (Path(__file__).parent / "recipes_0_1.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("written", WRITTEN, ids=lambda written: written["given"])
def test_read_and_written_as_before(written):
    """Red: a file of a user is refused, loses a parameter, or gets the default of another version."""
    recipe = vp.Recipe.from_dict(written["file"])
    assert recipe == vp.Recipe.parse(written["given"]) == vp.Recipe.parse(written["string"])
    assert str(recipe) == written["string"]
    assert recipe.to_dict() == written["file"]
