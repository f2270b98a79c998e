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
    from vlmprune.errors import UsageError
    from vlmprune.live.handle import Run, unwrap, wrap
    from vlmprune.live.observe import observe
    from vlmprune.live.report import Report
    from vlmprune.methods import METHODS, REDISTRIBUTORS, Choice, Pruner, Redistributor, ScorePruner
    from vlmprune.methods.clip_relevance import ClipRelevance
    from vlmprune.methods.pruning import (
        CLS,
        DART,
        AdaptInfer,
        CDPruner,
        DivPrune,
        FastV,
        FlowCut,
        HoloV,
        MustDrop,
        PDrop,
        Random,
        SparseVLM,
        ToMe,
        Uniform,
        VisionZip,
        VScan,
    )
    from vlmprune.methods.redistribution import ACT, PAI, PAINT, VAR, VHR, ZeroTuning
    from vlmprune.recipe import Recipe
    from vlmprune.schedule import Budget, Schedule, Stage, at, stages

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(
        (
            "AdaptInfer",
            "CDPruner",
            "CLS",
            "DART",
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
        ),
        "vlmprune.methods.pruning",
    ),
    "ClipRelevance": "vlmprune.methods.clip_relevance",
    **dict.fromkeys(("ACT", "PAI", "PAINT", "VAR", "VHR", "ZeroTuning"), "vlmprune.methods.redistribution"),
    **dict.fromkeys(("METHODS", "REDISTRIBUTORS", "Choice", "Pruner", "Redistributor", "ScorePruner"), "vlmprune.methods"),
    **dict.fromkeys(("Budget", "Schedule", "Stage", "at", "stages"), "vlmprune.schedule"),
    **dict.fromkeys(("Run", "unwrap", "wrap"), "vlmprune.live.handle"),
    "Recipe": "vlmprune.recipe",
    "Report": "vlmprune.live.report",
    "observe": "vlmprune.live.observe",
    "UsageError": "vlmprune.errors",
}

__all__ = [
    "ACT",
    "CLS",
    "DART",
    "METHODS",
    "PAI",
    "PAINT",
    "REDISTRIBUTORS",
    "VAR",
    "VHR",
    "AdaptInfer",
    "Budget",
    "CDPruner",
    "Choice",
    "ClipRelevance",
    "DivPrune",
    "FastV",
    "FlowCut",
    "HoloV",
    "MustDrop",
    "PDrop",
    "Pruner",
    "Random",
    "Recipe",
    "Redistributor",
    "Report",
    "Run",
    "Schedule",
    "ScorePruner",
    "SparseVLM",
    "Stage",
    "ToMe",
    "Uniform",
    "UsageError",
    "VScan",
    "VisionZip",
    "ZeroTuning",
    "at",
    "observe",
    "stages",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vlmprune' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
