"""Names without torch: what a package exports, methods and their parameters, read from the source files.

A mistyped name is answered at once, before torch is imported; and a public name is listed once, by the line that imports it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from vlmprune.errors import UsageError, unknown

FILE = "vlmprune.json"
"""What a recipe's file is called in a folder or repository."""
OPEN_CLIP = "open_clip:"
"""What the name of a model of open_clip begins with: open_clip:NAME/PRETRAINED."""
HOME = Path(__file__).parent
FOLDER = HOME / "methods"
KINDS = ("pruning", "redistribution")


def exports(package: str) -> dict[str, str]:
    """The names that a package of ours exports, with the modules that define them.

    They are those that its `__init__.py` imports under their own names (`from m import X as X`), under `TYPE_CHECKING` too, and
    those that a package exports which it imports with a star.
    """
    source = HOME.joinpath(*package.split(".")[1:], "__init__.py").read_text(encoding="utf-8")
    return dict(_exported(ast.parse(source).body))


def _exported(lines: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for line in lines:
        if isinstance(line, ast.If) and ast.unparse(line.test) == "TYPE_CHECKING":
            yield from _exported(line.body)
        elif isinstance(line, ast.ImportFrom) and line.module:
            for alias in line.names:
                if alias.name == "*":
                    yield from exports(line.module).items()
                elif alias.asname == alias.name:
                    yield alias.name, line.module


def method_names(*kinds: str) -> list[str]:
    """Names of the methods that `methods/pruning` and `methods/redistribution` export, or one of them: those of their files."""
    modules = (module for kind in kinds or KINDS for module in exports(f"vlmprune.methods.{kind}").values())
    return sorted(module.rpartition(".")[2] for module in modules)


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
    """Refuse a recipe string that names a method or parameter which does not exist, or cannot be read.

    Raises:
        UsageError: names the nearest.
    """
    check_not_empty(recipe)
    if is_file(recipe):
        return
    for part in recipe.split("+"):
        name, pairs = read_part(part.strip())
        try:
            check_method(name)
        except UsageError as error:
            if set(recipe) & set(":+"):
                raise
            raise UsageError(f"{error} There is no file or folder of this name either.") from error
        known = parameters(name)
        for key, values in pairs.items():
            if key not in (*known, "site"):
                raise unknown(f"parameter of {name}", key, known)
            for value in values:
                check_number(key, value)


def read_part(text: str) -> tuple[str, dict[str, list[str]]]:
    """A method's name, and its parameters with their values as text: `name:key=value,key=value|value`.

    Raises:
        UsageError: it is not written so, or a parameter is given twice.
    """
    name, _, arguments = text.partition(":")
    pairs: dict[str, list[str]] = {}
    for pair in filter(None, (piece.strip() for piece in arguments.split(","))):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not equals or not key or not value:
            raise UsageError(f"cannot read {pair!r} in {text!r}: write name:key=value,key=value.")
        if key in pairs:
            raise UsageError(f"{key!r} is given twice in {text!r}.")
        pairs[key] = [piece.strip() for piece in value.split("|")]
    return name.strip(), pairs


def check_number(key: str, text: str) -> None:
    """Refuse a value that must be a number and is none.

    Raises:
        UsageError: it is none.
    """
    if key not in ("layer", "tokens", "fraction", "seed"):
        return
    try:
        float(text)
    except ValueError as error:
        raise UsageError(f"{key} must be a number, found {text!r}.") from error


def parameters(name: str) -> list[str]:
    """What a recipe string may say of a method, read from the source of its class and those that it is made from."""
    (file,) = FOLDER.glob(f"*/{name}.py")
    classes = {
        found.name: found
        for source in (*FOLDER.glob("*.py"), file)
        for found in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(found, ast.ClassDef)
    }
    own = next(made for made in reversed(classes.values()) if _says(made, name))
    return [key for key in dict.fromkeys(_fields(own, classes)) if key != "schedule"]


def _says(made: ast.ClassDef, name: str) -> bool:
    """Whether a class has the line `name = "…"` of a method."""
    return any(
        isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "name" and ast.unparse(line.value) == repr(name)
        for line in made.body
    )


def _fields(made: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> list[str]:
    inherited = [key for base in made.bases for key in _fields_named(ast.unparse(base), classes)]
    annotated = [line for line in made.body if isinstance(line, ast.AnnAssign)]
    return inherited + [ast.unparse(line.target) for line in annotated if "ClassVar" not in ast.unparse(line.annotation)]


def _fields_named(name: str, classes: dict[str, ast.ClassDef]) -> list[str]:
    return _fields(classes[name], classes) if name in classes else []


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


def check_method(name: str, *kinds: str) -> None:
    """Refuse a name that is no method's, or none of one of `KINDS`.

    Raises:
        UsageError: names the nearest.
    """
    if name not in (known := method_names(*kinds)):
        raise unknown("method", name, known)
