"""All methods by their names in recipes."""

from __future__ import annotations

from vlmprune.methods import pruning, redistribution
from vlmprune.methods.base import Choice, Pruner, ScorePruner
from vlmprune.methods.redistributing import Redistributor

METHODS: dict[str, type[Pruner]] = {
    method.name: method for method in (getattr(pruning, exported) for exported in pruning.__all__)
}
REDISTRIBUTORS: dict[str, type[Redistributor]] = {
    method.name: method for method in (getattr(redistribution, exported) for exported in redistribution.__all__)
}

__all__ = ["METHODS", "REDISTRIBUTORS", "Choice", "Pruner", "Redistributor", "ScorePruner"]
