"""Questions from a Hugging Face dataset in a folder. What its columns mean is guessed from their usual names, or given."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune.errors import UsageError, shown, unknown
from vlmprune.evals.question import Question
from vlmprune.evals.question_files import usual_scorer, with_choices
from vlmprune.evals.scorers import LETTERS
from vlmprune.loading.datasets import open_dataset
from vlmprune.loading.pictures import decode_picture, open_picture

USUAL: dict[str, tuple[str, ...]] = {
    "id": ("question_id", "questionId", "id", "index", "idx"),
    "image": ("image", "images", "picture", "decoded_image"),
    "question": ("question", "query", "problem", "text", "prompt"),
    "answer": ("answers", "answer", "label", "labels", "target", "ground_truth", "solution"),
    "choices": ("choices", "options"),
    "group": ("category", "skill", "question_type", "type", "subfield", "subject", "topic"),
    "unit": ("image_id", "imageId", "image_source", "image_name"),
}
"""Usual names of the columns, by what they mean; the first that a dataset has counts."""


def read_dataset(
    folder: Path,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    needs: Collection[str] = (),
    most: int | None = None,
    scorer: str | None = None,
) -> tuple[list[Question], list[str]]:
    """The questions of a dataset, and which columns were read as what, as sentences. Pictures are not decoded.

    Args:
        folder: of the dataset.
        split: which to read, where it has several.
        columns: names of columns by their meanings, where they are unusual.
        needs: "image" and "answer", where every question must have one.
        most: questions to read at most; None is all.
        scorer: for all questions.

    Raises:
        UsageError: the dataset cannot be read, a column is missing, or a row has no question in it; says which.
    """
    rows = open_dataset(folder, split)
    names = Columns.find(rows, columns or {}, needs)
    rows = _undecoded(rows, names.all)
    count = len(rows) if most is None else min(most, len(rows))
    if not count:
        raise UsageError(f"the dataset in {folder} has no rows.")
    questions = [_question(folder, rows, number, names, needs, scorer) for number in range(count)]
    notes = [f"columns read: {names}"]
    if len({question.id for question in questions}) < count:
        notes.append(f"the column {names.names['id']} names several rows alike, so that rows are named by their numbers")
        questions = [replace(question, id=str(number)) for number, question in enumerate(questions)]
    return questions, notes


@dataclass(frozen=True)
class Columns:
    """What the columns of a dataset mean.

    Attributes:
        names: of columns, by their meanings.
        images: columns with pictures, in the order of the prompt.
        options: columns that hold one choice each.
        labels: names of the classes, where the answer is the number of one.
    """

    names: dict[str, str]
    images: tuple[str, ...]
    options: tuple[str, ...]
    labels: tuple[str, ...] | None

    @staticmethod
    def find(rows: Any, given: Mapping[str, str], needs: Collection[str]) -> Columns:
        """The columns of a dataset by their usual names, or those given.

        Raises:
            UsageError: a given one does not exist, or one that is needed is neither given nor usual.
        """
        present = list(rows.column_names)
        names: dict[str, str] = {}
        for meaning, usual in USUAL.items():
            if meaning in given:
                if given[meaning] not in present:
                    raise unknown("column", given[meaning], present)
                names[meaning] = given[meaning]
            elif name := next((name for name in usual if name in present), None):
                names[meaning] = name
        if "answer" not in needs:
            names.pop("answer", None)
        numbered = sorted((name for name in present if re.fullmatch(r"image_?\d+", name)), key=_number)
        images = (names.pop("image"),) if "image" in names else tuple(numbered)
        for meaning in ("question", *(meaning for meaning in ("answer", "image") if meaning in needs)):
            if meaning not in names and not (meaning == "image" and images):
                raise UsageError(
                    f"the dataset has no column for the {meaning} with a usual name; its columns are {', '.join(present)}: "
                    f"name one with --column {meaning}=…."
                )
        options = () if "choices" in names else lettered(present)
        labels = getattr(rows.features.get(names.get("answer", "")), "names", None)
        return Columns(names, images, options, None if labels is None else tuple(labels))

    @property
    def all(self) -> set[str]:
        """Every column that is read."""
        return {*self.names.values(), *self.images, *self.options}

    def value(self, row: Mapping[str, Any], meaning: str) -> Any:
        """What a row says; None where it says nothing."""
        if meaning == "choices" and self.options:
            return [row[name] for name in self.options if row[name] is not None]
        return row[self.names[meaning]] if meaning in self.names else None

    def __str__(self) -> str:
        found = [f"{name} as {meaning}" for meaning, name in self.names.items()]
        found += [f"{name} as image" for name in self.images] + [f"{name} as choice" for name in self.options]
        return ", ".join(found)


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))


def _undecoded(rows: Any, names: Collection[str]) -> Any:
    """Some columns of the rows, with pictures as bytes: one that cannot be decoded must not spoil its row."""
    rows = rows.select_columns(sorted(names))
    features = rows.features.copy()
    for name, feature in features.items():
        features[name] = _as_bytes(feature)
    return rows.cast(features)


def _as_bytes(feature: Any) -> Any:
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_as_bytes(feature.feature), length=feature.length)
    return feature


# -- one row -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StoredPicture:
    """A picture in a row of a dataset, read when it is opened: the pictures of all rows need not be in memory.

    Attributes:
        rows: of the dataset.
        row, columns: where it is.
        place: its number among the pictures of the row, from 0.
        folder: of the dataset, to which paths of files are relative.
    """

    rows: Any = field(repr=False)
    row: int
    columns: tuple[str, ...] = field(repr=False)
    place: int
    folder: Path

    def open(self) -> Image.Image:
        """The picture, as RGB.

        Raises:
            UsageError: it cannot be read.
        """
        name = f"picture {self.place + 1} of row {self.row}"
        entry = _entries(self.rows[self.row], self.columns)[self.place]
        if isinstance(entry, Mapping):
            entry = entry.get("bytes") or entry.get("path")
        if isinstance(entry, bytes):
            return decode_picture(entry, name, lambda note: None)
        if not isinstance(entry, str):
            raise UsageError(f"{name} is no picture, but {shown(entry)}: name another column as the image.")
        return open_picture(self.folder / entry, lambda note: None)


def _entries(row: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    """The pictures of a row, as they are stored: mappings with bytes or a path, bytes, or paths."""
    entries = []
    for name in columns:
        value = row[name]
        several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        entries += [one for one in (value if several else [value]) if one is not None]
    return entries


def _question(folder: Path, rows: Any, number: int, columns: Columns, needs: Collection[str], scorer: str | None) -> Question:
    where, row = f"row {number}", rows[number]
    text = columns.value(row, "question")
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where} needs a text as its question: found {shown(text)}.")
    choices = _choices(columns.value(row, "choices"))
    count = len(_entries(row, columns.images))
    images = tuple(StoredPicture(rows, number, columns.images, place, folder) for place in range(count))
    if "image" in needs and not images:
        raise UsageError(f"{where} has no picture.")
    answers = _answers(columns.value(row, "answer"), choices, columns.labels) if "answer" in needs else ()
    if "answer" in needs and not answers:
        raise UsageError(f"{where} has no right answer: found {shown(columns.value(row, 'answer'))}.")
    named = columns.value(row, "id")
    return Question(
        id=str(number if named is None else named),
        images=images,
        text=with_choices(text, choices),
        answers=answers,
        choices=choices,
        group=_name(columns.value(row, "group")),
        unit=_name(columns.value(row, "unit")),
        scorer=scorer or usual_scorer(choices),
    )


def _name(value: Any) -> str:
    return "" if value is None else str(value)


def lettered(columns: Collection[str]) -> tuple[str, ...]:
    """Columns A, B, … that hold one choice each; none if there are not at least two."""
    letters = tuple(letter for letter in LETTERS if letter in columns)
    return letters if letters[:2] == ("A", "B") else ()


def usual_choices(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The choices in a row, from columns with usual names."""
    if name := next((name for name in USUAL["choices"] if name in row), None):
        return _choices(row[name])
    return tuple(str(row[letter]) for letter in lettered(row) if row[letter] not in (None, "nan"))


def _choices(value: Any) -> tuple[str, ...]:
    """The choices of a row: a list, or a text that is one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            return ()
    return tuple(str(choice) for choice in value) if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _answers(value: Any, choices: Sequence[str], labels: Sequence[str] | None) -> tuple[str, ...]:
    """The right answers of a row: a text, the number of a choice or a class, or a list of texts or of mappings with them."""
    if isinstance(value, Mapping):  # datasets turns a list of mappings into a mapping of lists
        value = value.get("answer", value.get("text"))
    if isinstance(value, Sequence) and not isinstance(value, str):
        each = [one.get("answer", one.get("text")) if isinstance(one, Mapping) else one for one in value]
        return tuple(str(one) for one in each if one is not None)
    if isinstance(value, bool):
        return ("yes" if value else "no",)
    if isinstance(value, int) and labels is not None and 0 <= value < len(labels):
        return (labels[value],)
    if isinstance(value, int) and 0 <= value < len(choices):
        return (choices[value],)
    return () if value is None or not str(value).strip() else (str(value),)
