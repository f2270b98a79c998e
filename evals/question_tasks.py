"""Questions of a task of lmms-eval: its own dataset, prompts, right answers and scores, asked by us.

Used are lmms-eval's `TaskManager` and the task's `doc_to_text`, `doc_to_visual`, `doc_to_target` and `process_results`. What
needs more than one answer to one question (likelihoods, several rounds, scores that a language model gives) is refused;
`vlmprune lmms` runs the task inside of lmms-eval.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError, first_line, shown, unknown
from vlmprune.evals.question import Question
from vlmprune.evals.question_datasets import USUAL, usual_choices
from vlmprune.loading.dataset_hub import check_dataset

OURS = "vlmprune_"
"""What the names of the tasks that come with vlmprune begin with."""
FOLDER = Path(__file__).parent / "tasks"
BUILDERS = ("json", "csv", "parquet", "arrow", "text", "imagefolder", "webdataset", "pandas", "generator")
"""Names in `dataset_path` that mean local files."""
ENDING = ".yaml"
USUAL_LENGTH = 128


@dataclass(frozen=True)
class TaskQuestions:
    """The questions of a task.

    Attributes:
        questions: all of them.
        metric: name of the task's score.
        max_new_tokens: the longest answer.
        until: texts at which an answer ends.
    """

    questions: list[Question]
    metric: str
    max_new_tokens: int
    until: tuple[str, ...]


def read_task(name: str, most: int | None = None, scorer: str | None = None) -> TaskQuestions:
    """The questions of a task. Pictures are not decoded.

    Args:
        name: of the task; or the YAML file of one, which may include a stock one.
        most: questions to read at most; None is all.
        scorer: instead of the task's own score.

    Raises:
        UsageError: lmms-eval is missing, it has no such task, its dataset cannot be fetched, or its questions cannot be asked
            or scored one by one.
    """
    if find_spec("lmms_eval") is None:
        raise UsageError(
            f"there is no folder {name}: give one that holds questions.jsonl and the pictures; if it is a task of lmms-eval, "
            "install that package first (requirements-lmms.txt)."
        )
    task = _load(name)
    config = task.config
    if config.output_type != "generate_until":
        raise UsageError(
            f"the task {name!r} asks for {config.output_type}, not for an answer in words: `vlmprune lmms` runs such tasks."
        )
    settings = config.generation_kwargs or {}
    until = settings.get("until") or ()
    rows = task.eval_docs
    count = len(rows) if most is None else min(most, len(rows))
    metric = scorer or _metric(task, name, rows[0])
    questions = [_question(task, name, rows, number, metric, scorer) for number in range(count)]
    longest = int(settings.get("max_new_tokens", USUAL_LENGTH))
    return TaskQuestions(questions, metric, longest, (until,) if isinstance(until, str) else tuple(until))


def _load(name: str) -> Any:
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    logger.disable("lmms_eval")  # it reports each of its task files that is no task
    file = Path(name).expanduser() if name.endswith(ENDING) else None
    if file is not None and not file.is_file():
        raise UsageError(f"there is no task file {name}: give the YAML file of a task of lmms-eval, or its name.")
    stock = file is None and not name.startswith(OURS)
    manager = TaskManager(
        "ERROR", include_path=str(FOLDER if file is None else file.parent), include_defaults=stock, model_name="vlmprune"
    )
    if file is not None:
        named = [own for own, entry in manager.task_index.items() if str(entry["yaml_path"]) == str(file)]
        if not named:
            raise UsageError(f"{name} is no task file of lmms-eval: it names no task.")
        name = named[0]
    if name not in manager.all_tasks:
        raise unknown("task of lmms-eval", name, manager.all_tasks)
    if name not in manager.all_subtasks:
        members = manager.task_index[name]["task"]
        several = f" ({', '.join(map(str, members))})" if isinstance(members, list) else ""
        raise UsageError(f"{name!r} is a group of tasks{several}: name one of them.")
    config = manager._get_config(name)
    _check_judge(name, config, manager.all_tasks)
    _check_local(name, config)
    try:
        return manager.load_task_or_group(name)[name]
    except Exception as error:  # datasets, pyarrow and the task's own code can raise anything
        cause = getattr(getattr(error, "last_attempt", None), "exception", lambda: None)() or error
        raise UsageError(f"the task {name!r} cannot be loaded ({type(cause).__name__}: {first_line(cause)}).") from error


def _check_judge(name: str, config: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a task whose score a language model gives, over a network."""
    metadata = config.get("metadata")
    told = metadata if isinstance(metadata, list) else [metadata]
    judged = any(isinstance(one, Mapping) and "gpt_eval_model_name" in one for one in told)
    named = any("gpt" in str(entry.get("metric")) for entry in config.get("metric_list") or ())
    if judged or (named and not name.endswith("_static")):
        static = f"{name}_static" if f"{name}_static" in known else None
        instead = f"take {static!r}" if static else "give a scorer of your own with a dataset folder, or take another task"
        raise UsageError(
            f"the task {name!r} is scored by a language model behind an API, which vlmprune does not call: {instead}."
        )


def _check_local(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a dataset that would have to be fetched from a hub that cannot be reached."""
    place = str(config.get("dataset_path"))
    if place in BUILDERS or os.path.exists(place) or _cached(place):
        return
    check_dataset(place, f"the task {name!r}")


def _cached(dataset: str) -> bool:
    """Whether a dataset of the hub was prepared on this machine before."""
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / dataset.replace("/", "___")).is_dir()


# -- scores ------------------------------------------------------------------------------------------------------------------


def _metric(task: Any, name: str, row: Mapping[str, Any]) -> str:
    """The first metric of a task that gives each answer a number.

    Raises:
        UsageError: there is none.
    """
    found = _judged(task, row, "")
    for metric, value in found.items():
        if _share(value) is not None:
            return metric
    raise UsageError(
        f"the task {name!r} gives no single answer a score between 0 and 1 (its metrics: {', '.join(found)}): give --scorer."
    )


def _judged(task: Any, row: Mapping[str, Any], given: str) -> Mapping[str, Any]:
    return task.process_results(row, [given])


def _share(value: Any) -> float | None:
    """A metric's value for one answer as a share of 1: itself, or the score in a mapping; None if it is neither."""
    if isinstance(value, Mapping):
        value = value.get("score")
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    return None


@dataclass(frozen=True)
class Judge:
    """The task's own score of an answer to one of its rows."""

    task: Any = field(repr=False)
    rows: Any = field(repr=False)
    number: int
    metric: str

    def __call__(self, given: str) -> float:
        value = _share(_judged(self.task, self.rows[self.number], given).get(self.metric))
        if value is None:
            raise UsageError(f"the task gives the answer {shown(given)} to row {self.number} no score between 0 and 1.")
        return value


# -- one row -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TaskPicture:
    """A picture of a row, drawn or decoded by the task when it is opened."""

    task: Any = field(repr=False)
    rows: Any = field(repr=False)
    number: int
    place: int

    def open(self) -> Any:
        """The picture.

        Raises:
            UsageError: the task cannot give it.
        """
        try:
            return _visuals(self.task, self.rows[self.number])[self.place]
        except UsageError:
            raise
        except Exception as error:  # of the task's own code, or of a file that is cut off
            raise UsageError(
                f"picture {self.place + 1} of row {self.number} cannot be read ({first_line(error)}): fetch the dataset again."
            ) from error


def _visuals(task: Any, row: Mapping[str, Any]) -> list[Any]:
    from PIL import Image

    visuals = list(task.doc_to_visual(row) or ())
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise UsageError(f"a picture was expected, found {type(visual).__name__}: vlmprune takes pictures only.")
    return visuals


def _question(task: Any, name: str, rows: Any, number: int, metric: str, scorer: str | None) -> Question:
    row = rows[number]
    if task.config.doc_to_messages is not None:
        raise UsageError(f"the task {name!r} mixes pictures and texts in messages of its own: `vlmprune lmms` runs such tasks.")
    text = task.doc_to_text(row)
    if not isinstance(text, str):
        raise UsageError(f"the task {name!r} has no text as the question of row {number}: found {shown(text)}.")
    target = task.doc_to_target(row)
    choices = tuple(map(str, task.doc_to_choice(row))) if task.config.doc_to_choice is not None else usual_choices(row)
    if isinstance(target, int) and choices:
        target = choices[target]
    answers = target if isinstance(target, list | tuple) else [target]
    group = next((str(row[column]) for column in USUAL["group"] if column in row), "")
    pictures = tuple(TaskPicture(task, rows, number, place) for place in range(len(_visuals(task, row))))
    judge: Callable[[str], float] | None = None if scorer else Judge(task, rows, number, metric)
    return Question(
        id=str(number),
        images=pictures,
        text=text,
        answers=tuple(str(answer) for answer in answers),
        choices=choices,
        group=group,
        scorer=scorer or "task",
        judge=judge,
    )
