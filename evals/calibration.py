"""Pictures with questions for choosing settings: a folder with `questions.jsonl`, or scenes of the embedded model's world.

One JSON object per line; pictures are named relative to the folder (docs/tuning.md):

    {"image": "cat.png", "question": "Is there a cat?", "answer": "Yes"}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlmprune
from vlmprune.loading.pictures import open_picture, summary
from vlmprune.loading.prompts import make_inputs, prompt_text

FILE = "questions.jsonl"
KEEP_ALL = "random:layer=0,fraction=1"
"""Drops nothing, so that it runs exactly as the un-pruned model does, and leaves a record of the prompt."""


@dataclass(frozen=True, eq=False)
class Question:
    """A picture (or its path), a question, and its answer where there is one; `name` is for reports."""

    picture: Any
    text: str
    answer: str = ""
    name: str = ""


@dataclass(frozen=True, eq=False)
class Sample:
    """A question as a model takes it.

    Attributes:
        inputs: the processor's output for one prompt, without padding.
        answer: ids of the right answer's tokens; empty where there is none.
        name: for reports.
    """

    inputs: Mapping[str, Any]
    answer: tuple[int, ...] = ()
    name: str = ""

    def after_answer(self, tokens: int) -> Sample:
        """The same with the first `tokens` of the right answer appended to the prompt (teacher forcing)."""
        if not tokens:
            return self
        ids: Tensor = self.inputs["input_ids"]
        said = torch.tensor([self.answer[:tokens]], device=ids.device)
        longer = dict(self.inputs)
        for name, value in self.inputs.items():
            if isinstance(value, Tensor) and value.shape == ids.shape:  # one entry per token: mask, kind of token
                own = said if name == "input_ids" else torch.full_like(said, name == "attention_mask")
                longer[name] = torch.cat((value, own.to(value.dtype)), dim=1)
        return replace(self, inputs=longer)


def read(folder: Path, answers: bool, most: int | None = None) -> list[Question]:
    """The questions of a folder, checked before anything is computed; pictures are not opened yet.

    Args:
        folder: holds `questions.jsonl` and the pictures.
        answers: whether every question needs its answer; if not, answers are ignored.
        most: questions to read at most; None is all.

    Raises:
        vlmprune.UsageError: a folder or file is missing, or a line cannot be read; says which.
    """
    if not folder.is_dir():
        raise vlmprune.UsageError(f"there is no folder {folder}: give one that holds {FILE} and the pictures.")
    path = folder / FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise vlmprune.UsageError(
            f'{folder} holds no {FILE}: write one {{"image": …, "question": …, "answer": …}} per line.'
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise vlmprune.UsageError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise vlmprune.UsageError(f"{path} holds no questions: write one JSON object per line.")
    return [_question(folder, number, line, answers) for number, line in numbered[:most]]


def fewer(found: int, wanted: int | None) -> list[str]:
    """A sentence if there are fewer questions than were asked for."""
    return [] if wanted is None or found >= wanted else [f"there are {found} questions, fewer than the {wanted} asked for"]


def _question(folder: Path, number: int, line: str, answers: bool) -> Question:
    where = f"{FILE} line {number}"
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise vlmprune.UsageError(f"{where} is no JSON ({error.msg}): write one JSON object per line.") from error
    if not isinstance(entry, dict):
        raise vlmprune.UsageError(f"{where} is no JSON object, but {line.strip()[:40]}: write {{…}} with its keys.")
    for key in ("image", "question", "answer")[: 3 if answers else 2]:
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            found = repr(entry[key]) if key in entry else "only " + (", ".join(entry) or "an empty object")
            raise vlmprune.UsageError(f"{where} needs a text as {key!r}: found {found}.")
    picture = folder / entry["image"]
    if not picture.is_file():
        raise vlmprune.UsageError(f"{where}: there is no picture at {picture}.")
    return Question(picture, entry["question"], entry["answer"] if answers else "", f"{number} {entry['image']}")


def scenes(images: int, split: str = "dev") -> list[Question]:
    """One question about each of some held-out scenes of the embedded model, cycling through the skills; independent."""
    from vlmprune.tiny.scenes import SKILLS, held_out

    asked = []
    for number, scene in enumerate(held_out(images, split)):
        wanted = [*SKILLS[number % len(SKILLS) :], *SKILLS[: number % len(SKILLS)]]  # not every scene has a sign to read
        question = min(scene.questions, key=lambda question: wanted.index(question.skill))
        asked.append(Question(scene.image, question.text, question.answer, f"{split} {number} {question.skill}"))
    return asked


def samples(processor: Any, questions: Sequence[Question], device: Any = "cpu") -> Iterator[Sample]:
    """The questions as samples, one at a time, so that not all pixels are in memory at once. Questions and answers are checked
    at once.

    Raises:
        vlmprune.UsageError: an answer is not in the vocabulary; or, when its sample is taken, a picture cannot be read.
    """
    texts = [prompt_text(processor, question.text) for question in questions]
    answers = [
        answer_tokens(processor.tokenizer, text, question) if question.answer else ()
        for text, question in zip(texts, questions, strict=True)
    ]

    def sample(question: Question, text: str, answer: tuple[int, ...]) -> Sample:
        picture = question.picture
        if isinstance(picture, Path):
            picture = open_picture(picture, lambda note: None)  # `check_pictures` reports the notes
        return Sample(make_inputs(processor, picture, text, device), answer, question.name)

    return map(sample, questions, texts, answers)


def check_pictures(questions: Sequence[Question]) -> list[str]:
    """Read every picture that is a file, and report what their values lost, as sentences.

    Raises:
        vlmprune.UsageError: one cannot be read.
    """
    notes: list[str] = []
    for question in questions:
        if isinstance(question.picture, Path):
            open_picture(question.picture, notes.append)
    return summary(notes)


def answer_tokens(tokenizer: Any, prompt: str, question: Question) -> tuple[int, ...]:
    """Ids of the tokens that a model would have to generate: what an answer after the prompt adds to it.

    A space is put between them unless the prompt ends with white space (a chat template's new line).

    Raises:
        vlmprune.UsageError: the answer is not in the vocabulary.
    """
    between = "" if prompt[-1:].isspace() else " "
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + between + question.answer)["input_ids"]
    start = _common(before, whole)
    end = len(whole) - _common(before[start:][::-1], whole[start:][::-1])  # a tokenizer may end every text with a token
    added = tuple(whole[start:end])
    if not added or tokenizer.unk_token_id in added:
        raise vlmprune.UsageError(
            f"the model has no token for the answer {question.answer!r} ({question.name}): check its spelling."
        )
    return added


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of the first entries are equal."""
    shorter = min(len(one), len(other))
    return next((n for n in range(shorter) if one[n] != other[n]), shorter)


# -- running one sample ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unpruned:
    """A sample under the un-pruned model.

    Attributes:
        layers: decoder layers of the model.
        visual: visual tokens of each image.
        logits: `[vocabulary]` fp32 of the token that follows the prompt.
    """

    layers: int
    visual: tuple[int, ...]
    logits: Tensor


def run_unpruned(model: Any, sample: Sample) -> Unpruned:
    """Run a sample without dropping anything.

    Raises:
        vlmprune.UsageError: not one un-padded prompt with a picture.
    """
    ids, mask = sample.inputs["input_ids"], sample.inputs.get("attention_mask")
    if ids.shape[0] != 1 or (mask is not None and not bool(mask.all())):
        raise vlmprune.UsageError(
            f"a sample is one prompt without padding, found {ids.shape[0]} row(s) of {ids.shape[1]} tokens: give one at a time."
        )
    with vlmprune.wrap(model, KEEP_ALL) as run:
        logits = next_logits(model, sample)[0]
    assert run.last is not None
    return Unpruned(run.last.shape.layers, tuple(kept.original for kept in run.last.kept), logits)


@torch.inference_mode()
def next_logits(model: Any, sample: Sample, rows: int = 1) -> Tensor:
    """`[rows, vocabulary]` fp32 logits of the token that follows the prompt, for `rows` copies of it.

    `generate` encodes the images once and then copies their features, in the form of every family. It copies for sampling
    only, so one token is sampled and ignored. The random state of torch is restored.
    """
    cuda = [sample.inputs["input_ids"].device] if sample.inputs["input_ids"].is_cuda else []
    with torch.random.fork_rng(devices=cuda):
        output = model.generate(
            **sample.inputs,
            do_sample=True,
            num_beams=1,
            num_return_sequences=rows,
            max_new_tokens=1,
            use_cache=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return output.logits[0].float()
