"""Questions from a folder with `questions.jsonl`: one JSON object per line; files are named relative to the folder.

    {"image": "cat.png", "question": "Is there a cat?", "answer": "Yes"}
    {"images": ["a.png", "b.png"], "question": "Which is older?", "choices": ["first", "second"], "answer": "A", "group": "age"}
    {"video": "door.mp4", "frames": 16, "question": "Does the door open?", "answer": "Yes"}

docs/evaluation.md describes every key.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError
from vlmprune.evals.question import Question
from vlmprune.evals.scorers import LETTERS, check_scorer
from vlmprune.loading.videos import VideoFile

FILE = "questions.jsonl"
KEYS = (
    "id",
    "image",
    "images",
    "video",
    "videos",
    "frames",
    "question",
    "answer",
    "answers",
    "choices",
    "group",
    "unit",
    "scorer",
)
LETTER_WANTED = "Answer with the option's letter."


def read_folder(
    folder: Path, needs: Collection[str] = (), most: int | None = None, scorer: str | None = None
) -> tuple[list[Question], list[str]]:
    """The questions of a folder, and what is to be known about them, as sentences. Pictures are not opened.

    Args:
        folder: holds `questions.jsonl` and the pictures.
        needs: "image" and "answer", where every question must have one.
        most: questions to read at most; None is all.
        scorer: for all questions that name none.

    Raises:
        UsageError: a file is missing, or a line cannot be read; says which.
    """
    path = folder / FILE
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON texts may hold other line separators
    except FileNotFoundError as error:
        raise UsageError(f'{folder} holds no {FILE}: write one {{"image": …, "question": …, "answer": …}} per line.') from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UsageError(f"{path} holds no questions: write one JSON object per line.")
    unread: dict[str, None] = {}
    questions = []
    for number, line in numbered[:most]:
        entry = _entry(line, where := f"{FILE} line {number}")
        unread |= dict.fromkeys(key for key in entry if key not in KEYS)
        questions.append(_question(folder, number, entry, where, needs, scorer))
    return questions, [f"{FILE} has keys that are not read: {', '.join(unread)}"] if unread else []


def _entry(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is no JSON ({error.msg}): write one JSON object per line.") from error
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is no JSON object, but {line.strip()[:40]}: write {{…}} with its keys.")
    return entry


def _question(
    folder: Path, number: int, entry: Mapping[str, Any], where: str, needs: Collection[str], scorer: str | None
) -> Question:
    filmed = _texts(entry, "video", where)
    names = _texts(entry, "image", where, needed="image" in needs)
    text = _text(entry, "question", where)
    answers = _texts(entry, "answer", where, needed=True) if "answer" in needs else ()
    choices = _texts(entry, "choices", where) if "choices" in entry else ()
    own = _text(entry, "scorer", where) if "scorer" in entry else scorer or usual_scorer(choices)
    try:
        check_scorer(own)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    paths = tuple(folder / name for name in names)
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{where}: {path} is a folder, give the path of a picture.")
    frames = entry.get("frames")
    if frames is not None and (not isinstance(frames, int) or isinstance(frames, bool) or frames < 1 or not filmed):
        raise UsageError(f"{where} needs a whole number from 1 as 'frames', beside a video: found {frames!r}.")
    shown = ", ".join((*names, *filmed))
    return Question(
        id=_text(entry, "id", where) if "id" in entry else f"{number} {shown}".strip(),
        images=paths,
        text=with_choices(text, choices),
        answers=answers,
        choices=choices,
        group=_text(entry, "group", where) if "group" in entry else "",
        unit=_text(entry, "unit", where) if "unit" in entry else shown or f"line {number}",
        scorer=own,
        videos=tuple(VideoFile(folder / name, frames) for name in filmed),
    )


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        found = repr(value) if key in entry else "only " + (", ".join(entry) or "an empty object")
        raise UsageError(f"{where} needs a text as {key!r}: found {found}.")
    return value


def _texts(entry: Mapping[str, Any], key: str, where: str, needed: bool = False) -> tuple[str, ...]:
    """One text under `key`, or a list of texts under its plural."""
    plural = key if key.endswith("s") else f"{key}s"
    if plural not in entry:
        return (_text(entry, key, where),) if needed or key in entry else ()
    if plural != key and key in entry:
        raise UsageError(f"{where} has both {key!r} and {plural!r}: give one of them.")
    values = entry[plural]
    wrong = not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values)
    if wrong or not values:
        raise UsageError(f"{where} needs a list of texts as {plural!r}: found {values!r}.")
    return tuple(values)


def usual_scorer(choices: Collection[str]) -> str:
    """The scorer of a question that names none."""
    return "choice" if choices else "normalised"


def with_choices(text: str, choices: Collection[str]) -> str:
    """A question with its choices, one per line after a letter; as it is where it has all of them in its words already."""
    if all(choice.lower() in text.lower() for choice in choices):
        return text
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([text, *lines, LETTER_WANTED])
