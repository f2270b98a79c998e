"""Many questions about each picture, packed into one sequence, with the targets of the auxiliary losses."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmprune.tiny.architecture import VOCABULARY
from vlmprune.tiny.questions import Question, ask
from vlmprune.tiny.scenes import COLOURS, GRID, SHAPES, SIZE, Scene
from vlmprune.tiny.training.code import DIGIT_SLOTS, FIELDS, Target

PATCHES = GRID * GRID
PREFIX = 2 + PATCHES
"""Tokens before the question: `<s> USER:` and the picture."""
MIXTURE = {
    "existence": 0.10,
    "colour": 0.09,
    "shape": 0.10,
    "counting": 0.23,
    "position": 0.15,
    "relation": 0.23,
    "reading": 0.10,
}
"""Share of each skill in the questions tried; counting and relation need the most training."""
QUESTIONS_TRIED = 24
"""Questions tried per scene; about fifteen of them are possible and different."""
SINGULAR = {("crosses" if shape == "cross" else f"{shape}s"): shape for shape in SHAPES}
COUNT_RULER = 2.0
"""Attention to `<s>` while counting, in units of one object: the share on the objects then depends on their count."""

Look = tuple[int, int, np.ndarray]
"""A picture, a token, and the distribution over the prefix that this token should attend to: `[PREFIX]`."""


@dataclass
class Looks:
    """Tokens (by picture and place in the packed questions) and the attention to the prefix that they should have: `wanted`
    `[n, PREFIX]`."""

    picture: Tensor
    token: Tensor
    wanted: Tensor

    @classmethod
    def of(cls, looks: list[Look]) -> Looks:
        wanted = np.stack([look[2] for look in looks]) if looks else np.zeros((0, PREFIX), np.float32)
        return cls(integers([look[0] for look in looks]), integers([look[1] for look in looks]), torch.from_numpy(wanted))


@dataclass
class Batch:
    """Packed questions about `B` pictures, padded to `Q` tokens each.

    Attributes:
        ids, position_ids: `[B, Q]`.
        mask: `[B, 1, Q, PREFIX + Q]` bool; every question attends to the prefix and to itself.
        picture, token: `[n]` the tokens that predict an answer.
        labels: `[n]` what they predict.
        question: `[n]` the question that they belong to.
        skills: skill of each question.
        words, nouns, digits: colour and shape words; last words of noun phrases; tokens before a digit of the answer.
        placed: `[m]` rows of `nouns` that mean one object.
        places: `[m, 2]` the places of these objects, −1 to 1.
    """

    ids: Tensor
    position_ids: Tensor
    mask: Tensor
    picture: Tensor
    token: Tensor
    labels: Tensor
    question: Tensor
    skills: list[str]
    words: Looks
    nouns: Looks
    digits: Looks
    placed: Tensor
    places: Tensor


def pose(scene: Scene, rng: random.Random) -> list[Question]:
    """Different questions about one scene, skills drawn from `MIXTURE`."""
    asked: dict[str, Question] = {}
    for skill in rng.choices(list(MIXTURE), list(MIXTURE.values()), k=QUESTIONS_TRIED):
        if question := ask(skill, scene.objects, scene.sign, rng):
            asked.setdefault(question.text, question)
    return list(asked.values())


class Sequences:
    """The questions about some pictures, put one after the other in one sequence for each picture.

    Attributes:
        skills: skill of each question.
    """

    def __init__(self, pictures: int, vocabulary: Mapping[str, int]) -> None:
        self._vocabulary, self.skills = vocabulary, list[str]()
        self._tokens: list[list[int]] = [[] for _ in range(pictures)]
        self._places: list[list[int]] = [[] for _ in range(pictures)]
        self._owners: list[list[int]] = [[] for _ in range(pictures)]
        self._answers: list[tuple[int, int, int, int]] = []

    def add(self, picture: int, text: list[str], answer: list[str], skill: str) -> int:
        """Put a question and its answer behind those that `picture` has; returns the place of its first token."""
        start = len(self._tokens[picture])
        sequence = [self._vocabulary[word] for word in (*text, "ASSISTANT:", *answer)]
        for offset, word in enumerate((*answer, "</s>")):
            self._answers.append((picture, start + len(text) + offset, self._vocabulary[word], len(self.skills)))
        self._tokens[picture] += sequence
        self._places[picture] += range(len(sequence))
        self._owners[picture] += [len(self.skills)] * len(sequence)
        self.skills.append(skill)
        return start

    def packed(self, prefix: int) -> dict[str, Any]:
        """The fields that `Batch` and a batch of clips have in common, behind a prefix of so many tokens."""
        length = -(-max(map(len, self._tokens)) // 16) * 16
        owner = padded(self._owners, length, -1)
        own = (owner[:, :, None] == owner[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
        picture, token, labels, question = (integers(list(column)) for column in zip(*self._answers, strict=True))
        return {
            "ids": padded(self._tokens, length, self._vocabulary["<pad>"]),
            "position_ids": prefix + padded(self._places, length, 0),
            "mask": torch.cat([torch.ones(len(self._tokens), length, prefix, dtype=torch.bool), own], 2)[:, None],
            "picture": picture,
            "token": token,
            "labels": labels,
            "question": question,
            "skills": self.skills,
        }


def pack(scenes: list[Scene], targets: list[Target], questions: list[list[Question]]) -> Batch:
    """Put the questions about each scene one after the other."""
    sequences = Sequences(len(scenes), VOCABULARY)
    words: list[Look] = []
    nouns: list[Look] = []
    digits: list[Look] = []
    placed: list[int] = []
    places: list[tuple[float, float]] = []
    middle = (SIZE - 1) / 2
    for picture, (scene, known, asked) in enumerate(zip(scenes, targets, questions, strict=True)):
        for question in asked:
            text = question.text.split()
            start = sequences.add(picture, text, question.answer.split(), question.skill)
            for offset, word in enumerate(text):
                if (patches := _saying(word, known)) is not None:
                    words.append((picture, start + offset, _distribution(patches)))
            for noun in question.nouns:
                if len(noun.objects) == 1 and question.skill != "counting":
                    thing = scene.objects[noun.objects[0]]
                    placed.append(len(nouns))
                    places.append(((thing.x - middle) / middle, (thing.y - middle) / middle))
                nouns.append((picture, start + noun.word, _meant(question, text[noun.word], noun.objects, known)))
            if question.skill == "reading":
                for slot in range(DIGIT_SLOTS):
                    digits.append((picture, start + len(text) + slot, _distribution(known.slots[:, slot] >= 0)))

    return Batch(
        **sequences.packed(PREFIX),
        words=Looks.of(words),
        nouns=Looks.of(nouns),
        digits=Looks.of(digits),
        placed=integers(placed),
        places=torch.tensor(places).reshape(-1, 2),
    )


def integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def padded(rows: list[list[int]], length: int, filler: int) -> Tensor:
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])


def distribution(weights: np.ndarray, start: float = 0.0) -> np.ndarray:
    """Weights over the prefix as a distribution, with `start` on `<s>` (everything, if no token has a weight)."""
    weights = weights.copy()
    weights[0] = start if start or weights.any() else 1
    return weights / weights.sum()


def _distribution(patches: np.ndarray, start: float = 0.0) -> np.ndarray:
    """A distribution over the prefix from weights per patch, with `start` on `<s>`."""
    wanted = np.zeros(PREFIX, np.float32)
    wanted[2:] = patches
    return distribution(wanted, start)


def _saying(word: str, known: Target) -> np.ndarray | None:
    """Patches that encode a colour or a shape word, or None for other words."""
    if word in COLOURS:
        return known.code[:, FIELDS["colour"].start + COLOURS.index(word)]
    shape = SINGULAR.get(word, word)
    return known.code[:, FIELDS["shape"].start + SHAPES.index(shape)] if shape in SHAPES else None


def _meant(question: Question, word: str, objects: tuple[int, ...], known: Target) -> np.ndarray:
    """What the last word of a noun phrase should attend to: the objects that it means, or `<s>` if there is none."""
    if word == "number":
        by_slot = known.slots >= 0
        return _distribution((by_slot / np.maximum(by_slot.sum(0), 1)).sum(1))
    belongs = np.isin(known.object_of, objects)
    if question.skill == "counting":
        return _distribution(known.centre & belongs, COUNT_RULER)
    return _distribution(known.core & belongs)
