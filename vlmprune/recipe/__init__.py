"""A recipe: methods that prune, in the order of their cuts, and methods that redistribute attention.

As Python, as a string, or as a JSON file. All three mean the same.

string   name:key=value,key=value + name:…        fastv:layer=2,fraction=0.25
                                                  divprune:tokens=64 + random:layer=20,fraction=0.1,seed=0
                                                  flowcut:tokens=64 + var:p=0.6
         several cuts of one method               random:layer=8|16,fraction=0.5|0.25
JSON     {"schema": 1, "methods": [{"method": "fastv", "layer": 2, "fraction": 0.25}]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError, unknown
from vlmprune.methods import METHODS, REDISTRIBUTORS, Pruner, Redistributor
from vlmprune.methods.base import DEFINED
from vlmprune.methods.redistributing import DEFINED as DEFINED_REDISTRIBUTORS
from vlmprune.names import FILE, check_not_empty, check_number, read_part
from vlmprune.recipe import hub
from vlmprune.schedule import SITES, Budget, Schedule, Stage, check_shrinks
from vlmprune.view import TowerFacts

SCHEMA = 1
CUT_KEYS = ("layer", "tokens", "fraction", "preset", "site")


@dataclass(frozen=True)
class Recipe:
    """Methods applied together.

    Raises:
        UsageError: no method, two methods cutting at one layer, or a later cut that keeps more than an earlier one.
    """

    methods: tuple[Pruner | Redistributor, ...]

    def __post_init__(self) -> None:
        if not self.methods:
            raise UsageError("a recipe needs at least one method, for example 'divprune:fraction=0.25'.")
        names = [method.name for method in self.redistributors]
        if len(set(names)) < len(names):
            raise UsageError(f"{max(names, key=names.count)} stands twice in the recipe: name all its layers in one, layers=….")
        self.cuts()

    @property
    def pruners(self) -> tuple[Pruner, ...]:
        """The methods that drop tokens."""
        return tuple(method for method in self.methods if isinstance(method, Pruner))

    @property
    def redistributors(self) -> tuple[Redistributor, ...]:
        """The methods that redistribute attention."""
        return tuple(method for method in self.methods if isinstance(method, Redistributor))

    def cuts(self, facts: TowerFacts | None = None) -> list[tuple[Stage, Pruner]]:
        """All stages with their methods, in the order in which they run.

        Args:
            facts: what is known of the model; a method may plan other stages for another vision tower.

        Raises:
            UsageError: two methods cut at one place, a later cut keeps more than an earlier one, or a method cannot work.
        """
        plans = [(method.stages if facts is None else method.plan(facts), method) for method in self.pruners]
        staged = ((stage, method) for plan, method in plans for stage in (*plan, *method.forgets))
        cuts = sorted(staged, key=lambda cut: cut[0].order)
        forgetful = [method.name for method in self.pruners if method.forgets]
        if len(forgetful) > 1:
            raise UsageError(f"{' and '.join(forgetful)} both cut the cache after prefill: give one of them cache_layer=-1.")
        for (before, first), (after, second) in pairwise(cuts):
            if before.order == after.order:
                raise UsageError(
                    f"{first.name} and {second.name} both cut at {after.place}: move one of them to another layer."
                )
            check_shrinks(before, after, views=facts is not None and facts.crops)
        return cuts

    @staticmethod
    def of(*parts: Recipe | Pruner | Redistributor | str) -> Recipe:
        """Anything `wrap` accepts, as one recipe.

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
                raise UsageError(
                    f"expected a method, a recipe or a recipe string, found {part!r}; for example vlmprune.FastV(layer=2)."
                )
        return Recipe(tuple(methods))

    @staticmethod
    def parse(text: str) -> Recipe:
        """Read the string form.

        Raises:
            UsageError: an unknown method or key (with the nearest names), or a value that cannot be read.
        """
        check_not_empty(text)
        return Recipe(tuple(_parse_method(part.strip()) for part in text.split("+")))

    def __str__(self) -> str:
        return " + ".join(_method_string(method) for method in self.methods)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form.

        Raises:
            UsageError: a parameter is an object that a file cannot hold.
        """
        for method in self.methods:
            if _method_class(method.name) is not type(method):
                raise UsageError(
                    f"a recipe file names its methods, and {method.name!r} is the name of another method than of "
                    f"{type(method).__name__}: give the class a name of its own."
                )
            for key, value in _own(method).items():
                if not isinstance(value, int | float | str):
                    raise UsageError(f"a recipe file cannot hold {key} of {method.name}, found {value!r}: set it in Python.")
        return {"schema": SCHEMA, "methods": [_method_dict(method) for method in self.methods]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """Read the JSON form.

        Raises:
            UsageError: a newer schema, unknown keys, or anything `parse` refuses.
        """
        if not isinstance(data, Mapping) or "methods" not in data or "schema" not in data:
            raise UsageError('a recipe file holds {"schema": 1, "methods": […]}: a key is missing.')
        for key in data:
            if key not in ("schema", "methods"):
                raise unknown("key in a recipe file", key, ("schema", "methods"))
        if type(data["schema"]) is not int or not 1 <= data["schema"] <= SCHEMA:
            raise UsageError(
                f"the recipe has schema {data['schema']!r}, this vlmprune reads up to {SCHEMA}: upgrade vlmprune, or save the "
                "recipe with the older version."
            )
        if not isinstance(data["methods"], list) or not all(isinstance(entry, Mapping) for entry in data["methods"]):
            raise UsageError(f'"methods" must be a list of objects, found {data["methods"]!r}.')
        return Recipe(tuple(_build(dict(entry)) for entry in data["methods"]))

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write `vlmprune.json` into a directory (beside a model's own files, for example)."""
        path = Path(directory) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    @staticmethod
    def from_pretrained(source: str | Path) -> Recipe:
        """Read a recipe from a JSON file, a directory with `vlmprune.json`, or a repository on the Hugging Face hub.

        Raises:
            UsageError: nothing is there, it is no JSON, or `from_dict` refuses it.
        """
        path = Path(source)
        if path.is_dir():
            path = path / FILE
        if path.suffix == ".json" and not path.is_file() and not Path(source).is_dir():
            raise UsageError(f"no recipe at {str(source)!r}: there is no such file.")
        if not path.is_file():
            path = _from_hub(str(source))
        try:
            data = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not a JSON file ({error}).") from error
        return Recipe.from_dict(data)


def _from_hub(name: str) -> Path:
    repository = hub.ask(name, FILE, "recipe")
    if FILE not in repository.files:
        raise UsageError(f"no recipe at {name!r}: the repository has no {FILE}; save one there, or give a folder.")
    from transformers.utils import cached_file

    return Path(str(cached_file(name, FILE, **repository.options)))


def _parse_method(text: str) -> Pruner | Redistributor:
    name, pairs = read_part(text)
    entry: dict[str, Any] = {"method": name}
    for key, pieces in pairs.items():
        values = [_value(piece, key) for piece in pieces]
        entry[key] = values[0] if len(values) == 1 else values
    return _build(entry)


def _value(text: str, key: str) -> int | float | str | bool:
    check_number(key, text)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(text, text)


def _build(entry: dict[str, Any]) -> Pruner | Redistributor:
    """A method from its JSON form."""
    name = entry.pop("method", None)
    method = _method_class(name)
    if issubclass(method, Redistributor):
        return _build_redistributor(method, entry)
    own = [field.name for field in fields(method) if field.name != "schedule"]
    for key in entry:
        if key not in (*CUT_KEYS, *own):
            raise unknown(f"parameter of {name}", key, (*(known for known in CUT_KEYS if known != "site"), *own))
    cut = {key: entry.pop(key) for key in CUT_KEYS if key in entry}
    for key, value in entry.items():
        if isinstance(value, list):
            raise UsageError(f"{name}: {key} takes one value, found {value}.")
    if "site" in cut or any(isinstance(value, list) for value in cut.values()):
        return method(schedule=_schedule(name, cut), **entry)
    return method(**cut, **entry)


def _method_class(name: Any) -> type[Pruner] | type[Redistributor]:
    """The method of that name: one of ours, else one that this process has defined. Nothing is imported by what a file says.

    Raises:
        UsageError: there is none.
    """
    found = [known[name] for known in (METHODS, REDISTRIBUTORS, DEFINED, DEFINED_REDISTRIBUTORS) if str(name) in known]
    if not found:
        known = dict.fromkeys((*METHODS, *REDISTRIBUTORS, *DEFINED, *DEFINED_REDISTRIBUTORS))
        raise UsageError(
            f"{unknown('method', str(name), known)} A method of your own must be imported before its recipe is read."
        )
    return found[0]


def _build_redistributor(method: type[Redistributor], entry: dict[str, Any]) -> Redistributor:
    name = method.name
    known = list(signature(method.__init__).parameters)[1:]
    for key, value in entry.items():
        if key not in known:
            raise unknown(f"parameter of {name}", key, known)
        if isinstance(value, list) and key not in ("layers", "sink_dims"):
            raise UsageError(f"{name}: {key} takes one value, found {value}.")
    return method(**entry)


def _schedule(name: str, cut: dict[str, Any]) -> Schedule:
    """Several cuts: every key given as a list of one length."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in cut.items()}
    units = set(cut) - {"layer", "site"}
    alike = len({(type(cut[key]) is list, len(values)) for key, values in lists.items()}) == 1
    if not alike or "layer" not in cut or len(units) != 1 or "preset" in units:
        raise UsageError(
            f"{name}: several cuts need as many layers as budgets, for example layer=8|16,fraction=0.5|0.25; found "
            + ", ".join(f"{key}={value}" for key, value in cut.items())
            + "."
        )
    (unit,) = units
    sites = lists.get("site", ["llm"] * len(lists["layer"]))
    for site in sites:
        if site not in SITES:
            raise unknown("site", str(site), SITES)
    cuts = zip(lists["layer"], lists[unit], sites, strict=True)
    return Schedule(tuple(Stage(layer, Budget(**{unit: value}), site) for layer, value, site in cuts))


def _method_dict(method: Pruner | Redistributor) -> dict[str, Any]:
    if isinstance(method, Redistributor):
        return {"method": method.name} | _own(method)
    stages = method.stages
    unit = "tokens" if stages[0].budget.tokens is not None else "fraction"
    layers, budgets = [stage.layer for stage in stages], [getattr(stage.budget, unit) for stage in stages]
    if None in budgets:
        raise UsageError(f"{method.name}: a recipe file cannot mix tokens and fraction in one method's schedule.")
    entry: dict[str, Any] = {"method": method.name}
    if len(stages) > 1:
        entry |= {"layer": layers, unit: budgets}
    elif stages[0].site == "llm":
        entry |= {"layer": layers[0], unit: budgets[0]}
    else:  # the method's own place
        entry[unit] = budgets[0]
    if len(stages) > 1 and any(stage.site != "llm" for stage in stages):
        entry["site"] = [stage.site for stage in stages]
    return entry | _own(method)


def _own(method: Pruner | Redistributor) -> dict[str, Any]:
    """The fields that say neither when nor how many. A file holds the defaults too, lest they change."""
    own = {field.name: getattr(method, field.name) for field in fields(method) if field.name != "schedule"}
    return {key: value for key, value in own.items() if value is not None}


def _changed(method: Pruner | Redistributor) -> dict[str, Any]:
    """Those of them that are not the default, for people."""
    defaults = {field.name: field.default for field in fields(method)}
    return {key: value for key, value in _own(method).items() if value != defaults[key]}


def _method_string(method: Pruner | Redistributor) -> str:
    budgets = [stage.budget for stage in method.stages] if isinstance(method, Pruner) else []
    if isinstance(method, Pruner) and len({budget.tokens is None for budget in budgets}) > 1:  # has no string form; for people
        kept = "|".join(f"{b.fraction:g}" if b.tokens is None else str(b.tokens) for b in budgets)
        return f"{method.name}:layer={'|'.join(str(stage.layer) for stage in method.stages)},kept={kept}"
    entry = _method_dict(method)
    values = {key: value for key, value in entry.items() if key in CUT_KEYS} | _changed(method)
    shown = {key: "|".join(map(str, value)) if isinstance(value, list) else value for key, value in values.items()}
    return f"{method.name}:{','.join(f'{key}={value}' for key, value in shown.items())}".rstrip(":")
