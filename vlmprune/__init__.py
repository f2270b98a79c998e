"""vlmprune: cheaper and more truthful vision-language models, without training.

    with vlmprune.wrap(model, "divprune:fraction=0.25") as run:
        model.generate(**inputs)
    print(run.report())

Importing has no side effect; torch and transformers are loaded when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmprune.attach import Run, wrap
    from vlmprune.errors import UsageError
    from vlmprune.methods import METHODS, Pruner, ScorePruner
    from vlmprune.methods.pruning import CLS, AdaptInfer, DivPrune, FastV, PDrop, Random, Uniform
    from vlmprune.recipe import Recipe
    from vlmprune.run import Report
    from vlmprune.schedule import Schedule, at, stages

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(("CLS", "AdaptInfer", "DivPrune", "FastV", "PDrop", "Random", "Uniform"), "vlmprune.methods.pruning"),
    **dict.fromkeys(("METHODS", "Pruner", "ScorePruner"), "vlmprune.methods"),
    **dict.fromkeys(("Schedule", "at", "stages"), "vlmprune.schedule"),
    **dict.fromkeys(("Run", "wrap"), "vlmprune.attach"),
    "Recipe": "vlmprune.recipe",
    "Report": "vlmprune.run",
    "UsageError": "vlmprune.errors",
}

__all__ = [
    "CLS",
    "METHODS",
    "AdaptInfer",
    "DivPrune",
    "FastV",
    "PDrop",
    "Pruner",
    "Random",
    "Recipe",
    "Report",
    "Run",
    "Schedule",
    "ScorePruner",
    "Uniform",
    "UsageError",
    "at",
    "stages",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vlmprune' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
