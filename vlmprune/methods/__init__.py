"""All methods by their names in recipes."""

from __future__ import annotations

from vlmprune.methods import pruning
from vlmprune.methods.base import Choice, Pruner, ScorePruner

METHODS: dict[str, type[Pruner]] = {
    method.name: method for method in (getattr(pruning, exported) for exported in pruning.__all__)
}

__all__ = ["METHODS", "Choice", "Pruner", "ScorePruner"]
