"""One file per paper."""

from vlmprune.methods.pruning.adaptinfer import AdaptInfer
from vlmprune.methods.pruning.cls import CLS
from vlmprune.methods.pruning.divprune import DivPrune
from vlmprune.methods.pruning.fastv import FastV
from vlmprune.methods.pruning.pdrop import PDrop
from vlmprune.methods.pruning.random import Random
from vlmprune.methods.pruning.uniform import Uniform

__all__ = ["CLS", "AdaptInfer", "DivPrune", "FastV", "PDrop", "Random", "Uniform"]
