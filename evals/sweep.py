"""Every method at equal cost, beside random tokens dropped at the same places: who beats random, where, and who does not.

Cost is the *compute average*: visual tokens entering a decoder layer, mean over layers, as a share of all visual tokens. Each
method cuts where its paper does, and one factor on its counts is solved so that the average meets the budget.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import blake2b
from inspect import getmodule, getsource
from itertools import groupby
from pathlib import Path
from typing import Any

import vlmprune
from vlmprune.errors import UsageError, unknown
from vlmprune.evals.asking import Questions, scenes_of_seed
from vlmprune.evals.offline import UNPRUNED, draws_by_skill, loyalty, percent
from vlmprune.methods import METHODS
from vlmprune.schedule import Budget, Schedule, Stage
from vlmprune.show.stats import interval, mean_of_present
from vlmprune.tiny.answers import Accuracy, Record, accuracy_by_skill, mean_over_skills

BUDGETS = (0.5, 0.35, 0.25, 0.15, 0.1)
CONTROL = "random"
ROWS = "rows.jsonl"


# -- where each method cuts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cuts:
    """Where a method cuts, and how much it keeps there relative to its other cuts.

    Attributes:
        layers: first decoder layers that see fewer tokens, in a language model of `depth` layers; 0 is before it.
        kept: tokens kept by each cut, up to a common factor.
        depth: layers of the paper's model; None leaves `layers` as they are in every model.
        tower: share of the visual tokens that the method has merged into before its first cut.
        options: other parameters of the method.
    """

    layers: tuple[int, ...]
    kept: tuple[float, ...] = (1.0,)
    depth: int | None = None
    tower: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def at_depth(self, depth: int) -> tuple[int, ...]:
        """The same places in a model of `depth` layers: never earlier than layer 1 unless before the model, all different."""
        layers: list[int] = []
        for layer in self.layers:
            if layer and self.depth is not None:
                layer = max(1, round(layer * depth / self.depth))
            layers.append(max(layer, layers[-1] + 1) if layers else layer)
        return tuple(layers)

    def lowest(self, depth: int) -> float:
        """Compute average if every cut kept nothing: what the layers before the first cut cost."""
        return self.at_depth(depth)[0] * self.tower / depth


BEFORE = Cuts((0,))
CUTS: dict[str, Cuts] = {
    # Before the language model, or inside the vision tower.
    **dict.fromkeys(("random", "uniform", "cls", "fastervlm", "divprune", "cdpruner", "holov", "visionzip"), BEFORE),
    **dict.fromkeys(("flowcut", "tome"), BEFORE),
    # One cut, at the paper's layer whatever the depth.
    "fastv": Cuts((2,)),
    "dart": Cuts((2,)),
    # Several cuts: LLaVA-1.5-7B's layers and counts.
    "pdrop": Cuts((8, 16, 24), (0.5, 0.25, 0.125), 32),
    "adaptinfer": Cuts((2, 11, 21), (133, 27, 3), 32),
    "sparsevlm": Cuts((3, 7, 16), (300, 200, 110), 32),
    "vscan": Cuts((0, 16), (96, 32), 32),
    # Its paper has thresholds instead of counts: the falling counts are ours (inferred). Its tower merges 3×3 windows that are
    # alike, 8.2 of 16 on average on 100 dev scenes of the embedded model; always 8 here, so that the cost is known. The cache
    # stage starts at layer 2 of 32 in the paper, where the first layer of 8 is.
    "mustdrop": Cuts((3, 7, 11, 15), (4, 3, 2, 1), 32, tower=(144 - 8 * 8) / 144, options={"windows": 8, "cache_layer": 1}),
}
"""The mapping from papers to any depth. A method without an entry cuts once, where its default does."""


def cuts_of(method: str) -> Cuts:
    """Where a method of `METHODS` cuts."""
    return CUTS.get(method) or Cuts((METHODS[method].default.stages[0].layer,))


def average(layers: Sequence[int], fractions: Sequence[float], depth: int, tower: float = 1.0) -> float:
    """Compute average, as a share of all visual tokens, of cuts that keep `fractions` from `layers` on."""
    borders = [*layers, depth]
    kept = sum(share * (end - start) for share, start, end in zip(fractions, borders, borders[1:], strict=False))
    return (layers[0] * tower + kept) / depth


def solve(cuts: Cuts, budget: float, depth: int) -> tuple[float, ...] | None:
    """Fractions kept at each cut so that the compute average is `budget`; None where it cannot be, because the layers before
    the first cut alone cost as much, or what the tower merges away costs less.

    The common factor is found by bisection; a cut that would keep more than there is keeps everything.
    """
    layers = cuts.at_depth(depth)
    if not cuts.lowest(depth) < budget < cuts.tower:
        return None
    low, high = 0.0, cuts.tower / min(cuts.kept)
    for _ in range(60):
        factor = (low + high) / 2
        fractions = [min(cuts.tower, factor * kept) for kept in cuts.kept]
        low, high = (factor, high) if average(layers, fractions, depth, cuts.tower) < budget else (low, factor)
    return tuple(round(min(cuts.tower, high * kept), 6) for kept in cuts.kept)


@dataclass(frozen=True)
class Point:
    """One method at one budget."""

    method: str
    budget: float
    layers: tuple[int, ...]
    fractions: tuple[float, ...]

    def recipe(self, seed: int) -> vlmprune.Recipe:
        """What is run; methods with a seed of their own get the seed."""
        method = METHODS[self.method]
        own: dict[str, Any] = dict(cuts_of(self.method).options)
        if any(parameter.name == "seed" for parameter in fields(method)):
            own["seed"] = seed
        stages = tuple(map(self._stage, self.layers, self.fractions))
        return vlmprune.Recipe((method(schedule=Schedule(stages), **own),))

    def _stage(self, layer: int, fraction: float) -> Stage:
        usual = METHODS[self.method].default.stages[0]
        if layer == usual.layer:  # a cut before the language model may be inside the vision tower
            return replace(usual, budget=Budget(fraction=fraction))
        return Stage(layer, Budget(fraction=fraction))

    @property
    def places(self) -> str:
        """Where it cuts, in words."""
        tower = ["tower"] if cuts_of(self.method).tower < 1 else []
        return ", ".join([*tower, *map(str, self.layers)])

    def control(self) -> Point:
        """Random tokens, as many and at the same layers; what a method merges in the tower is dropped before layer 0."""
        tower = cuts_of(self.method).tower
        if tower == 1:
            return replace(self, method=CONTROL)
        return Point(CONTROL, self.budget, (0, *self.layers), (round(tower, 6), *self.fractions))


@dataclass
class Plan:
    """What is asked of the model, and what cannot be.

    Attributes:
        points: methods × budgets, `random` among them.
        unreachable: (method, budget, lowest and highest compute average of its cuts).
        refused: method -> why it does not work with this model.
    """

    points: list[Point] = field(default_factory=list)
    unreachable: list[tuple[str, float, float, float]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def controls(self) -> list[Point]:
        """One random point per schedule that some method uses."""
        return list(dict.fromkeys(point.control() for point in self.points))

    def recipes(self, seed: int) -> list[vlmprune.Recipe]:
        """Everything to run with one seed, nothing twice."""
        points = [*self.controls(), *(point for point in self.points if point.method != CONTROL)]
        return list({str(recipe): recipe for recipe in (point.recipe(seed) for point in points)}.values())


def make_plan(model: Any, methods: Iterable[str] | None = None, budgets: Sequence[float] = BUDGETS) -> Plan:
    """All `methods` (default: all there are) at all budgets; `random` is always among them.

    Raises:
        UsageError: an unknown method, or a budget outside (0, 1).
    """
    names = sorted({CONTROL, *(METHODS if methods is None else methods)})
    for name in names:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    for budget in budgets:
        if not 0 < budget < 1:
            raise UsageError(f"a budget is a share of the visual tokens between 0 and 1, found {budget:g}.")
    depth, plan = model.config.get_text_config().num_hidden_layers, Plan()
    for name in names:
        cuts = cuts_of(name)
        layers = cuts.at_depth(depth)
        for budget in sorted(set(budgets), reverse=True):
            fractions = solve(cuts, budget, depth)
            if fractions is None:
                plan.unreachable.append((name, budget, cuts.lowest(depth), cuts.tower))
                continue
            point = Point(name, budget, layers, fractions)
            try:
                vlmprune.wrap(model, point.recipe(seed=0)).remove()
            except UsageError as error:
                plan.refused[name] = str(error)
                break
            plan.points.append(point)
    return plan


# -- asking ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What one recipe answered about one seed's scenes.

    Attributes:
        recipe: its string, or "un-pruned".
        code: names the source of its methods; answers of an edited method are not taken up again.
        seed, split, images: which scenes.
        given: the answers, in the order of the questions.
        share: compute average that was measured, as a share of all visual tokens.
        seconds: time it took.
    """

    recipe: str
    code: str
    seed: int
    split: str
    images: int
    given: list[str]
    share: float
    seconds: float

    @property
    def key(self) -> tuple[Any, ...]:
        return self.recipe, self.code, self.seed, self.split, self.images


class Store:
    """Answers that are there, in memory and, with a folder, in its `rows.jsonl`: an interrupted sweep goes on from them."""

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / ROWS
        self._rows: dict[tuple[Any, ...], Answers] = {}
        if self._file is not None and self._file.exists():
            whole = [line for line in self._file.read_text().splitlines(keepends=True) if line.endswith("\n")]
            self._file.write_text("".join(whole))  # a line without its end was cut off by an interruption
            for line in whole:
                self._remember(Answers(**json.loads(line)))

    def _remember(self, row: Answers) -> None:
        self._rows[row.key] = row

    def add(self, row: Answers) -> None:
        self._remember(row)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")

    def get(self, recipe: vlmprune.Recipe | None, seed: int, split: str, images: int) -> Answers | None:
        return self._rows.get((_name(recipe), _code(recipe), seed, split, images))


def _name(recipe: vlmprune.Recipe | None) -> str:
    return UNPRUNED if recipe is None else str(recipe)


def _code(recipe: vlmprune.Recipe | None) -> str:
    methods = () if recipe is None else recipe.methods
    sources = [getsource(getmodule(type(method))) for method in methods]  # type: ignore[arg-type]  # all come from files
    return blake2b("".join(sources).encode(), digest_size=6).hexdigest()


def ask(model: Any, questions: Questions, recipe: vlmprune.Recipe | None) -> tuple[list[str], float]:
    """Answers under a recipe, and the measured compute average as a share of all visual tokens."""
    if recipe is None:
        return questions.ask(model), 1.0
    entered = visual = 0.0

    def measure(asked: int) -> None:
        nonlocal entered, visual
        report = run.report()
        entered += report.visual_compute_average * asked
        visual += report.visual_tokens

    with vlmprune.wrap(model, recipe) as run:
        return questions.ask(model, measure), entered / visual


@dataclass(frozen=True)
class Tell:
    """Who is told how it goes: `total(n)` once, `start(recipe)` and `done()` for every recipe and seed that is run."""

    total: Callable[[int], None] = lambda n: None
    start: Callable[[str], None] = lambda name: None
    done: Callable[[], None] = lambda: None


def sweep(
    model: Any,
    processor: Any,
    plan: Plan,
    seeds: int = 3,
    images: int = 100,
    split: str = "test",
    folder: Path | None = None,
    tell: Tell = Tell(),
) -> Sweep:
    """Run what is not there yet, and compare everything.

    Args:
        plan: from `make_plan`.
        seeds: each has other held-out scenes, and is the seed of methods that have one.
        images: scenes per seed.
        folder: where answers are kept, so that an interrupted sweep goes on.
    """
    store = Store(folder)
    wanted = [(seed, recipe) for seed in range(seeds) for recipe in (None, *plan.recipes(seed))]
    tell.total(sum(store.get(recipe, seed, split, images) is None for seed, recipe in wanted))
    known: dict[int, list[tuple[int, str, str]]] = {}
    for seed, group in groupby(wanted, key=lambda pair: pair[0]):
        questions = Questions(processor, scenes_of_seed(seed, images, split), first=seed * images)
        known[seed] = questions.known
        for _, recipe in group:
            if store.get(recipe, seed, split, images) is None:
                tell.start(_name(recipe))
                start = time.perf_counter()
                given, share = ask(model, questions, recipe)
                seconds = time.perf_counter() - start
                store.add(Answers(_name(recipe), _code(recipe), seed, split, images, given, share, seconds))
                tell.done()

    def pooled(point: Point | None) -> tuple[list[Record], list[Answers]]:
        rows = [store.get(None if point is None else point.recipe(seed), seed, split, images) for seed in range(seeds)]
        found = [row for row in rows if row is not None]
        return [Record(*at, said) for row in found for at, said in zip(known[row.seed], row.given, strict=True)], found

    return _compare(plan, pooled)


# -- comparing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Points above the random row of the same schedule, with the paired 95 % interval; all as shares of 1."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """beats, loses, or ties where the interval holds zero."""
        return "beats" if self.low > 0 else "loses" if self.high < 0 else "ties"

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} {percent((self.low, self.high))}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Row:
    """One point's result, all seeds together.

    Attributes:
        point: what was run; None for the un-pruned model.
        recipe: with seed 0.
        by_skill: accuracy of every skill with its interval (pictures resampled).
        mean: unweighted mean over skills, with `interval`.
        over_random: "mean" and every skill -> difference to random tokens at the same layers and counts; empty for random.
        share: measured compute average, as a share of all visual tokens.
        loyalty: share of answers equal to the un-pruned model's.
        seconds: per seed.
    """

    point: Point | None
    recipe: str
    by_skill: dict[str, Accuracy]
    mean: float
    interval: tuple[float, float]
    over_random: dict[str, Difference]
    share: float
    loyalty: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        point = {"method": UNPRUNED} if self.point is None else asdict(self.point)
        entry = {key: value for key, value in asdict(self).items() if key not in ("point", "over_random")}
        return {**point, **entry, "over_random": {key: value.to_dict() for key, value in self.over_random.items()}}


@dataclass(frozen=True)
class Sweep:
    """The result: the un-pruned model, every method, and random at every schedule that some method uses."""

    plan: Plan
    unpruned: Row
    methods: list[Row]
    controls: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return {
            "unpruned": self.unpruned.to_dict(),
            "rows": [row.to_dict() for row in self.methods],
            "controls": [row.to_dict() for row in self.controls],
            "unreachable": [
                dict(zip(("method", "budget", "lowest", "highest"), entry, strict=True)) for entry in self.plan.unreachable
            ],
            "refused": self.plan.refused,
            "summary": summary(self),
        }


def _compare(plan: Plan, pooled: Callable[[Point | None], tuple[list[Record], list[Answers]]]) -> Sweep:
    reference, _ = pooled(None)

    def row(point: Point | None) -> Row:
        given, answers = pooled(point)
        by_skill, draws = accuracy_by_skill(given), draws_by_skill(given)
        against: dict[str, Difference] = {}
        if point is not None and point.method != CONTROL:
            against = differences(given, pooled(point.control())[0])
        return Row(
            point=point,
            recipe=answers[0].recipe,
            by_skill=by_skill,
            mean=mean_over_skills(by_skill),
            interval=interval(mean_of_present(draws)),
            over_random=against,
            share=sum(answer.share for answer in answers) / len(answers),
            loyalty=loyalty(given, reference),
            seconds=sum(answer.seconds for answer in answers) / len(answers),
        )

    return Sweep(plan, row(None), [row(point) for point in plan.points], [row(point) for point in plan.controls()])


def differences(given: Sequence[Record], control: Sequence[Record]) -> dict[str, Difference]:
    """Accuracy on the mean over skills and on every skill, minus the control's on the same questions."""
    ours, theirs = accuracy_by_skill(given), accuracy_by_skill(control)
    drawn = draws_by_skill(given) - draws_by_skill(control)
    found = {"mean": Difference(mean_over_skills(ours) - mean_over_skills(theirs), *interval(mean_of_present(drawn)))}
    for column, skill in enumerate(ours):
        found[skill] = Difference(ours[skill].value - theirs[skill].value, *interval(drawn[:, column]))
    return found


# -- telling -----------------------------------------------------------------------------------------------------------


def summary(result: Sweep) -> list[str]:
    """What the numbers say, as plain sentences."""
    compared = [row for row in result.methods if row.over_random]
    verdicts = [row.over_random["mean"].verdict for row in compared]
    count = {verdict: verdicts.count(verdict) for verdict in ("beats", "ties", "loses")}
    said = [
        f"Of {len(compared)} points (a method at a budget), {count['beats']} beat random at the same layers and counts on the "
        f"mean over skills, {count['ties']} tie and {count['loses']} lose. Each 95 % interval stands by itself: about one in "
        "twenty misses by chance."
    ]
    for method, rows in _by_method(compared):
        if missed := _misses(rows, "mean", numbers=True):
            said.append(f"On the mean, `{method}` does not beat random: {missed}.")
    for method, rows in _by_method(compared):
        skills = {skill: _misses(rows, skill) for skill in result.unpruned.by_skill}
        if any(skills.values()):
            listed = "; ".join(f"{skill} {missed}" for skill, missed in skills.items() if missed)
            said.append(f"On single skills, `{method}` does not beat random: {listed}.")
    return said + _drifts(result) + _left_out(result.plan)


def _by_method(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    names = dict.fromkeys(row.point.method for row in rows if row.point)
    return [(name, [row for row in rows if row.point and row.point.method == name]) for name in names]


def _misses(rows: Sequence[Row], key: str, numbers: bool = False) -> str:
    """At which budgets a method does not beat random on a skill or the mean; empty if it always does."""
    found = []
    for verdict in ("ties", "loses"):
        points = [(row.point, row.over_random[key]) for row in rows if row.point and row.over_random[key].verdict == verdict]
        if points:
            at = _listed(f"{100 * point.budget:g} %{f' ({over})' if numbers else ''}" for point, over in points)
            found.append(f"{verdict} at {at}")
    return ", ".join(found)


def _left_out(plan: Plan) -> list[str]:
    said = []
    for method, group in groupby(plan.unreachable, key=lambda entry: entry[0]):
        points = list(group)
        at, (low, high) = _listed(f"{100 * budget:g} %" for _, budget, *_ in points), points[0][2:]
        said.append(f"Not reachable: `{method}` at {at}; its cuts cost between {100 * low:.3g} % and {100 * high:.3g} %.")
    return said + [f"Not run: {reason}" for reason in plan.refused.values()]


def _drifts(result: Sweep) -> list[str]:
    """Points whose measured cost is not what was asked for."""
    off = [row for row in result.methods if row.point and abs(row.share - row.point.budget) > 0.01]
    return [
        f"`{row.point.method}` at {100 * row.point.budget:g} % really costs {100 * row.share:.1f} %."
        for row in off
        if row.point
    ]


def _listed(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


MARKS = {"beats": "▲", "ties": "=", "loses": "▼"}


def markdown(result: Sweep) -> str:
    """Two tables (mean; per skill), the random rows behind them, and the summary."""
    budgets = sorted({point.budget for point in result.plan.points}, reverse=True)
    heads = [f"{100 * budget:g} %" for budget in budgets]
    whole = result.unpruned
    lines = [
        f"Un-pruned: {100 * whole.mean:.1f} {percent(whole.interval)}. Accuracy in %, mean over skills, with 95 % intervals by "
        "picture; below it the paired difference to random tokens at the same layers and counts (▲ beats, = ties, ▼ loses). "
        "Budgets are compute averages: visual tokens entering a decoder layer, mean over layers.",
        "",
        *_table(["method", "layers", *heads], [_mean_cells(*entry, budgets) for entry in _by_method(result.methods)]),
        "",
        "Random tokens at the schedules of the other methods:",
        "",
        *_table(["layers", "kept", "mean"], [_control_cells(row) for row in result.controls if row.point]),
    ]
    skills = list(whole.by_skill)
    for budget, head in zip(budgets, heads, strict=True):
        rows = [whole, *(row for row in result.methods if row.point and row.point.budget == budget)]
        lines += ["", f"Per skill at {head}:", "", *_table(["method", *skills], [_skill_cells(row, skills) for row in rows])]
    counts = ", ".join(f"{skill} {entry.n}" for skill, entry in whole.by_skill.items())
    return "\n".join([*lines, "", f"Questions per skill: {counts}.", "", *(f"- {sentence}" for sentence in summary(result))])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _mean_cells(method: str, rows: Sequence[Row], budgets: Sequence[float]) -> list[str]:
    at = {row.point.budget: row for row in rows if row.point}
    cells = []
    for budget in budgets:
        row = at.get(budget)
        if row is None:
            cells.append("not reachable")
            continue
        cell = f"{100 * row.mean:.1f} {percent(row.interval)}"
        if row.over_random:
            cell += f"<br>{row.over_random['mean']} {MARKS[row.over_random['mean'].verdict]}"
        cells.append(cell)
    point = rows[0].point
    assert point is not None
    return [f"`{method}`", point.places, *cells]


def _control_cells(row: Row) -> list[str]:
    assert row.point is not None
    kept = ", ".join(f"{100 * fraction:.1f} %" for fraction in row.point.fractions)
    return [row.point.places, kept, f"{100 * row.mean:.1f} {percent(row.interval)}"]


def cells(row: Row) -> list[str]:
    """A row for a terminal: method, budget, accuracy, difference to random, verdict."""
    assert row.point is not None
    head = [row.point.method, f"{100 * row.point.budget:g} %", f"{100 * row.mean:.1f} {percent(row.interval)}"]
    over = row.over_random.get("mean")
    return [*head, str(over), over.verdict] if over else [*head, "", ""]


def _skill_cells(row: Row, skills: Sequence[str]) -> list[str]:
    marks = {skill: f" {MARKS[row.over_random[skill].verdict]}" if row.over_random else "" for skill in skills}
    name = f"`{row.point.method}`" if row.point else UNPRUNED
    return [name, *(f"{100 * row.by_skill[skill].value:.1f}{marks[skill]}" for skill in skills)]


def plot(result: Sweep, path: Path) -> None:
    """Accuracy against budget: one panel per method, random at its schedule in grey, the un-pruned model dashed."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    panels = [(name, rows) for name, rows in _by_method(result.methods) if name != CONTROL] or _by_method(result.methods)
    controls = {row.point: row for row in result.controls}
    columns = min(5, len(panels))
    lines = -(-len(panels) // columns)
    size = (2.3 * columns + 0.6, 1.9 * lines + 0.6)
    figure, grid = pyplot.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for number, (axes, (name, rows)) in enumerate(zip(grid.flat, panels, strict=False)):
        axes.tick_params(labelbottom=number + columns >= len(panels))
        axes.axhline(100 * result.unpruned.mean, color="0.3", linewidth=1, linestyle="--")
        random = [controls[row.point.control()] for row in rows if row.point]
        _draw_line(axes, rows, random, color="0.6")
        _draw_line(axes, rows, rows, color="C0")
        axes.set_title(name, fontsize=9)
        axes.set_xscale("log")
        axes.grid(alpha=0.25, linewidth=0.5)
    ticks = sorted({100 * point.budget for point in result.plan.points})
    grid[0, 0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    grid[0, 0].minorticks_off()
    figure.supxlabel("visual tokens, compute average (%)", fontsize=9)
    figure.supylabel("accuracy, mean over skills (%)", fontsize=9)
    handles = [Line2D([], [], color="C0"), Line2D([], [], color="0.6"), Line2D([], [], color="0.3", linestyle="--")]
    labels = ["method", "random at the same layers and counts", UNPRUNED]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_line(axes: Any, rows: Sequence[Row], shown: Sequence[Row], color: str) -> None:
    """`shown` at the budgets of `rows`, with intervals."""
    x = [100 * row.point.budget for row in rows if row.point]
    y = [100 * row.mean for row in shown]
    below = [100 * (row.mean - row.interval[0]) for row in shown]
    above = [100 * (row.interval[1] - row.mean) for row in shown]
    axes.errorbar(x, y, yerr=[below, above], color=color, marker="o", markersize=3, capsize=2, linewidth=1.3)


def write(result: Sweep, numbers: dict[str, Any], folder: Path) -> None:
    """`sweep.json`, `sweep.md` and `sweep.png`."""
    (folder / "sweep.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (folder / "sweep.md").write_text(markdown(result) + "\n")
    plot(result, folder / "sweep.png")
