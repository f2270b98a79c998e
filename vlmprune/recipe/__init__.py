"""A recipe: pruning methods, in the order of their stages, and methods that redistribute attention.

It can be written in Python, as a string, or as a JSON file. The three forms mean the same:

    Python                   vlmprune.Recipe.of(vlmprune.FastV(layer=2, fraction=0.25))
    string                   fastv:layer=2,fraction=0.25
    JSON                     {"schema": 1, "methods": [{"method": "fastv", "layer": 2, "fraction": 0.25}]}

Further strings:

    several methods          divprune:tokens=64 + random:layer=20,fraction=0.1,seed=0
    with redistribution      flowcut:tokens=64 + var:keep=0.5
    several stages           random:layer=8|16,fraction=0.5|0.25

The object is here. `entries` turns a method into its JSON object and back, `text` reads and writes strings, `document` reads
and writes files, and `hub` asks the Hugging Face hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError, shown
from vlmprune.methods import Pruner, Redistributor
from vlmprune.names import FILE
from vlmprune.recipe import document, entries, text
from vlmprune.schedule import Stage, check_shrinks
from vlmprune.view import TowerFacts


@dataclass(frozen=True)
class Recipe:
    """Methods that are applied together.

    Raises:
        UsageError: no method, something else than methods, two methods with a stage at one place, or a later stage that keeps
            more than an earlier one.
    """

    methods: tuple[Pruner | Redistributor, ...]

    def __post_init__(self) -> None:
        if isinstance(self.methods, str | Pruner | Redistributor) or not isinstance(self.methods, Iterable):
            raise UsageError(
                f"a Recipe is made of a tuple of methods, found {shown(self.methods)}: write vlmprune.Recipe.of(…), which also "
                "takes strings."
            )
        object.__setattr__(self, "methods", tuple(self.methods))
        for method in self.methods:
            if not isinstance(method, Pruner | Redistributor):
                raise no_method(method)
        if not self.methods:
            raise UsageError("a recipe needs at least one method, for example 'divprune:fraction=0.25'.")
        names = [method.name for method in self.redistributors]
        if len(set(names)) < len(names):
            twice = max(names, key=names.count)
            raise UsageError(f"{twice} is in the recipe twice: write it once, with all its layers in layers=….")
        self.stages()

    @property
    def pruners(self) -> tuple[Pruner, ...]:
        """The methods that drop tokens."""
        return tuple(method for method in self.methods if isinstance(method, Pruner))

    @property
    def redistributors(self) -> tuple[Redistributor, ...]:
        """The methods that redistribute attention."""
        return tuple(method for method in self.methods if isinstance(method, Redistributor))

    def stages(self, facts: TowerFacts | None = None) -> list[tuple[Stage, Pruner]]:
        """All stages with their methods, in the order in which they run.

        Args:
            facts: traits of the model's vision tower; a method may plan other stages for another tower. None: the stages that
                the recipe itself names.

        Raises:
            UsageError: two methods have a stage at one place, a later stage keeps more than an earlier one, or a method cannot
                work with this tower.
        """
        schedules = [(method.stages if facts is None else method.plan(facts), method) for method in self.pruners]
        pairs = ((stage, method) for schedule, method in schedules for stage in (*schedule, *method.forgets))
        ordered = sorted(pairs, key=lambda pair: pair[0].order)
        shortening = [method.name for method in self.pruners if method.forgets]
        if len(shortening) > 1:
            raise UsageError(
                f"{' and '.join(shortening)} both drop tokens from the cache after prefill: give one of them cache_layer=-1."
            )
        for (before, first), (after, second) in pairwise(ordered):
            if before.order == after.order:
                raise UsageError(
                    f"{first.name} and {second.name} both prune at {after.place}: move one of them to another layer."
                )
            check_shrinks(before, after, crops=facts is not None and facts.crops)
        return ordered

    cuts = stages
    """The former name of `stages`."""

    @staticmethod
    def of(*parts: Recipe | Pruner | Redistributor | str) -> Recipe:
        """Everything that `wrap` accepts, as one recipe.

        Raises:
            UsageError: a part is neither a method, a recipe nor a recipe string.
        """
        methods: list[Pruner | Redistributor] = []
        for part in parts:
            if isinstance(part, str):
                methods += Recipe.parse(part).methods
            elif isinstance(part, Recipe):
                methods += part.methods
            elif isinstance(part, Pruner | Redistributor):
                methods.append(part)
            else:
                raise no_method(part)
        return Recipe(tuple(methods))

    @staticmethod
    def parse(string: str) -> Recipe:
        """Read the string form.

        Raises:
            UsageError: no string, a method or parameter that does not exist (names the nearest), or a value that cannot be
                read.
        """
        if not isinstance(string, str):
            raise UsageError(
                f"Recipe.parse reads a recipe string, for example 'fastv:layer=2,fraction=0.25', found {shown(string)}: "
                "vlmprune.Recipe.of(…) also takes methods, and Recipe.from_dict(…) the JSON form."
            )
        return Recipe(tuple(entries.method_of(entry) for entry in text.read(string)))

    def __str__(self) -> str:
        return " + ".join(text.write(method) for method in self.methods)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form.

        Raises:
            UsageError: a file cannot hold it: a parameter is an object, or the name of a method is that of another one.
        """
        return document.write(self.methods)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """Read the JSON form.

        Raises:
            UsageError: a newer schema, unknown keys, or anything that `parse` refuses.
        """
        return Recipe(tuple(entries.method_of(entry) for entry in document.read(data)))

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write `vlmprune.json` into a folder, for example beside the files of a model."""
        path = Path(directory) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    @staticmethod
    def from_pretrained(source: str | Path) -> Recipe:
        """Read a recipe from a JSON file, a folder with `vlmprune.json`, or a repository on the Hugging Face hub.

        Raises:
            UsageError: there is no such file, folder or repository, it is not JSON, or `from_dict` refuses it.
        """
        return Recipe.from_dict(document.load(source))


def no_method(found: Any) -> UsageError:
    """The error for what was passed instead of a method: what it is, and what to pass."""
    what, kind = shown(found), type(found).__name__
    instead = "for example vlmprune.FastV(layer=2)"
    if isinstance(found, type) and issubclass(found, Pruner | Redistributor):
        what = f"the class {found.__name__}"
        if not hasattr(found, "name"):
            instead = f"a method is an instance of a class derived from it, {instead}"
        elif issubclass(found, Pruner) and not hasattr(found, "default"):
            instead = (
                "give the class a default, for example default = vlmprune.at(layer=2, fraction=0.5), and pass an instance, "
                f"{found.__name__}()"
            )
        else:
            instead = f"pass an instance, {found.__name__}()"
    elif isinstance(found, Mapping):
        what, instead = f"a {kind}", "read it with vlmprune.Recipe.from_dict(…)"
    elif isinstance(found, list | tuple | set | frozenset):
        what, instead = f"a {kind} of {len(found)}", "pass its items one by one, vlmprune.wrap(model, *methods)"
    elif hasattr(found, "__fspath__"):
        instead = "read it with vlmprune.Recipe.from_pretrained(…)"
    elif hasattr(found, "named_parameters"):
        what, instead = f"a model ({kind})", "wrap takes one model, and then methods"
    return UsageError(f"expected a method, a recipe or a recipe string, found {what}: {instead}.")
