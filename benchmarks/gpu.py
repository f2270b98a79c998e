"""All measurements that need a GPU, in one command of at most nine minutes.

    python benchmarks/gpu.py [--out benchmarks/results/gpu] [--budget 500]
    python benchmarks/gpu.py --rehearse          # the same path on a CPU: tiny sizes, Triton's interpreter, nothing timed

1. environment; 2. every kernel against its reference at real sizes, on poisoned memory (tests/kernels/rule.py has the rule);
3. kernels against the machine's limits, measured in the same run; 4. whole models, pruned and un-pruned in interleaved
rounds, a video of 16,384 visual tokens among them (benchmarks/long_inputs.py); 5. how often a prefill waits for the GPU; 6. one
JSON, one picture and one log.

Steps run in order of importance. A step that does not fit into the budget is listed as not run, and one that breaks as failed;
the others still run. A step that is running when the budget is spent ends after its current round, if it has three; GRACE
seconds later it is stopped without a result. Kernels are checked and timed in a separate process: an illegal memory access or a
hang ends only that process, and the next step has a new one. The JSON is written after every step. Exit code 1 if a kernel is
wrong or a step failed; a missed goal is a finding.
"""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from gpu_apart import Apart, OutOfTimeError, in_a_line

MET, MISSED, NOT_RUN, REHEARSED = "met", "missed", "not run", "rehearsed, not measured"
GRACE = 25.0
"""Seconds beyond the budget in which a step may still end with a result. The figure and the summary need a few more."""


@dataclass
class Goal:
    """One goal.

    Attributes:
        wanted: the goal; `found` is the measured value in the same unit, None if it was not measured.
        more: True if more is better.
    """

    name: str
    wanted: float
    unit: str
    more: bool
    found: float | None = None
    detail: str = ""
    state: str = NOT_RUN

    def meet(self, found: float | None, detail: str = "") -> None:
        self.found, self.detail = found, detail
        if found is None:
            self.state = REHEARSED
        else:
            self.state = MET if (found >= self.wanted if self.more else found <= self.wanted) else MISSED

    @property
    def share(self) -> float | None:
        """1 where the goal is just met, more where it is exceeded."""
        if self.found is None:
            return None
        return self.found / self.wanted if self.more else self.wanted / self.found


@dataclass
class Step:
    """The state of one step: "done", "failed", "stopped" (the budget was spent) or "not run", and why."""

    name: str
    state: str
    seconds: float
    note: str = ""


@dataclass
class Session:
    """The steps of one run, its budget in seconds, and all results."""

    device: str
    rehearsal: bool
    budget: float
    out: Path
    command: str
    clock: Callable[[], float] = time.perf_counter
    apart: Apart = field(default_factory=Apart)
    environment: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    checks: list[Any] = field(default_factory=list)
    kernels: dict[str, Any] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    waits: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def left(self) -> float:
        """Seconds of the budget; negative when it is spent."""
        return self.budget - (self.clock() - self.start)

    def spent(self) -> bool:
        """Whether a step should end with the results that it has."""
        return self.left <= 0

    def in_time(self) -> None:
        """Called by a step wherever it can be stopped.

        Raises:
            OutOfTimeError: the budget and its grace are spent.
        """
        if self.left <= -GRACE:
            raise OutOfTimeError(f"stopped {-self.left:.0f} s after the budget was spent")

    def elsewhere(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run `work(*arguments)` in the separate process, as long as there is time."""
        return self.apart.call(self.left + GRACE, work, *arguments)

    def step(self, name: str, needs: float, work: Callable[[], str | None]) -> None:
        """Run one step if its `needs` seconds are left, always if it needs none, and record its state."""
        if needs and self.left < needs:
            self.steps.append(Step(name, NOT_RUN, 0.0, f"needs about {needs:.0f} s, {max(self.left, 0):.0f} s were left"))
        else:
            begin = self.clock()
            try:
                state, note = "done", work() or ""
            except OutOfTimeError as error:
                state, note = "stopped", str(error)
            except Exception as error:  # the other steps still run
                traceback.print_exc()
                state, note = "failed", in_a_line(error)
            self.steps.append(Step(name, state, self.clock() - begin, note))
        last = self.steps[-1]
        when = "" if self.rehearsal else f"[{self.budget - self.left:6.1f} s] "
        self.say(f"{when}{name}: {last.state}{f' ({last.note})' if last.note else ''}")
        self.write()

    def say(self, line: str) -> None:
        """Print a line, and add it to the log beside the JSON."""
        print(line, flush=True)
        with self.out.with_suffix(".log").open("a") as log:
            print(line, file=log)

    def write(self) -> None:
        """Write the JSON with the results so far."""
        data = {
            "what": REHEARSAL_NOTE if self.rehearsal else "measured",
            "rehearsal": self.rehearsal,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "command": self.command,
            "budget_s": self.budget,
            "environment": self.environment,
            "steps": [asdict(step) for step in self.steps],
            "goals": [asdict(goal) for goal in self.goals],
            "checks": [{**asdict(check), "right": check.right} for check in self.checks],
            "kernels": {
                **self.kernels,
                "timings": [asdict(timing) for timing in self.kernels.get("timings", ())],
            },
            "models": self.models,
            "synchronisations": self.waits,
        }
        if self.rehearsal:
            data["steps"] = [{**step, "seconds": None} for step in data["steps"]]
        self.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")


REHEARSAL_NOTE = (
    "rehearsal on a CPU with reduced sizes: it shows that the path runs and that kernels are right; nothing is timed"
)


# -- 2 and 3: kernels --------------------------------------------------------------------------------------------------


def judged(session: Session, found: list[Any], broken: Sequence[str] = ()) -> str:
    """Keep comparisons, and sum them up in a sentence.

    Raises:
        RuntimeError: something broke; its process is ended, because CUDA may be unusable there.
    """
    session.checks += found
    wrong = [f"{check.op} ({check.case}): {check.error:.3g} > {check.allowed:.3g}" for check in found if not check.right]
    note = f"WRONG: {'; '.join(wrong)}" if wrong else f"{len(found)} right"
    if broken:
        session.apart.end()
        raise RuntimeError(f"{note}; broken: {'; '.join(broken)}")
    return note


def check_variants(session: Session, variants: slice) -> None:
    """Every op in some dtypes and head sizes, each as a separate step."""
    import gpu_kernels as kernels

    for dtype, dim in kernels.sizes_of(session.rehearsal).variants[variants]:
        name = f"kernels are right, {str(dtype).removeprefix('torch.')}, head size {dim}"
        arguments = (kernels.check_variant, session.device, session.rehearsal, dtype, dim)
        session.step(name, 25, lambda arguments=arguments: judged(session, *session.elsewhere(*arguments)))


def check_the_rest(session: Session) -> None:
    """Selections, and tensors with more elements than an int32 counts."""
    import gpu_kernels as kernels

    sizes = kernels.sizes_of(session.rehearsal)
    for width in sizes.widths:
        arguments = (kernels.check_selection, session.device, session.rehearsal, width)
        work = partial(session.elsewhere, *arguments)
        session.step(f"selections are right, width {width}", 15, lambda work=work: judged(session, work()))
    if sizes.far is not None:
        far = partial(session.elsewhere, kernels.check_far, session.device, sizes.far)
        session.step("beyond 2³¹ elements", 20, lambda: judged(session, far()))


def time_kernels(session: Session) -> None:
    """Times of kernels against their goals."""
    import gpu_kernels as kernels

    goals = {
        "gather": [
            Goal(f"{name}: share of copy bandwidth", 0.7, "", more=True)
            for name in ("gather_all, keys and values", "gather_tokens, half of the keys")
        ],
        "score": [Goal("attention_mass, last row: × reading K", 5, "×", more=False)],
        "select": [
            Goal(f"select_diverse, width {width}", 1, "ms", more=False) for width in kernels.sizes_of(session.rehearsal).widths
        ],
        "var": [Goal("grouped_attention, VAR decoding: × SDPA", 1.1, "×", more=False)],
    }
    session.goals += [goal for group in goals.values() for goal in group]

    def work() -> str:
        session.kernels = found = session.elsewhere(kernels.measure_kernels, session.device, session.rehearsal)
        timings = {timing.name: timing for timing in found["timings"]}

        def over(name: str, divisor: str) -> tuple[float | None, str]:
            timing, base = timings[name], found[divisor]
            if timing.ms is None or base is None:
                return None, ""
            return timing.ms / base, f"{timing.ms:.4f} ms over {base:.4f} ms"

        for goal in goals["gather"]:
            timing = timings[goal.name.partition(":")[0]]
            goal.meet(timing.bandwidth_share, "" if timing.ms is None else f"{timing.bytes_moved / 1e6:.0f} MB at least")
        goals["score"][0].meet(*over("attention_mass, last row", "read_keys_ms"))
        for goal in goals["select"]:
            goal.meet(timings[goal.name].ms)
        goals["var"][0].meet(*over("grouped_attention, VAR decoding", "sdpa_row_ms"))
        return f"{len(timings)} pieces of work"

    session.step("kernels against the machine's limits", 40, work)


def replay_kernels(session: Session) -> None:
    """The same work from CUDA graphs; at the end, because nothing else needs it."""
    import gpu_kernels as kernels

    def work() -> str:
        if not session.kernels:
            return "nothing was timed before"
        arguments = (session.device, session.rehearsal, session.kernels["timings"])
        timings = session.elsewhere(kernels.replay_kernels, *arguments)
        session.kernels = {**session.kernels, "timings": timings}
        known = [f"{timing.name} {timing.graph_ms:.4f} ms" for timing in timings if timing.graph_ms is not None]
        return ", ".join(known) or f"{len(timings)} pieces of work"

    session.step("kernels from CUDA graphs", 20, work)


# -- 4 and 5: models ---------------------------------------------------------------------------------------------------


class Loaded:
    """The one model that is in memory, built when it is needed."""

    def __init__(self, device: str, rehearsal: bool) -> None:
        self.device, self.rehearsal = device, rehearsal
        self.name: str | None = None
        self.model: Any = None

    def get(self, name: str) -> Any:
        import torch

        from vlmprune.evals.random_models import shape_named

        if self.name != name:
            self.release()
            dtype = torch.float32 if self.rehearsal else torch.bfloat16
            self.model = shape_named(name).build(self.device, dtype, 16 if self.rehearsal else 1)
            self.name = name
        return self.model

    def release(self) -> None:
        """Free its memory, for the next model or the process of the kernels."""
        import torch

        self.name = self.model = None
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


def run_models(session: Session) -> None:
    import gpu_models as models

    from vlmprune.evals.random_models import shape_named

    loaded = Loaded(session.device, session.rehearsal)
    last: str | None = None
    for plan in models.PLANS:
        goals = {
            wanted: Goal(f"{plan.name}, {wanted.recipe}: {wanted.phase}", wanted.times, "×", more=True)
            for wanted in plan.wanted
            if wanted.times
        }
        if session.rehearsal and not goals:
            continue
        session.goals += goals.values()

        def work(plan: Any = plan, goals: dict[Any, Goal] = goals) -> str:
            model = loaded.get(plan.shape)
            inputs = shape_named(plan.shape).inputs(model, 1 if session.rehearsal else plan.batch)
            found = models.run_plan(model, inputs, plan, session.rehearsal, session.spent, session.in_time)
            rows = {row.recipe: row for row in found}
            for wanted, goal in goals.items():
                ratio = rows[wanted.recipe].faster[wanted.phase]
                if session.rehearsal:
                    goal.meet(None)
                else:
                    goal.meet(ratio.times, f"[{ratio.low:.2f}, {ratio.high:.2f}], {rows[wanted.recipe].achieved:.0%} of ideal")
            if session.rehearsal:
                session.models += [{"shape": plan.shape, "recipe": name, "visual": row.visual} for name, row in rows.items()]
            else:
                session.models += [{"shape": plan.shape, **row.to_dict()} for row in rows.values()]
            kept = ", ".join(f"{name} keeps {row.visual:g}" for name, row in rows.items())
            shorter = not session.rehearsal and found[0].rounds < plan.rounds
            return kept + (f"; {found[0].rounds} of {plan.rounds} rounds, the budget was spent" if shorter else "")

        if last == "llava-1.5-7b" != plan.shape:
            count_waits(session, loaded)
        last = plan.shape
        session.step(plan.name, plan.seconds, work)
    if not session.waits and not any(step.name == WAITS for step in session.steps):
        count_waits(session, loaded)
    loaded.release()


LONG = "a long video"


def run_long(session: Session) -> None:
    """A video of 16,384 visual tokens, un-pruned and under `long_inputs.RECIPES`; there are no goals."""
    import long_inputs as long
    import torch

    def work() -> str:
        if session.rehearsal:
            shape, dtype, reduce, rounds = long.shape(frames=10, side=4), torch.float32, 16, 1
        else:
            shape, dtype, reduce, rounds = long.shape(), torch.bfloat16, 1, 3
        rows = long.measure(shape, session.device, dtype, reduce, rounds, session.in_time, session.spent)
        for row in rows:
            numbers = {"recipe": row.recipe, "visual": row.visual} if session.rehearsal else row.to_dict()
            session.models.append({"shape": shape.name, **numbers})
        return ", ".join(f"{row.recipe} keeps {row.visual:g}" for row in rows)

    session.step(LONG, 90, work)


WAITS = "waiting for the GPU in a prefill"


def count_waits(session: Session, loaded: Loaded) -> None:
    """Count waits, once, while LLaVA-1.5 is in memory."""
    import gpu_models as models

    from vlmprune.evals.random_models import shape_named

    if any(step.name == WAITS for step in session.steps):
        return

    def work() -> str:
        name = "llava-1.5-7b"
        model = loaded.get(name)
        inputs = shape_named(name).inputs(model, 1)
        for recipe in models.WAITING:
            recipe = "var:sink_dims=cosine" if recipe == "var" and session.rehearsal else recipe
            session.waits[recipe] = models.count_synchronisations(model, inputs, recipe)
            session.in_time()
        ours = {
            recipe: sum(count for place, count in found.items() if place != "transformers")
            for recipe, found in session.waits.items()
        }
        return "of ours: " + ", ".join(f"{recipe} {count}" for recipe, count in ours.items())

    session.step(WAITS, 15, work)


# -- 6: the figure -----------------------------------------------------------------------------------------------------


def draw(session: Session, path: Path) -> None:
    """Draw goals, kernels against their rooflines, and speed-ups in one figure."""
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(21, 8), layout="constrained")
    title = f"{session.environment.get('gpu', '')}, torch {session.environment.get('torch', '')}"
    figure.suptitle(REHEARSAL_NOTE if session.rehearsal else title)

    def lines(axes: Any, title: str, names: list[str]) -> None:
        axes.set_title(title, fontsize=11)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.axvline(1, color="0.3", linewidth=1)

    lines(left, "goals: 1 is just met", [goal.name for goal in session.goals])
    for place, goal in enumerate(session.goals):
        share = goal.share
        if share is not None:
            left.barh(place, share, color="C2" if goal.state == MET else "C3", alpha=0.6)
        text = goal.state if share is None else f"{goal.found:.3g} {goal.unit} (wanted {goal.wanted:g})"
        left.text(0.02, place, text, va="center", fontsize=7)

    timings = session.kernels.get("timings", [])
    lines(middle, "share of the roofline: kernel (blue), torch reference (grey)", [timing.name for timing in timings])
    for place, timing in enumerate(timings):
        if timing.ms is not None:
            middle.barh(place - 0.2, timing.roofline_ms / timing.ms, 0.36, color="C0", alpha=0.6)
            middle.barh(place + 0.2, timing.roofline_ms / timing.reference_ms, 0.36, color="0.7")
        middle.text(0.01, place - 0.2, "not measured" if timing.ms is None else f"{timing.ms:.4f} ms", va="center", fontsize=7)

    rows = [row for row in session.models if row["recipe"] != "un-pruned"]
    names = [f"{row['shape']}, {row['recipe']}" + (f", batch {row['batch']}" if "batch" in row else "") for row in rows]
    lines(right, "times faster: first token (blue), further tokens (orange)", names)
    for place, row in enumerate(rows):
        for number, phase in enumerate(("ttft", "tpot")):
            if phase in row.get("faster", {}):
                found = row["faster"][phase]
                spread = [[max(found["times"] - found["low"], 0)], [max(found["high"] - found["times"], 0)]]
                right.barh(place + 0.4 * number - 0.2, found["times"], 0.36, xerr=spread, color=f"C{number}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def summary(session: Session) -> list[str]:
    """The lines that are printed at the end."""
    wrong = [check for check in session.checks if not check.right]
    lines = [f"{len(session.checks)} comparisons with references, {len(wrong)} wrong"]
    lines += [
        f"  WRONG {check.op}, {check.case}, {check.dtype}, {check.dim}: {check.error:.3g} > {check.allowed:.3g}"
        for check in wrong
    ]
    for goal in session.goals:
        found = "" if goal.found is None else f" {goal.found:.3g} {goal.unit}"
        lines.append(f"{goal.state.upper():<24}{goal.name}:{found} wanted {goal.wanted:g} {goal.unit} {goal.detail}".rstrip())
    for state in ("failed", "stopped", NOT_RUN):
        lines += [f"{state.upper():<24}{step.name}: {step.note}" for step in session.steps if step.state == state]
    return lines


def main(
    out: Annotated[Path | None, typer.Option(help="Path of the results, without suffix.")] = None,
    budget: Annotated[float, typer.Option(min=30, help="Seconds; what does not fit is listed as not run.")] = 500,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="On a CPU, with tiny sizes, nothing timed.")] = False,
) -> None:
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated, which is after this
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 asks for it; it is the default
    import torch

    from vlmprune.loading.environment import environment

    if not rehearse and not torch.cuda.is_available():
        raise SystemExit("gpu.py: there is no GPU here: pass --rehearse to run the same path on the CPU.")
    out = out or Path("benchmarks/results") / ("gpu-rehearsal" if rehearse else "gpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/gpu.py" + (" --rehearse" if rehearse else f" --budget {budget:g}")
    out.with_suffix(".log").write_text(f"{command}\n{REHEARSAL_NOTE if rehearse else ''}\n")
    session = Session("cpu" if rehearse else "cuda", rehearse, budget, out, command)

    def look() -> str:
        import triton

        session.environment = {**environment(), "triton": triton.__version__, "cuda": torch.version.cuda or "none"}
        return ", ".join(f"{key} {value}" for key, value in session.environment.items())

    session.step("environment", 0, look)
    first = slice(0, 6)  # every kernel, bf16 of all head sizes, fp16 and fp32; the others follow after the goals
    check_variants(session, first)
    check_the_rest(session)
    time_kernels(session)
    session.apart.end()  # models need the memory
    run_models(session)
    run_long(session)
    check_variants(session, slice(first.stop, None))
    replay_kernels(session)
    session.apart.end()
    session.step("picture", 0, lambda: draw(session, out.with_suffix(".png")))
    for line in summary(session):
        session.say(line)
    if any(step.state == "failed" for step in session.steps) or any(not check.right for check in session.checks):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
