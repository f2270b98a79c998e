"""Find tasks of lmms-eval by their names, and refuse within seconds what would fail after minutes: no torch is imported here.

lmms-eval itself takes 15 CPU-seconds to start, and answers a missing network or key after the model has run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from vlmprune.errors import UsageError, first_line, unknown

OURS = Path(__file__).parent / "tasks"
"""The folder of the tasks that come with vlmprune."""
LIKELIHOOD = ("multiple_choice", "loglikelihood")
GENERATES = ("generate_until", "generate_until_multi_round")
BUILDERS = ("json", "csv", "parquet", "text", "arrow", "pandas", "imagefolder", "webdataset")
"""Readers of `datasets` for files on disk."""
KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")
JUDGED = re.compile("gpt|judge", re.IGNORECASE)
"""Names of metrics that a language model behind an API computes."""


@dataclass(frozen=True)
class Task:
    """One task, without its groups.

    Attributes:
        name: as lmms-eval knows it.
        path: its YAML file.
        config: what the file says, with what it includes. A `!function` is its name.
    """

    name: str
    path: Path
    config: Mapping[str, Any]

    @property
    def by_likelihood(self) -> bool:
        """Whether it scores given answers, instead of generating some."""
        return self.config.get("output_type") in LIKELIHOOD


def find_tasks(names: Sequence[str], include: Path | None = None) -> list[Task]:
    """The tasks of names, groups and tags; ours, those of `include`, and those of lmms-eval.

    Raises:
        UsageError: lmms-eval is not installed, a name does not exist, or a YAML file is broken.
    """
    folders = [*([include] if include else []), OURS, stock_folder()]
    found = [task for name in names for task in _find(name, folders)]
    return list({task.name: task for task in found}.values())


def stock_folder() -> Path:
    """The folder of the tasks that come with lmms-eval.

    Raises:
        UsageError: it is not installed.
    """
    spec = find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        raise UsageError(
            "lmms-eval is not installed in this environment: `pip install 'vlmprune[lmms]'` where there is a GPU; beside a "
            "torch for CPUs see requirements-lmms.txt (docs/lmms.md, Install)."
        )
    return Path(spec.origin).parent / "tasks"


def check_tasks(tasks: Sequence[Task], force_simple: bool) -> None:
    """Refuse tasks that cannot run here.

    Args:
        tasks: what is to run.
        force_simple: whether lmms-eval is to take our simple class.

    Raises:
        UsageError: a task is scored by likelihood and the class is not simple, asks for more than pictures and answers, has a
            metric that needs an API, or needs a dataset that cannot be had; says what to do.
    """
    for task in tasks:
        _check_kind(task, force_simple)
        _check_metrics(task)
    for task in tasks:
        _check_data(task)


def own_tasks() -> list[str]:
    """The names of our tasks."""
    return sorted(path.stem for path in OURS.glob("*.yaml"))


def _check_kind(task: Task, force_simple: bool) -> None:
    kind = task.config.get("output_type", GENERATES[0])
    if task.by_likelihood and not force_simple:
        raise UsageError(
            f"{task.name} is scored by likelihood ({kind}), which lmms-eval asks of simple classes only: add --force-simple."
        )
    if kind not in (*GENERATES, *LIKELIHOOD):
        raise UsageError(f"{task.name} asks for {kind}, which vlmprune does not do: it answers, and scores given answers.")
    if (task.config.get("dataset_kwargs") or {}).get("video"):
        raise UsageError(f"{task.name} is about videos, and vlmprune takes pictures only.")


def _check_metrics(task: Task) -> None:
    metrics = [metric for metric in task.config.get("metric_list") or () if JUDGED.search(str(metric.get("metric")))]
    asking = [metric["metric"] for metric in metrics if "static" not in str(metric.get("aggregation"))]
    if not asking or any(os.environ.get(key) for key in KEYS):
        return
    static = f"{task.name}_static"
    instead = (
        f"take {static}, which compares texts" if _defined(static, [stock_folder()]) else "take a task that compares texts"
    )
    raise UsageError(
        f"the metric {asking[0]} of {task.name} asks a language model behind an API, and neither of {' and '.join(KEYS)} is "
        f"set: {instead}, or set a key."
    )


def _check_data(task: Task) -> None:
    from vlmprune.loading.dataset_hub import check_dataset

    place, options = task.config.get("dataset_path"), task.config.get("dataset_kwargs") or {}
    if not isinstance(place, str) or place in BUILDERS:
        return
    if Path(place).expanduser().exists():
        return
    if options.get("load_from_disk") or place.startswith((".", "/", "~")):
        raise UsageError(
            f"{task.name} reads its data from {place}, and there is no such folder: check dataset_path in {task.path}."
        )
    check_dataset(place, task.name)


def _find(name: str, folders: Sequence[Path]) -> list[Task]:
    if not (found := _defined(name, folders)):
        known = {task for folder in folders for task in _names(folder)}
        raise unknown("task", name, known)
    return found


def _defined(name: str, folders: Sequence[Path]) -> list[Task]:
    """The task of a name, or the tasks of a group or tag; from the first folder that has one."""
    for folder in folders:
        tasks: list[Task] = []
        for path, text in _files(folder):
            if name not in text:
                continue
            config = _read(path)
            members = config.get("task")
            if members == name:
                return [Task(name, path, config)]
            if config.get("group") == name and isinstance(members, list):
                inside = [member if isinstance(member, str) else member.get("task") for member in members]
                return [task for member in inside if isinstance(member, str) for task in _find(member, folders)]
            if isinstance(members, str) and name in (*_listed(config.get("tag")), *_listed(config.get("group"))):
                tasks.append(Task(members, path, config))
        if tasks:
            return sorted(tasks, key=lambda task: task.name)
    return []


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*.yaml")):
        yield path, path.read_text(encoding="utf-8", errors="replace")


def _names(folder: Path) -> Iterator[str]:
    pattern = re.compile(r"^(?:task|group|tag):\s*[\"']?([\w.-]+)[\"']?\s*$", re.MULTILINE)
    for _, text in _files(folder):
        yield from pattern.findall(text)


class _Loader(yaml.SafeLoader):
    """Reads a task's file without importing its functions."""


_Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")


def _read(path: Path) -> dict[str, Any]:
    """A task's file, with what it includes."""
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as a task of lmms-eval: {first_line(error)}.") from error
    if not isinstance(own, dict):
        return {}
    whole: dict[str, Any] = {}
    for other in reversed(_listed(own.pop("include", None))):
        whole.update(_read(Path(other) if Path(other).is_file() else path.parent / other))
    return {**whole, **own}
