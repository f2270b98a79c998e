"""Questions in six skills about a clip, with their answers.

* `still`: colour or shape of an object that does nothing.
* `moment`: colour or shape of an object that is seen in one frame only.
* `change`: the first or the last colour of an object.
* `direction`: where an object moves.
* `order`: which of two objects appears before the other.
* `counting`: how many objects there are at first, at last, and how many appear after the first frame.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmprune.tiny.clips import Actor

CLIP_SKILLS: tuple[str, ...] = ("still", "moment", "change", "direction", "order", "counting")

CLIP_WORDS: tuple[str, ...] = ("at", "first", "last", "later", "does", "move", "appear", "before", "after", "up", "down")
"""Words of these questions and answers that questions about pictures do not have."""

_APART = 2
"""Two objects appear at least this many frames apart where their order is asked for."""

Sights = tuple[tuple[int, int], ...]
"""Sights of actors: (actor, frame) for each."""


@dataclass(frozen=True)
class ClipNoun:
    """The last word of a noun phrase, by its index in the question, and what it means.

    `early` and `late` are the sights that its two grounded attention heads look at in training.
    """

    word: int
    early: Sights
    late: Sights


@dataclass(frozen=True)
class ClipQuestion:
    """A question about a clip. `answer` is the exact text that the model should give."""

    skill: str
    text: str
    answer: str
    nouns: tuple[ClipNoun, ...] = ()


Asker = Callable[[Sequence["Actor"], random.Random], "ClipQuestion | None"]


def _sights(index: int, frames: Sequence[int]) -> Sights:
    return tuple((index, frame) for frame in frames)


def _with_role(actors: Sequence[Actor], role: str) -> list[int]:
    return [index for index, actor in enumerate(actors) if actor.role == role]


def _look(skill: str, role: str) -> Asker:
    """Colour of a shape, or shape of a colour, of an actor with a role."""

    def asker(actors: Sequence[Actor], rng: random.Random) -> ClipQuestion | None:
        if not (choices := _with_role(actors, role)):
            return None
        index = rng.choice(choices)
        thing, sights = actors[index].start, _sights(index, actors[index].frames)
        if rng.random() < 0.5:
            noun = ClipNoun(4, sights, sights)
            return ClipQuestion(skill, f"what colour is the {thing.shape} ?", thing.colour, (noun,))
        noun = ClipNoun(5, sights, sights)
        return ClipQuestion(skill, f"what shape is the {thing.colour} object ?", thing.shape, (noun,))

    return asker


def _change(actors: Sequence[Actor], rng: random.Random) -> ClipQuestion | None:
    if not (choices := _with_role(actors, "changing")):
        return None
    index = rng.choice(choices)
    actor, which = actors[index], rng.choice(("first", "last"))
    wanted = actor.start if which == "first" else actor.end
    frames = [frame for frame, thing in enumerate(actor.seen) if thing is not None and thing.colour == wanted.colour]
    noun = ClipNoun(7, _sights(index, frames), _sights(index, frames))
    return ClipQuestion("change", f"what is the {which} colour of the {wanted.shape} ?", wanted.colour, (noun,))


def _direction(actors: Sequence[Actor], rng: random.Random) -> ClipQuestion | None:
    if not (choices := _with_role(actors, "moving")):
        return None
    index = rng.choice(choices)
    actor = actors[index]
    frames = actor.frames
    noun = ClipNoun(4, _sights(index, frames[:2]), _sights(index, frames[-2:]))
    return ClipQuestion("direction", f"where does the {actor.start.name} move ?", actor.direction, (noun,))


def _order(actors: Sequence[Actor], rng: random.Random) -> ClipQuestion | None:
    pairs = [
        pair
        for pair in combinations(_with_role(actors, "appearing"), 2)
        if abs(actors[pair[0]].frames[0] - actors[pair[1]].frames[0]) >= _APART
    ]
    if not pairs:
        return None
    first, second = rng.sample(rng.choice(pairs), 2)
    one, other = actors[first], actors[second]
    text = f"does the {one.start.name} appear before or after the {other.start.name} ?"
    answer = "before" if one.frames[0] < other.frames[0] else "after"
    nouns = tuple(
        ClipNoun(word, _sights(index, actors[index].frames), _sights(index, actors[index].frames))
        for word, index in ((3, first), (10, second))
    )
    return ClipQuestion("order", text, answer, nouns)


def _counting(actors: Sequence[Actor], rng: random.Random) -> ClipQuestion | None:
    when = rng.choice(("at first", "at last", "later"))
    if when == "later":
        sights = tuple((index, actor.frames[0]) for index, actor in enumerate(actors) if actor.frames[0] > 0)
        return ClipQuestion("counting", "later how many objects appear ?", str(len(sights)), (ClipNoun(3, sights, sights),))
    frame = 0 if when == "at first" else len(actors[0].seen) - 1
    sights = tuple((index, frame) for index, actor in enumerate(actors) if actor.seen[frame] is not None)
    text = f"{when} how many objects are there ?"
    return ClipQuestion("counting", text, str(len(sights)), (ClipNoun(4, sights, sights),))


_ASKERS: dict[str, Asker] = {
    "still": _look("still", "still"),
    "moment": _look("moment", "passing"),
    "change": _change,
    "direction": _direction,
    "order": _order,
    "counting": _counting,
}


def ask(skill: str, actors: Sequence[Actor], rng: random.Random) -> ClipQuestion | None:
    """One random question of a skill, or None where the clip does not allow any."""
    return _ASKERS[skill](actors, rng)


def ask_each_skill(actors: Sequence[Actor], rng: random.Random, per_skill: int) -> tuple[ClipQuestion, ...]:
    """Up to `per_skill` different questions of every skill."""
    asked: dict[str, ClipQuestion] = {}
    for skill in CLIP_SKILLS:
        for _ in range(per_skill):
            if question := ask(skill, actors, rng):
                asked.setdefault(question.text, question)
    return tuple(asked.values())
