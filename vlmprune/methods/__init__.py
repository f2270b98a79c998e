"""All methods by their names in recipes: what `pruning` and `redistribution` export."""

from __future__ import annotations

from vlmprune.methods import pruning, redistribution
from vlmprune.methods.base import Choice, Pruner, ScorePruner
from vlmprune.methods.redistributing import Redistributor

METHODS: dict[str, type[Pruner]] = {
    found.name: found for found in vars(pruning).values() if isinstance(found, type) and issubclass(found, Pruner)
}
REDISTRIBUTORS: dict[str, type[Redistributor]] = {
    found.name: found for found in vars(redistribution).values() if isinstance(found, type) and issubclass(found, Redistributor)
}

__all__ = ["METHODS", "REDISTRIBUTORS", "Choice", "Pruner", "Redistributor", "ScorePruner"]
