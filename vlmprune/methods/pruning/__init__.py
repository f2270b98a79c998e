"""One file per paper."""

from vlmprune.methods.pruning.cls import CLS
from vlmprune.methods.pruning.divprune import DivPrune
from vlmprune.methods.pruning.fastv import FastV
from vlmprune.methods.pruning.random import Random

__all__ = ["CLS", "DivPrune", "FastV", "Random"]
