"""vlmprune: cheaper and more truthful vision-language models, without training.

    with vlmprune.wrap(model, "divprune:fraction=0.25") as run:
        model.generate(**inputs)
    print(run.report())

Importing has no side effect; torch and transformers are loaded when a name is first used.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the only list of the public names: type checkers and editors read it, and so does `exports`
    from vlmprune.errors import UsageError as UsageError
    from vlmprune.live.check import Verdict as Verdict
    from vlmprune.live.check import check as check
    from vlmprune.live.handle import Run as Run
    from vlmprune.live.handle import unwrap as unwrap
    from vlmprune.live.handle import wrap as wrap
    from vlmprune.live.image_tower_report import TowerReport as TowerReport
    from vlmprune.live.image_tower_run import TowerRun as TowerRun
    from vlmprune.live.observe import observe as observe
    from vlmprune.live.prefix import Prefix as Prefix
    from vlmprune.live.report import Report as Report
    from vlmprune.methods import METHODS as METHODS
    from vlmprune.methods import REDISTRIBUTORS as REDISTRIBUTORS
    from vlmprune.methods import Choice as Choice
    from vlmprune.methods import Pruner as Pruner
    from vlmprune.methods import Redistributor as Redistributor
    from vlmprune.methods import ScorePruner as ScorePruner
    from vlmprune.methods.clip_relevance import ClipRelevance as ClipRelevance
    from vlmprune.methods.pruning import *  # noqa: F403
    from vlmprune.methods.redistribution import *  # noqa: F403
    from vlmprune.recipe import Recipe as Recipe
    from vlmprune.schedule import Budget as Budget
    from vlmprune.schedule import Schedule as Schedule
    from vlmprune.schedule import Stage as Stage
    from vlmprune.schedule import at as at
    from vlmprune.schedule import stages as stages
else:

    @cache
    def _home() -> dict[str, str]:
        # Imported at first use: until then this package imports nothing of its own, so that `__main__` runs first and handles
        # Ctrl-C.
        from vlmprune.names import exports

        return exports("vlmprune")  # the module of each public name

    def __getattr__(name: str) -> Any:
        if name == "__all__":
            return sorted(_home())
        if name not in _home():
            raise AttributeError(f"module 'vlmprune' has no attribute {name!r}")
        return getattr(import_module(_home()[name]), name)

    def __dir__() -> list[str]:
        return sorted([*globals(), "__all__", *_home()])
