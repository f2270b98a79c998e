"""Run lmms-eval's own command on the model `vlmprune`, one recipe after the other, in a process of its own.

lmms-eval returns 0 after a crash, and writes no results then. Here a run has succeeded when its results and the samples of
every task are on disk.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.metadata import entry_points
from pathlib import Path

from vlmprune.errors import UsageError
from vlmprune.evals.lmms_arguments import Arguments, write_arguments
from vlmprune.evals.lmms_results import Finished, read_finished
from vlmprune.evals.lmms_tasks import OURS, Task, check_tasks, find_tasks

REFUSED: Mapping[str, str] = {
    "--system_instruction": "lmms-eval shows it in its files, and does not pass it on to a model: write --system TEXT",
    "--apply_chat_template": "the chat template is always applied",
    "--use_cache": "every answer is kept under --out anyway, and the same command goes on from there",
    "--max_batch_size": "it belongs to --batch_size auto: write --batch N",
    "--model": "the model is vlmprune: write --model NAME before the --",
    "--model_args": "write --recipe, --model, --dtype and so on before the --",
    "--tasks": "write --task NAME before the --",
    "--batch_size": "write --batch N before the --",
    "--device": "write --device before the --",
    "--limit": "write --limit N before the --",
    "--include_path": "write --include FOLDER before the --",
    "--output_path": "write --out FOLDER before the --",
    "--force_simple": "write --force-simple before the --",
}
"""Options of lmms-eval that do not reach the model, or that are set here; and what to do instead."""
SENTENCE = re.compile(r"UsageError: (.+)")
RESULTS = re.compile(r"\d{8}_\d{6}_results\.json$")
LOG = "log.txt"
ANSWERS = "answers"


class NoResultsError(Exception):
    """lmms-eval ended without results, for a reason that is no mistake of the user."""


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        arguments: of the model; recipe and folder of the answers are filled in for each run.
        recipes: one run each.
        tasks: names of tasks, groups or tags.
        out: folder of all results.
        limit: documents of each task; None for all.
        include: a folder with further tasks.
        force_simple: take our simple class, which likelihood tasks need.
        processes: how many share the documents.
        extra: further arguments for lmms-eval.
    """

    arguments: Arguments
    recipes: tuple[str, ...]
    tasks: tuple[str, ...]
    out: Path
    limit: int | None = None
    include: Path | None = None
    force_simple: bool = False
    processes: int = 1
    extra: tuple[str, ...] = ()

    def check(self) -> list[Task]:
        """The tasks, after everything was checked that can be checked before a model is loaded.

        Raises:
            UsageError: a recipe, a task or an option cannot be used; says why.
        """
        for name, instead in REFUSED.items():
            if any(argument.partition("=")[0] == name for argument in self.extra):
                raise UsageError(f"{name} cannot be passed on to lmms-eval: {instead}.")
        if self.include is not None and not self.include.is_dir():
            raise UsageError(f"there is no folder {self.include} with tasks: give a folder that holds their YAML files.")
        tasks = find_tasks(self.tasks, self.include)
        check_tasks(tasks, self.force_simple)
        ours = [task.name for task in tasks if OURS in task.path.parents]
        if ours and self.include is not None and any(self.include in task.path.parents for task in tasks):
            raise UsageError(
                f"lmms-eval reads one folder of further tasks: run {', '.join(ours)} and those of {self.include} one after the "
                "other."
            )
        for recipe in self.recipes:
            replace(self.arguments, recipe=recipe).open_recipe()
        _check_plugin()
        return tasks

    def folder(self, recipe: str) -> Path:
        """Where the run of a recipe keeps everything."""
        plain = re.sub(r"[^\w.=-]+", "-", recipe).strip("-.")[:60]
        return self.out / (plain if plain == recipe else f"{plain}-{blake2b(recipe.encode(), digest_size=3).hexdigest()}")

    def command(self, recipe: str, tasks: Sequence[Task]) -> list[str]:
        """lmms-eval's command for one recipe."""
        folder = self.folder(recipe)
        arguments = replace(self.arguments, recipe=recipe, resume=(folder / ANSWERS).resolve())
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}", "-m"]
        include = OURS if any(OURS in task.path.parents for task in tasks) else self.include
        return [
            *(sys.executable, "-m", *(launcher if self.processes > 1 else []), "lmms_eval", "eval", "--model", "vlmprune"),
            *("--model_args", write_arguments(arguments), "--tasks", ",".join(task.name for task in tasks)),
            *("--batch_size", str(arguments.batch_size), "--log_samples", "--output_path", str(folder.resolve())),
            *(("--device", arguments.device) if arguments.device else ()),
            *(("--include_path", str(include.resolve())) if include else ()),
            *(("--limit", str(self.limit)) if self.limit else ()),
            *(("--force_simple",) if self.force_simple else ()),
            *self.extra,
        ]


def run(plan: Plan, tasks: Sequence[Task], show: Callable[[str], object]) -> list[Finished]:
    """Run every recipe, and read what was written.

    Args:
        plan: what is to be run.
        tasks: what `plan.check` returned.
        show: called with what lmms-eval prints, piece by piece.

    Raises:
        UsageError: a run ended with a sentence of ours.
        NoResultsError: a run ended without results for another reason.
    """
    return [_run(plan, recipe, tasks, show) for recipe in plan.recipes]


def _run(plan: Plan, recipe: str, tasks: Sequence[Task], show: Callable[[str], object]) -> Finished:
    folder = plan.folder(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    before = _results(folder)
    log = folder / LOG
    code = _execute(plan.command(recipe, tasks), log, show)
    new = sorted(_results(folder) - before)
    if not new:
        text = log.read_text(encoding="utf-8", errors="replace")
        if sentences := SENTENCE.findall(text):
            raise UsageError(sentences[-1].strip())
        raise NoResultsError(
            f"lmms-eval ended without results for {recipe} (exit code {code}): {_last_error(text)}. Its output is in {log}; "
            "finished answers are kept, and the same command goes on from there."
        )
    return read_finished(recipe, new[-1], [task.name for task in tasks])


def _execute(command: Sequence[str], log: Path, show: Callable[[str], object]) -> int:
    """Run a command, pass on and store what it prints, and return its exit code."""
    # A folder called like a package, where the command is run, must not be taken for it.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            while piece := os.read(process.stdout.fileno(), 1 << 16):
                file.write(piece)
                file.flush()
                show(piece.decode("utf-8", errors="replace"))
        except BaseException:
            process.terminate()
            raise
        return process.wait()


def _results(folder: Path) -> set[Path]:
    """lmms-eval's own files, whose names are dates: tasks write others (`submissions/mmbench_en_dev_static_results.json`)."""
    return {path for path in folder.glob("*/*_results.json") if RESULTS.match(path.name)}


def _last_error(text: str) -> str:
    """The last line of a traceback, or the last line at all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Killed)\b", line)]
    return ((errors or lines or ["it printed nothing"])[-1]).rstrip(".")


def _check_plugin() -> None:
    """Refuse an installation of vlmprune that is older than its entry point for lmms-eval."""
    if not any(entry.name == "vlmprune" for entry in entry_points(group="lmms_eval.models")):
        raise UsageError(
            "lmms-eval does not find the model vlmprune here, because vlmprune was installed before it had one: install it "
            "again (`pip install --editable .` in its folder)."
        )
