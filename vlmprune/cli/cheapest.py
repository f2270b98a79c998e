"""What `vlmprune tune --max-drop` does: questions, model and store for the search, and its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.cli import terminal
from vlmprune.cli.data import Data
from vlmprune.cli.results import prepare, publish
from vlmprune.loading.environment import quiet

if TYPE_CHECKING:
    from vlmprune.evals.question import QuestionSet
    from vlmprune.evals.store import Store

SCENES = 400
"""Held-out scenes of the embedded model; half as many others are for tuning."""
SCENES_AT_ONCE = 64
"""Questions in a batch about scenes."""
HORIZON_QUESTIONS, HORIZON_TOKENS = 24, 4
"""On how many tuning questions, and tokens of each answer, the horizon is measured."""
ANSWERS = "answers"


@dataclass(frozen=True)
class Wanted:
    """The options of the command."""

    max_drop: float
    model: str
    data: Data
    methods: Sequence[str] | None
    budgets: Sequence[float] | None
    batch_size: int | None
    device: str
    device_map: str | None


def find_cheapest(wanted: Wanted, out: Path | None, as_json: bool) -> None:
    """Search, write and print.

    Raises:
        UsageError: an option, a question or a picture cannot be used; says why, before anything is computed.
    """
    from vlmprune.loading.outputs import check_packages

    wanted.data.check(wanted.model)
    check_packages(["scipy"])
    prepare(out)
    quiet()
    from vlmprune.evals import max_drop, max_drop_report
    from vlmprune.evals.asking import BATCH_SIZE, Asking
    from vlmprune.evals.candidates import GRID, check_budgets, propose
    from vlmprune.evals.results import stamp
    from vlmprune.evals.trials import Trials
    from vlmprune.loading.models import open_model

    max_drop.check_budget(wanted.max_drop)
    check_budgets(wanted.budgets or ())
    tuning, held_out, notes = _questions(wanted.data)
    processor, read_weights = open_model(wanted.model, wanted.device, wanted.device_map)
    scenes = wanted.data.name is None
    size = wanted.batch_size or (SCENES_AT_ONCE if scenes else BATCH_SIZE)
    asked = {"tuning": Asking(processor, tuning, size, scenes), "held-out": Asking(processor, held_out, size, scenes)}
    model = read_weights()
    terminal.note(notes)
    with _store(out, wanted.model, model, processor, tuning, held_out, size) as store, terminal.steps() as tick:
        horizon, why = _horizon(processor, model, tuning, store, tick)
        candidates, left_out = propose(model, wanted.methods, wanted.budgets or GRID, horizon)
        trials = {name: Trials(name, model, asking, store, tick) for name, asking in asked.items()}
        few = _few(trials["held-out"].units, wanted.max_drop)
        terminal.note(few)
        search = max_drop.Search(trials["tuning"], trials["held-out"], wanted.max_drop, lambda line: terminal.note([line]))
        found = search.run(candidates)
    numbers = {
        "model": wanted.model,
        "data": wanted.data.name or "scenes",
        "questions": {name: {"units": each.units, "questions": each.questions} for name, each in trials.items()},
        "horizon": horizon,
        "notes": [*notes, *few, *why, *left_out],
        **stamp(),
        **found.to_dict(),
    }
    if out is not None:
        _write_recipe(out, None if found.winner is None else found.winner.recipe)
    publish(max_drop_report.result(numbers), "max_drop", out, as_json)
    if out is not None and found.winner is not None and not as_json:
        terminal.say(f"The recipe is saved in {out}")


def _write_recipe(out: Path, winner: str | None) -> None:
    """Save the recipe. Where there is none, one of an earlier run must not stay beside evidence that does not speak for it."""
    import vlmprune
    from vlmprune.recipe.document import FILE

    if winner is not None:
        vlmprune.Recipe.parse(winner).save_pretrained(out)
    elif (earlier := out / FILE).exists():
        earlier.rename(out / f"{FILE}.earlier")
        terminal.note([f"the recipe of an earlier run is now {FILE}.earlier, because none is confirmed"])


def _questions(data: Data) -> tuple[QuestionSet, QuestionSet, list[str]]:
    """For tuning and held-out, and what was left out or lost."""
    from vlmprune.evals.trials import halves

    if data.name is None:
        scenes = data.images or SCENES
        tuning = replace(data, images=max(scenes // 2, 1), split="dev").open()
        return tuning, replace(data, images=scenes, split="test").open(), []
    questions = data.open(needs=("answer", "image"))
    tuning, held_out = halves(questions)
    return tuning, held_out, list(questions.notes)


def _few(units: int, budget: float) -> list[str]:
    """A sentence if not even equal answers could confirm the budget."""
    from vlmprune.evals.max_drop import least_pictures

    if units >= (least := least_pictures(budget)):
        return []
    return [
        f"with {units} held-out pictures a recipe that changes no answer at all cannot be confirmed within {budget:g} points: "
        f"that takes {least}"
    ]


def _store(
    out: Path | None, name: str, model: Any, processor: Any, tuning: QuestionSet, held_out: QuestionSet, batch_size: int
) -> Store:
    """Where answers are kept, so that an interrupted search goes on."""
    from vlmprune.evals.answering import settings_of
    from vlmprune.evals.fingerprints import code_fingerprint
    from vlmprune.evals.store import Store

    settings = settings_of(name, model, processor, tuning, batch_size, command="tune --max-drop", held_out=held_out.fingerprint)
    return Store(None if out is None else out / ANSWERS, settings, code_fingerprint("asking", "horizon"))


def _horizon(
    processor: Any, model: Any, tuning: QuestionSet, store: Store, tick: Callable[[str, int, int], None]
) -> tuple[int | None, list[str]]:
    """The information horizon on some tuning questions about different pictures; if there is none, why."""
    from vlmprune.errors import UsageError
    from vlmprune.evals.calibration import samples
    from vlmprune.evals.candidates import measured_horizon, one_per_unit

    if (known := store.get(("horizon",))) is not None:
        return known["layer"], known["why"]
    chosen = one_per_unit(tuning.questions, HORIZON_QUESTIONS)
    done = 0.0

    def advance(share: float) -> None:
        nonlocal done
        done += share
        tick("information horizon", int(done), len(chosen))

    layer, why = None, []
    try:
        layer = measured_horizon(model, samples(processor, chosen)(model), HORIZON_TOKENS, advance)
        if not layer:
            why = [f"No candidate has a horizon: on {len(chosen)} questions every layer needs visual tokens."]
    except UsageError as error:
        why = [f"No candidate has a horizon: {error}"]
    store.add(("horizon",), {"layer": layer, "why": why})
    return layer, why
