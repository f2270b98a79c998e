"""One file per paper."""

from vlmprune.methods.pruning.adaptinfer import AdaptInfer
from vlmprune.methods.pruning.cdpruner import CDPruner
from vlmprune.methods.pruning.cls import CLS
from vlmprune.methods.pruning.dart import DART
from vlmprune.methods.pruning.divprune import DivPrune
from vlmprune.methods.pruning.fastv import FastV
from vlmprune.methods.pruning.flowcut import FlowCut
from vlmprune.methods.pruning.holov import HoloV
from vlmprune.methods.pruning.mustdrop import MustDrop
from vlmprune.methods.pruning.pdrop import PDrop
from vlmprune.methods.pruning.random import Random
from vlmprune.methods.pruning.sparsevlm import SparseVLM
from vlmprune.methods.pruning.tome import ToMe
from vlmprune.methods.pruning.uniform import Uniform
from vlmprune.methods.pruning.visionzip import VisionZip
from vlmprune.methods.pruning.vscan import VScan

__all__ = [
    "CLS",
    "DART",
    "AdaptInfer",
    "CDPruner",
    "DivPrune",
    "FastV",
    "FlowCut",
    "HoloV",
    "MustDrop",
    "PDrop",
    "Random",
    "SparseVLM",
    "ToMe",
    "Uniform",
    "VScan",
    "VisionZip",
]
