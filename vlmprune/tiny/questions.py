"""Questions in seven skills about the objects and the sign of a scene, with their answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from vlmprune.tiny.drawing import PALETTE, SHAPES, SIZE

if TYPE_CHECKING:
    from vlmprune.tiny.scenes import Object, Sign

SKILLS: tuple[str, ...] = ("existence", "colour", "shape", "counting", "position", "relation", "reading")

COLUMNS: tuple[str, ...] = ("left", "centre", "right")
ROWS: tuple[str, ...] = ("top", "middle", "bottom")
COUNTS = 7
"""Possible answers to "how many": 0 to 6."""

_NEGATIVES_THAT_SHARE = 0.6
_CLEAR_OF_BORDER = 2
_APART = 10


@dataclass(frozen=True)
class Noun:
    """The last word of a noun phrase, by its index in the question, and the objects, by index, that the phrase means."""

    word: int
    objects: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene. `answer` is the exact text that the model should give."""

    skill: str
    text: str
    answer: str
    nouns: tuple[Noun, ...] = ()


Asker = Callable[[Sequence["Object"], "Sign | None", random.Random], "Question | None"]


def third(coordinate: int) -> int:
    """Which third of the picture (0, 1 or 2) a pixel coordinate lies in."""
    return min(2, coordinate * 3 // SIZE)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _unique(objects: Sequence[Object], key: Callable[[Object], str]) -> list[int]:
    """Indices of the objects whose `key` no other object has."""
    counts = Counter(map(key, objects))
    return [index for index, thing in enumerate(objects) if counts[key(thing)] == 1]


def _existence(objects: Sequence[Object], sign: Sign | None, rng: random.Random) -> Question | None:
    if rng.random() < 0.12:
        return Question("existence", "is there a number ?", "yes" if sign else "no", (Noun(3, ()),))
    present = {(thing.colour, thing.shape) for thing in objects}
    if objects and rng.random() < 0.5:
        colour, shape = rng.choice(sorted(present))
    else:
        # Most absent combinations share a colour or a shape with the picture, so that neither alone decides the answer.
        absent = [(c, s) for c in PALETTE for s in SHAPES if (c, s) not in present]
        colours, shapes = {c for c, _ in present}, {s for _, s in present}
        close = [(c, s) for c, s in absent if c in colours or s in shapes]
        colour, shape = rng.choice(close if close and rng.random() < _NEGATIVES_THAT_SHARE else absent)
    found = tuple(i for i, thing in enumerate(objects) if (thing.colour, thing.shape) == (colour, shape))
    text = f"is there {_article(colour)} {colour} {shape} ?"
    return Question("existence", text, "yes" if found else "no", (Noun(4, found),))


def _colour(objects: Sequence[Object], sign: Sign | None, rng: random.Random) -> Question | None:
    if not (choices := _unique(objects, lambda thing: thing.shape)):
        return None
    index = rng.choice(choices)
    return Question("colour", f"what colour is the {objects[index].shape} ?", objects[index].colour, (Noun(4, (index,)),))


def _shape(objects: Sequence[Object], sign: Sign | None, rng: random.Random) -> Question | None:
    if not (choices := _unique(objects, lambda thing: thing.colour)):
        return None
    index = rng.choice(choices)
    text = f"what shape is the {objects[index].colour} object ?"
    return Question("shape", text, objects[index].shape, (Noun(5, (index,)),))


def _counting(objects: Sequence[Object], sign: Sign | None, rng: random.Random) -> Question | None:
    groups: dict[str, tuple[int, ...]] = {"objects": tuple(range(len(objects)))}
    for colour in PALETTE:
        groups[f"{colour} objects"] = tuple(i for i, thing in enumerate(objects) if thing.colour == colour)
    for shape in SHAPES:
        plural = "crosses" if shape == "cross" else f"{shape}s"
        groups[plural] = tuple(i for i, thing in enumerate(objects) if thing.shape == shape)
    # Draw the count first, then something with this count: otherwise nearly every answer would be 0 or 1.
    count = rng.choice(sorted({len(group) for group in groups.values()}))
    phrase = rng.choice([name for name, group in groups.items() if len(group) == count])
    noun = Noun(1 + len(phrase.split()), groups[phrase])
    return Question("counting", f"how many {phrase} are there ?", str(count), (noun,))


def _position(objects: Sequence[Object], sign: Sign | None, rng: random.Random) -> Question | None:
    def clear(coordinate: int) -> bool:
        return all(abs(coordinate - border) > _CLEAR_OF_BORDER for border in (SIZE // 3, 2 * SIZE // 3))

    named = _unique(objects, lambda thing: thing.name)
    choices = [i for i in named if clear(objects[i].x) and clear(objects[i].y)]
    if not choices:
        return None
    index = rng.choice(choices)
    thing = objects[index]
    answer = f"{ROWS[third(thing.y)]} {COLUMNS[third(thing.x)]}"
    return Question("position", f"where is the {thing.name} ?", answer, (Noun(4, (index,)),))


def _relation(objects: Sequence[Object], sign: Sign | None, rng: random.Random) -> Question | None:
    pairs = list(combinations(_unique(objects, lambda thing: thing.name), 2))
    sideways = [pair for pair in pairs if abs(objects[pair[0]].x - objects[pair[1]].x) >= _APART]
    upright = [pair for pair in pairs if abs(objects[pair[0]].y - objects[pair[1]].y) >= _APART]
    horizontal = rng.random() < 0.5
    choices = sideways if horizontal else upright
    if not choices:
        return None
    first, second = rng.sample(rng.choice(choices), 2)
    one, other = objects[first], objects[second]
    if horizontal:
        text = f"is the {one.name} left or right of the {other.name} ?"
        answer = "left" if one.x < other.x else "right"
        return Question("relation", text, answer, (Noun(3, (first,)), Noun(10, (second,))))
    text = f"is the {one.name} above or below the {other.name} ?"
    answer = "above" if one.y < other.y else "below"
    return Question("relation", text, answer, (Noun(3, (first,)), Noun(9, (second,))))


def _reading(objects: Sequence[Object], sign: Sign | None, rng: random.Random) -> Question | None:
    if sign is None:
        return None
    return Question("reading", "what is the number ?", " ".join(sign.digits), (Noun(3, ()),))


_ASKERS: dict[str, Asker] = {
    "existence": _existence,
    "colour": _colour,
    "shape": _shape,
    "counting": _counting,
    "position": _position,
    "relation": _relation,
    "reading": _reading,
}


def ask(skill: str, objects: Sequence[Object], sign: Sign | None, rng: random.Random) -> Question | None:
    """One random question of a skill, or None where the scene does not allow any."""
    return _ASKERS[skill](objects, sign, rng)


def ask_each_skill(objects: Sequence[Object], sign: Sign | None, rng: random.Random, per_skill: int) -> tuple[Question, ...]:
    """Up to `per_skill` different questions of every skill."""
    asked: dict[str, Question] = {}
    for skill in SKILLS:
        for _ in range(per_skill):
            if question := ask(skill, objects, sign, rng):
                asked.setdefault(question.text, question)
    return tuple(asked.values())
