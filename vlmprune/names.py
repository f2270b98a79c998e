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
    check_not_empty(recipe)
    if is_file(recipe):
        return
    for part in recipe.split("+"):
        try:
            check_method(part.partition(":")[0].strip())
        except UsageError as error:
            if set(recipe) & set(":+"):
                raise
            raise UsageError(f"{error} There is no file or folder of this name either.") from error


def check_not_empty(recipe: str) -> None:
    """Refuse a recipe string that is empty, or has nothing beside a plus sign.

    Raises:
        UsageError: it is.
    """
    if not all(part.strip() for part in recipe.split("+")):
        what = f"a part of the recipe {recipe!r}" if "+" in recipe else "the recipe"
        raise UsageError(f"{what} is empty: name a method, for example divprune:fraction=0.25.")


def check_pruning(name: str, command: str) -> None:
    """Refuse a name that is no pruning method's, for a command that takes no others.

    Raises:
        UsageError: says that it redistributes attention, or names the nearest.
    """
    if name in method_names("redistribution"):
        raise UsageError(
            f"{name} redistributes attention, and `vlmprune {command}` takes pruning methods: name one of those that "
            "`vlmprune methods` lists first."
        )
    check_method(name, "pruning")


def check_method(name: str, kind: str = "*") -> None:
    """Refuse a name that is no method's.

    Raises:
        UsageError: names the nearest.
    """
    if name not in (known := method_names(kind)):
        raise unknown("method", name, known)
