"""Questions of a task of lmms-eval: its own dataset, prompts, right answers and scores, asked by us.

Used are lmms-eval's `TaskManager` and the task's `doc_to_text`, `doc_to_visual`, `doc_to_target` and `process_results`. What
needs more than one answer to one question (likelihoods, several rounds, scores that a language model gives) is refused;
`vlmprune lmms` runs the task inside of lmms-eval.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError, first_line, shown
from vlmprune.evals.lmms_tasks import check_tasks, find_tasks
from vlmprune.evals.question import Question
from vlmprune.evals.question_datasets import USUAL, usual_choices

ENDING = ".yaml"
ASKED = "generate_until"
"""What a task asks for, if for an answer in words."""
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
    """The questions of a task. A row whose pictures cannot be decoded is a question that cannot be opened.

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
    settings = task.config.generation_kwargs or {}
    until = settings.get("until") or ()
    until = (until,) if isinstance(until, str) else until
    rows = task.eval_docs
    count = len(rows) if most is None else min(most, len(rows))
    readable = [_readable(task, rows, number) for number in range(count)]
    metric = scorer or next((_metric(task, name, rows[number]) for number in range(count) if readable[number]), "")
    questions = [
        _question(task, name, rows, number, metric, scorer) if readable[number] else _broken(task, rows, number)
        for number in range(count)
    ]
    longest = int(settings.get("max_new_tokens", USUAL_LENGTH))
    return TaskQuestions(questions, metric, longest, tuple(text for text in until if text))


def _load(name: str) -> Any:
    """The task object. What cannot work is refused before lmms-eval is imported, which takes seconds."""
    file = Path(name).expanduser() if name.endswith(ENDING) else None
    if file is not None:
        name = _named(file)
    found = find_tasks([name], None if file is None else file.parent)
    if [task.name for task in found] != [name]:
        raise UsageError(f"{name!r} is a group of tasks ({', '.join(task.name for task in found)}): name one of them.")
    (task,) = found
    kind = task.config.get("output_type", ASKED)
    if kind != ASKED:
        raise UsageError(f"the task {name!r} asks for {kind}, not for an answer in words: `vlmprune lmms` runs such tasks.")
    if task.config.get("doc_to_messages"):
        raise UsageError(f"the task {name!r} has messages of its own: `vlmprune lmms` runs such tasks.")
    check_tasks([task], force_simple=True)
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    logger.disable("lmms_eval")  # it reports each of its task files that is no task
    manager = TaskManager("ERROR", include_path=str(task.path.parent), include_defaults=False, model_name="vlmprune")
    try:
        return manager.load_task_or_group(name)[name]
    except Exception as error:  # datasets, pyarrow and the task's own code can raise anything
        cause = getattr(getattr(error, "last_attempt", None), "exception", lambda: None)() or error
        raise UsageError(f"the task {name!r} cannot be loaded ({type(cause).__name__}: {first_line(cause)}).") from error


def _named(file: Path) -> str:
    """The name of the task in a YAML file."""
    if not file.is_file():
        raise UsageError(f"there is no task file {file}: give the YAML file of a task of lmms-eval, or its name.")
    found = re.search(r"^task:\s*[\"']?([^\s\"']+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise UsageError(f"{file} is no task file of lmms-eval: it has no line `task: name`.")
    return found[1]


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
    try:
        return task.process_results(row, [given])
    except Exception as error:  # of the task's own code
        raise UsageError(
            f"the task's own code cannot score the answer {shown(given)} ({type(error).__name__}: {first_line(error)}): give "
            "--scorer."
        ) from error


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


def _readable(task: Any, rows: Any, number: int) -> bool:
    """Whether a row can be read, which decodes its pictures."""
    try:
        _visuals(task, rows[number])
    except UsageError:
        raise
    except Exception:  # of the task's own code, or of a picture that is no picture
        return False
    return True


def _broken(task: Any, rows: Any, number: int) -> Question:
    """Stands for a row that cannot be read: its picture says so when it is opened, and so it is refused or left out."""
    picture = TaskPicture(task, rows, number, 0)
    return Question(str(number), (picture,), "", (), scorer="task", judge=Judge(task, rows, number, ""))


def _question(task: Any, name: str, rows: Any, number: int, metric: str, scorer: str | None) -> Question:
    row = rows[number]
    text = task.doc_to_text(row)
    if not isinstance(text, str):
        raise UsageError(f"the task {name!r} has no text as the question of row {number}: found {shown(text)}.")
    target = task.doc_to_target(row)
    choices = tuple(map(str, task.doc_to_choice(row))) if task.config.doc_to_choice is not None else usual_choices(row)
    if isinstance(target, int) and choices:
        target = choices[target]
    answers = target if isinstance(target, list | tuple) else [target]
    group = next((str(row[column]) for column in USUAL["group"] if column in row), "")
    cluster = task.config.cluster_key
    pictures = tuple(TaskPicture(task, rows, number, place) for place in range(len(_visuals(task, row))))
    judge: Callable[[str], float] | None = None if scorer else Judge(task, rows, number, metric)
    return Question(
        id=str(number),
        images=pictures,
        text=text,
        answers=tuple(str(answer) for answer in answers),
        choices=choices,
        group=group,
        unit=str(row[cluster]) if cluster in row else "",
        scorer=scorer or "task",
        judge=judge,
    )
