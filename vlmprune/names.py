"""Names of methods, read from the names of their files: to answer a mistyped one at once, before torch is imported."""

from __future__ import annotations

from pathlib import Path

from vlmprune.errors import UsageError, unknown

FILE = "vlmprune.json"
"""What a recipe's file is called in a folder or repository."""
FOLDER = Path(__file__).parent / "methods"


def method_names(kind: str = "*") -> list[str]:
    """Names of the methods in `methods/pruning` or `methods/redistribution`, or both: one file per method, named as it is."""
    return sorted(file.stem for file in FOLDER.glob(f"{kind}/*.py") if not file.stem.startswith("_"))


def is_file(recipe: str) -> bool:
    """Whether a recipe is a file, a folder or a repository with one, and no recipe string.

    Raises:
        UsageError: it is both a method's name and a folder with a recipe.
    """
    if recipe in method_names() and (Path(recipe) / FILE).is_file():
        raise UsageError(
            f"{recipe!r} is a method, and a folder with a recipe: write ./{recipe} for the folder, {recipe}: for the method."
        )
    if recipe.partition(":")[0].strip() in method_names() or "+" in recipe:
        return False
    return recipe.endswith(".json") or Path(recipe).exists() or ("/" in recipe and ":" not in recipe)


def check_recipe(recipe: str) -> None:
    """Refuse a recipe string that names a method which does not exist.

    Raises:
        UsageError: names the nearest.
    """
    if is_file(recipe):
        return
    for part in recipe.split("+"):
        check_method(part.partition(":")[0].strip())


def check_method(name: str, kind: str = "*") -> None:
    """Refuse a name that is no method's.

    Raises:
        UsageError: names the nearest.
    """
    if name not in (known := method_names(kind)):
        raise unknown("method", name, known)
