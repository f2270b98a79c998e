"""The questions that a command asks: those of `--data`, or scenes of the embedded model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmprune.errors import UsageError, unknown

if TYPE_CHECKING:
    from vlmprune.evals.question import QuestionSet

MEANINGS = ("id", "image", "question", "answer", "choices", "group", "unit")


@dataclass(frozen=True)
class Data:
    """What the options of a command say about its questions; see `evals.questions.open_questions`."""

    name: str | None
    images: int | None = None
    split: str | None = None
    scorer: str | None = None
    columns: Sequence[str] = ()
    skip_bad: bool = False
    max_new_tokens: int | None = None

    def check(self, model: str) -> None:
        """Refuse what can be refused before torch is imported.

        Raises:
            UsageError: another model than the embedded one without `--data`, an unknown split of scenes or clips, an unknown
                scorer, or a `--column` that cannot be read.
        """
        if self.name is None and model != "tiny":
            raise UsageError("the built-in scenes are for the embedded model: give --data with questions for yours.")
        if self.name in (None, "clips") and self.split is not None:
            from vlmprune.tiny.scenes import SPLITS

            if self.split not in SPLITS:
                raise unknown("split", self.split, SPLITS)
        self.meanings()
        if self.scorer is not None:
            from vlmprune.evals.scorers import check_scorer

            check_scorer(self.scorer)

    def meanings(self) -> dict[str, str]:
        """The `--column` options as a mapping from meanings to names.

        Raises:
            UsageError: one of them cannot be read, or has an unknown meaning.
        """
        found = {}
        for text in self.columns:
            meaning, equals, name = (part.strip() for part in text.partition("="))
            if not equals or not meaning or not name:
                raise UsageError(f"cannot read --column {text!r}: write meaning=name, for example question=query.")
            if meaning not in MEANINGS:
                raise unknown("meaning of a column", meaning, MEANINGS)
            found[meaning] = name
        return found

    def open(self, needs: Collection[str] = ("answer",), seed: int = 0) -> QuestionSet:
        """The questions, with every picture read once.

        Raises:
            UsageError: they cannot be asked; says why.
        """
        from vlmprune.evals.questions import SCENES, open_questions

        return open_questions(
            self.name or SCENES,
            self.images,
            split=self.split,
            seed=seed,
            scorer=self.scorer,
            columns=self.meanings(),
            needs=needs,
            skip_bad=self.skip_bad,
            max_new_tokens=self.max_new_tokens,
        )
