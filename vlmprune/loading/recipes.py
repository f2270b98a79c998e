"""The recipe that a user names: a string, or a file, folder or hub repository that holds one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmprune import names

if TYPE_CHECKING:
    from vlmprune.recipe import Recipe


def read_recipe(text: str) -> Recipe:
    """The recipe of a string, of a JSON file, or of a folder or hub repository that holds one.

    Raises:
        UsageError: there is no such recipe, or it cannot be read.
    """
    from vlmprune.recipe import Recipe

    return Recipe.from_pretrained(text) if names.is_file(text) else Recipe.of(text)
