"""A method as its JSON object in a recipe file, and back.

    FastV(layer=2, fraction=0.25)  <->  {"method": "fastv", "layer": 2, "fraction": 0.25, "positions": "original", …}

A file holds every parameter, also those that have their default: another version may have other defaults. A parameter that
earlier versions do not know is left out where it means what they do (`ADDED`), so that they can read the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import signature
from typing import Any

from vlmprune.errors import UsageError, shown, unknown
from vlmprune.methods import METHODS, REDISTRIBUTORS, Pruner, Redistributor
from vlmprune.methods.base import DEFINED
from vlmprune.methods.redistributing import DEFINED as DEFINED_REDISTRIBUTORS
from vlmprune.schedule import SITES, Budget, Schedule, Site, Stage

STAGE_KEYS = ("layer", "tokens", "fraction", "preset", "site")
"""Parameters of every pruning method that say where it prunes and how much it keeps."""
WITH_LISTS = ("layers", "sink_dims", "blocks")
"""Parameters of methods that take a list, beside those of stages."""

ADDED = {"per": "video"}
"""Parameters of every pruning method that files of the first release do not have, and what such a file means."""


def class_named(name: Any) -> type[Pruner] | type[Redistributor]:
    """The method of a name: one of the library, or one that this process has defined. A file never makes us import anything.

    Raises:
        UsageError: there is none.
    """
    registries = (METHODS, REDISTRIBUTORS, DEFINED, DEFINED_REDISTRIBUTORS)
    for registry in registries:
        if str(name) in registry:
            return registry[str(name)]
    known = dict.fromkeys(name for registry in registries for name in registry)
    raise UsageError(f"{unknown('method', str(name), known)} A method of your own must be imported before its recipe is read.")


# -- reading ---------------------------------------------------------------------------------------------------------------


def method_of(entry: Mapping[str, Any]) -> Pruner | Redistributor:
    """The method of a JSON object.

    Raises:
        UsageError: an unknown method or parameter (names the nearest), or a value that the method refuses.
    """
    given = dict(entry)
    method = class_named(given.pop("method", None))
    return _redistributor(method, given) if issubclass(method, Redistributor) else _pruner(method, given)


def _redistributor(method: type[Redistributor], given: dict[str, Any]) -> Redistributor:
    known = list(signature(method.__init__).parameters)[1:]
    _check_keys(method.name, given, known)
    _check_single(method.name, {key: value for key, value in given.items() if key not in WITH_LISTS})
    return method(**given)


def _pruner(method: type[Pruner], given: dict[str, Any]) -> Pruner:
    own = [field.name for field in fields(method) if field.name != "schedule"]
    _check_keys(method.name, given, [*STAGE_KEYS, *own])
    stage = {key: given.pop(key) for key in STAGE_KEYS if key in given}
    _check_single(method.name, {key: value for key, value in given.items() if key not in WITH_LISTS})
    if any(isinstance(value, list) for value in stage.values()):
        return method(schedule=_schedule(method.name, stage), **given)
    return method(**stage, **given)


def _check_keys(name: str, given: Mapping[str, Any], known: list[str]) -> None:
    for key in given:
        if key not in known:
            raise unknown(f"parameter of {name}", key, known)


def _check_single(name: str, given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if isinstance(value, list):
            raise UsageError(f"{name}: {key} takes one value, found {shown(value)}.")


def _schedule(name: str, given: dict[str, Any]) -> Schedule:
    """Several stages: a list of layers, and a list of budgets of the same length."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
    units = set(given) - {"layer", "site"}
    alike = len({(type(given[key]) is list, len(values)) for key, values in lists.items()}) == 1
    if not alike or "layer" not in given or len(units) != 1 or "preset" in units:
        raise UsageError(
            f"{name}: several stages need as many layers as budgets, for example layer=8|16,fraction=0.5|0.25; found "
            + ", ".join(f"{key}={value}" for key, value in given.items())
            + "."
        )
    (unit,) = units
    sites = lists.get("site", ["llm"] * len(lists["layer"]))
    for site in sites:
        if site not in SITES:
            raise unknown("site", str(site), SITES)
    rows = zip(lists["layer"], lists[unit], sites, strict=True)
    return Schedule(tuple(Stage(layer, Budget(**{unit: value}), site) for layer, value, site in rows))


# -- writing ---------------------------------------------------------------------------------------------------------------


def entry_of(method: Pruner | Redistributor) -> dict[str, Any]:
    """The JSON object of a method: its name, its stages, and its other parameters where they have a value.

    A schedule with both units has no JSON form; its budgets are then under "kept", for people.
    """
    own = {field.name: getattr(method, field.name) for field in fields(method) if field.name != "schedule"}
    stages = _stages(method.stages, method.default.stages[0].site) if isinstance(method, Pruner) else {}
    written = {key: value for key, value in own.items() if value is not None and ADDED.get(key) != value}
    return {"method": method.name} | stages | written


def _stages(schedule: Sequence[Stage], own: Site) -> dict[str, Any]:
    """Stages as lists, or as single values. `own` is the site that the method has by default."""
    layers = [stage.layer for stage in schedule]
    budgets = [stage.budget for stage in schedule]
    tokens, fractions = [budget.tokens for budget in budgets], [budget.fraction for budget in budgets]
    if None in tokens and None in fractions:
        return {"layer": layers, "kept": [f"{b.fraction:g}" if b.tokens is None else b.tokens for b in budgets]}
    unit, kept = ("fraction", fractions) if None in tokens else ("tokens", tokens)
    sites = [stage.site for stage in schedule]
    if len(layers) > 1:
        return {"layer": layers, unit: kept} | ({"site": sites} if set(sites) != {"llm"} else {})
    layer = {"layer": layers[0]} if sites == ["llm"] else {}  # in or before the tower there is one place
    return layer | {unit: kept[0]} | ({} if sites[0] in (own, "llm") else {"site": sites[0]})
