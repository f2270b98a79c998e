"""The command that compares all pruning methods at equal compute: `vlmprune sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmprune import names
from vlmprune.cli import options, terminal
from vlmprune.cli.data import Data
from vlmprune.cli.results import check_intervals, prepare, publish
from vlmprune.errors import UsageError
from vlmprune.loading.environment import quiet

if TYPE_CHECKING:
    from vlmprune.evals.shards import Shard

SCENES = 100
"""Scenes for each seed."""
STORE = "sweep-answers"
"""Folder of the store, in that of the results."""


def sweep(
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A pruning method; may be repeated. If not given: all.")
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the visual tokens that enter a decoder layer, on average over layers; may be repeated. If not "
            "given: 0.5, 0.35, 0.25, 0.15 and 0.1.",
        ),
    ] = None,
    model: options.Model = "tiny",
    data: options.Data = None,
    seeds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of repetitions with other draws of methods that draw; on scenes, each with other scenes, too. With "
            "--data, each asks the same questions.",
        ),
    ] = 3,
    images: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="How many scenes for each seed (100 if not given), or how many questions of --data at most.",
        ),
    ] = None,
    split: options.DataSplit = None,
    scorer: options.Scorer = None,
    column: options.Columns = None,
    skip_bad: options.SkipBad = False,
    batch: options.BatchSize = None,
    max_new_tokens: options.Longest = None,
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also write numbers, tables, figure and answers here; an interrupted sweep continues from this folder, and "
            "several processes share it (docs/evaluation.md).",
        ),
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute the tables in --out again from the answers there; ask nothing.")
    ] = False,
    wait: options.Wait = 30,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads. If not given: torch decides.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare all pruning methods at equal compute, each with random tokens as its control.

    On the embedded model, or on --model with your questions (--data).
    """
    from vlmprune.evals.shards import shard_of

    for name in method or ():
        names.check_pruning(name, "sweep")
    own = images or (SCENES if data is None else None)
    asked = Data(data, own, split, scorer, column or (), skip_bad, max_new_tokens)
    asked.check(model)
    shard = shard_of()
    if out is None and (shard.count > 1 or recompute):
        raise UsageError(
            "give --out FOLDER: " + ("it holds the answers." if recompute else "the processes share their answers in it.")
        )
    check_intervals()
    prepare(out)
    quiet()
    if recompute and out is not None:
        publish(_again(out), "sweep", out, as_json)
        return
    if threads:
        import torch

        torch.set_num_threads(threads)
    from vlmprune.evals import sweep_report
    from vlmprune.evals.accuracy import SCENES_AT_ONCE
    from vlmprune.evals.asking import BATCH_SIZE

    size = batch or (SCENES_AT_ONCE if data is None else BATCH_SIZE)
    numbers = _run(model, asked, seeds, method, budget, size, shard, shard.device(device), device_map, out, wait)
    if numbers is not None:
        publish(sweep_report.result(numbers), "sweep", out, as_json)


def _run(
    model: str,
    data: Data,
    seeds: int,
    methods: list[str] | None,
    budgets: list[float] | None,
    size: int,
    shard: Shard,
    device: str,
    device_map: str | None,
    out: Path | None,
    wait: float,
) -> dict[str, Any] | None:
    """Ask what has no answer yet. Returns the numbers, or None for another rank than 0."""
    from vlmprune.evals import sweep as evals
    from vlmprune.evals.answering import answer, settings_of
    from vlmprune.evals.asking import Asking
    from vlmprune.evals.budgets import SHARES
    from vlmprune.evals.fingerprints import code_fingerprint
    from vlmprune.evals.results import stamp
    from vlmprune.evals.store import Store
    from vlmprune.evals.sweep_plan import make_plan
    from vlmprune.loading.models import open_model

    scenes = data.name is None
    sets = [data.open(seed=seed) for seed in range(seeds if scenes else 1)]
    processor, read_weights = open_model(model, device, device_map)
    loaded = read_weights()
    plan = make_plan(loaded, methods, budgets or SHARES)
    asked = [Asking(processor, one, size, encode_once=scenes) for one in sets]
    chosen = {"images": data.images or "all", "split": data.split or ("test" if scenes else None)}
    settings = settings_of(model, loaded, processor, sets[0], size, **chosen)
    terminal.note(note for one in sets for note in one.notes)
    with (
        Store(None if out is None else out / STORE, settings, code_fingerprint()) as store,
        terminal.steps(shard.speaks) as tick,
    ):
        answered = answer(loaded, asked, evals.everything(plan, seeds, len(sets)), store, shard, wait, tick)
    if answered is None:
        terminal.note([shard.answered])
        return None
    if out is not None:
        answered.write(out)
    about = {"images": data.images or len(sets[0]), "seeds": seeds, "split": chosen["split"], "model": model}
    source = {"data": data.name or "scenes", "questions": sum(map(len, sets)), "notes": [n for one in sets for n in one.notes]}
    return {**about, **source, **stamp(), **evals.table(plan, seeds, answered).to_dict()}


def _again(out: Path) -> Any:
    """The result of a folder, from the answers in it."""
    from vlmprune.evals import sweep_report
    from vlmprune.evals.sweep import recomputed

    path = out / "sweep.json"
    try:
        numbers = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: --recompute needs the folder of a finished sweep.") from error
    return sweep_report.result(recomputed(out, numbers))
