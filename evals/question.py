"""One kind of question for every command: pictures or videos, a text, the right answers, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.loading.pictures import open_picture

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Question:
    """A question about no, one or several pictures or videos.

    Attributes:
        id: in reports and result files; no two questions of a set have the same.
        images: pictures in the order of the prompt: a PIL image, the path of a file, or an object with `open()`, which gives a
            PIL image.
        text: what is asked, choices among it. A text with the model's image token is the whole prompt.
        answers: all of them are right; empty where the answer is not known.
        choices: possible answers, for multiple choice.
        group: skill or category, of which the results have a column each.
        unit: what is independent of other units, usually the picture. Intervals resample whole units.
        scorer: name in `scorers.SCORERS`.
        judge: for the scorer `task`: the score of an answer.
        videos: videos in the order of the prompt: a list of frames as PIL images, or an object with `frames()`, which gives
            one.
    """

    id: str
    images: tuple[Any, ...]
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    group: str = ""
    unit: str = ""
    scorer: str = "exact"
    judge: Callable[[str], float] | None = field(default=None, compare=False, repr=False)
    videos: tuple[Any, ...] = field(default=(), repr=False)

    def pictures(self, report: Callable[[str], object] = lambda note: None) -> list[Image.Image]:
        """The pictures as RGB; files are opened at each call.

        Args:
            report: called with one sentence for everything that was lost when a file was read.

        Raises:
            UsageError: a picture cannot be read.
        """
        return [opened(image, report) for image in self.images]

    def clips(self) -> list[list[Image.Image]]:
        """The frames of every video."""
        return [video.frames() if hasattr(video, "frames") else list(video) for video in self.videos]


@dataclass(frozen=True)
class QuestionSet:
    """Questions in a fixed order.

    Attributes:
        name: where they come from, as the user named it.
        questions: all of them.
        fingerprint: hash of everything that is asked: texts, answers, choices, groups, scorers and pixels.
        max_new_tokens: longest answer, in tokens.
        until: texts at which an answer ends.
        metric: name of the score that a task of lmms-eval gives its answers, where that is the scorer.
        notes: what was left out or lost when the questions were read, as sentences.
        skipped: ids of the questions that were left out, because a picture cannot be read.
    """

    name: str
    questions: tuple[Question, ...]
    fingerprint: str
    max_new_tokens: int = 32
    until: tuple[str, ...] = ()
    metric: str = ""
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def scorers(self) -> list[str]:
        """How its answers are scored, for tables."""
        names = sorted({question.scorer for question in self.questions})
        return [f"{self.metric} of lmms-eval" if name == "task" else name for name in names]

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[Question]:
        return iter(self.questions)

    def __getitem__(self, number: int) -> Question:
        return self.questions[number]


def opened(image: Any, report: Callable[[str], object] = lambda note: None) -> Image.Image:
    """An entry of `Question.images` as an RGB picture.

    Raises:
        UsageError: it cannot be read.
    """
    if isinstance(image, str | Path):
        return open_picture(image, report)
    picture = image.open() if hasattr(image, "open") else image
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def key_of(image: Any) -> Any:
    """Equal for entries of `Question.images` that surely are the same picture: the path of a file, or the object itself."""
    return image if isinstance(image, Path) else id(image)
