"""One method in detail, as data for `vlmprune methods NAME`."""

from __future__ import annotations

import re
from dataclasses import MISSING, replace
from inspect import cleandoc, formatannotation, signature
from typing import Any

from vlmprune import names
from vlmprune.methods import METHODS, REDISTRIBUTORS, Pruner
from vlmprune.methods.parameters import limits_of
from vlmprune.recipe import Recipe
from vlmprune.recipe.entries import entry_of
from vlmprune.schedule import Schedule, scaled_layer
from vlmprune.tiny.architecture import TEXT_LAYERS

LAYERS = "as 2:-1 or 1|18:"
WORDS = tuple((name, "text") for name in ("Literal", "Positions", "Per", "Site", "str"))
KINDS = (*WORDS, ("int", "whole number"), ("float", "number"))
"""Types in words: the first whose key is in the annotation."""
PYTHON = "object, in Python only"
"""The type of parameters that no recipe string or file can hold."""
EXAMPLES: dict[str, tuple[str, Any]] = {
    "pixelprune": ("tolerance", 0.5),
    "var": ("sink_dims", "cosine"),
    "zerotuning": ("gain", 2),
}
"""A parameter for the example of methods whose defaults need a model with known sinks, or change nothing."""


def describe(name: str) -> dict[str, Any]:
    """A method's paper, its parameters with type, range, default and meaning, its presets, and an example of a recipe.

    Raises:
        UsageError: there is no such method; names the nearest.
    """
    names.check_method(name)
    method: Any = {**METHODS, **REDISTRIBUTORS}[name]
    meanings = {key: text for base in reversed(method.__mro__) for key, text in _arguments(base.__doc__ or "").items()}
    default = method()
    own = [
        {
            "parameter": parameter,
            "type": _kind(formatannotation(given.annotation)),
            "allowed": _allowed(method, parameter),
            "default": _default(default, parameter, given.default),
            "meaning": meanings.get(parameter, ""),
        }
        for parameter, given in signature(method.__init__).parameters.items()
        if parameter != "self"
    ]
    own.sort(key=lambda row: row["type"] == PYTHON)  # last, because a recipe string cannot hold them
    return {
        "method": name,
        "paper": method.paper,
        "what": cleandoc(method.__doc__ or "").splitlines()[0],
        "where it differs": method.note,
        "parameters": own,
        "presets": list(method.presets),
        "example": _example(default),
    }


def _arguments(doc: str) -> dict[str, str]:
    """The entries in the section `Args:` of a docstring, by the parameter's name."""
    _, _, section = cleandoc(doc).partition("Args:\n")
    entries: dict[str, str] = {}
    keys: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if found := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            keys = found[1].split(", ")
            entries |= dict.fromkeys(keys, found[2])
        elif line.strip():
            for key in keys:
                entries[key] += " " + line.strip()
    return entries


def _kind(annotation: str) -> str:
    return next((kind for part, kind in KINDS if part in annotation), PYTHON)


def _allowed(method: Any, parameter: str) -> str:
    if parameter == "preset":
        return ", ".join(method.presets) or "no presets"
    if parameter == "layers":
        return LAYERS
    if parameter == "layer":
        return f"≥ {method.first_layer}, several as 8|16"
    return str(limits_of(method, parameter) or "")


def _default(method: Any, parameter: str, given: Any) -> str:
    if isinstance(method, Pruner) and parameter in ("layer", "tokens", "fraction"):  # a schedule has all three
        stages = method.stages
        if parameter == "layer":
            return "|".join("in the tower" if stage.site == "vision" else str(stage.layer) for stage in stages)
        budgets = [getattr(stage.budget, parameter) for stage in stages]
        return "" if None in budgets else "|".join(f"{budget:g}" for budget in budgets)
    if parameter == "layers":
        return str(method.default_layers)
    return "" if given is None or given is MISSING else str(given)


def _example(method: Any) -> str:
    """A recipe with the method's defaults that runs on the embedded model, as in the printed command."""
    if isinstance(method, Pruner) and method.name not in EXAMPLES:
        return str(Recipe((_on_embedded_model(method),)))
    own = {key: value for key, value in entry_of(method).items() if key not in ("method", "layers")}
    key, value = EXAMPLES.get(method.name) or next(iter(own.items()))
    return f"{method.name}:{key}={value}"


def _on_embedded_model(method: Pruner) -> Pruner:
    """The method; with its layers scaled to the embedded model, if that has fewer layers."""
    stages = method.stages
    if max(stage.layer for stage in stages) < TEXT_LAYERS:
        return method
    return type(method)(
        schedule=Schedule(tuple(replace(stage, layer=scaled_layer(stage.layer, TEXT_LAYERS)) for stage in stages))
    )
