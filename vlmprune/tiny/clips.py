"""Drawn clips: eight frames of a scene in which objects move, appear, pass by and change their colour.

A clip depends only on its integer seed. Training draws seeds below `TRAINING_SEEDS`, the held-out splits are those of the
scenes (`vlmprune.tiny.scenes.SPLITS`). The surface behind the objects stays the same, every frame has its own pixel noise.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmprune.tiny import drawing
from vlmprune.tiny.clip_questions import ClipQuestion, ask_each_skill
from vlmprune.tiny.scenes import COLOURS, RADII, SHAPES, SIZE, SPLITS, Object

if TYPE_CHECKING:
    from PIL import Image

FRAMES = 8
"""Frames of every clip."""

ROLES: dict[str, float] = {"still": 0.12, "moving": 0.26, "appearing": 0.32, "passing": 0.14, "changing": 0.16}
"""What an object does in a clip, and how often: it stays; it moves along a line; it appears after the first frame and stays;
it is seen in one frame only; it changes its colour."""

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Directions in which objects move, as steps in x and y."""

_ACTORS = (3, 6)
_LENGTHS = (24, 54)
_MARGIN = 1


@dataclass(frozen=True)
class Actor:
    """An object over time: its role, and how it looks in every frame (None where it is not seen)."""

    role: str
    seen: tuple[Object | None, ...]

    @property
    def frames(self) -> tuple[int, ...]:
        """Frames in which the object is seen, rising."""
        return tuple(frame for frame, thing in enumerate(self.seen) if thing is not None)

    @property
    def start(self) -> Object:
        """How the object looks in the first frame in which it is seen."""
        return next(thing for thing in self.seen if thing is not None)

    @property
    def end(self) -> Object:
        """How the object looks in the last frame in which it is seen."""
        return next(thing for thing in reversed(self.seen) if thing is not None)

    @property
    def direction(self) -> str:
        """Where a moving object goes, a key of `DIRECTIONS`."""
        x, y = self.end.x - self.start.x, self.end.y - self.start.y
        if abs(x) > abs(y):
            return "right" if x > 0 else "left"
        return "down" if y > 0 else "up"


@dataclass(frozen=True)
class Clip:
    """What happens in a clip of `FRAMES` frames, and questions about it. All actors differ in shape and in colour."""

    actors: tuple[Actor, ...]
    questions: tuple[ClipQuestion, ...]
    seed: int

    def objects(self, frame: int) -> tuple[Object, ...]:
        """The objects of one frame, in the order of the actors."""
        return tuple(thing for actor in self.actors if (thing := actor.seen[frame]) is not None)

    def frames(self) -> list[Image.Image]:
        """Draw the frames."""
        noise = np.random.default_rng(self.seed)
        surface = drawing.background(random.Random(self.seed), noise)
        frames = []
        for frame in range(FRAMES):
            canvas = surface.copy()
            for thing in self.objects(frame):
                ink = random.Random(f"{self.seed} {thing.name}")  # the same in every frame
                drawing.paint_shape(canvas, thing.shape, thing.colour, thing.x, thing.y, thing.radius, ink)
            frames.append(drawing.develop(canvas, noise))
        return frames


def _act(role: str, shape: str, colour: str, other: str, rng: random.Random) -> Actor:
    """An actor of a role at a random place; `other` is the colour after a change."""
    radius = rng.choice(RADII)
    low, high = radius + _MARGIN, SIZE - 1 - radius - _MARGIN
    x, y = rng.randint(low, high), rng.randint(low, high)
    first, last, changed, length, step = 0, FRAMES, FRAMES, 0, (0, 0)
    if role == "moving":
        step, length = rng.choice(list(DIRECTIONS.values())), rng.randint(*_LENGTHS)
        x = rng.randint(low + max(0, -step[0] * length), high - max(0, step[0] * length))
        y = rng.randint(low + max(0, -step[1] * length), high - max(0, step[1] * length))
    elif role == "appearing":
        first = rng.randint(1, FRAMES - 1)
    elif role == "passing":
        first = rng.randint(1, FRAMES - 2)
        last = first + 1
    elif role == "changing":
        changed = rng.randint(2, FRAMES - 2)

    def look(frame: int) -> Object | None:
        if not first <= frame < last:
            return None
        gone = round(length * frame / (FRAMES - 1))
        return Object(shape, other if frame >= changed else colour, x + step[0] * gone, y + step[1] * gone, radius)

    return Actor(role, tuple(look(frame) for frame in range(FRAMES)))


def _apart(one: Actor, other: Actor) -> bool:
    """Whether two actors never touch."""
    pairs = [(a, b) for a, b in zip(one.seen, other.seen, strict=True) if a is not None and b is not None]
    return all((a.x - b.x) ** 2 + (a.y - b.y) ** 2 >= (a.radius + b.radius + 2) ** 2 for a, b in pairs)


def compose_clip(seed: int) -> Clip:
    """What happens in the clip of a seed, without questions and without drawing anything."""
    rng = random.Random(f"clip {seed}")
    number = rng.randint(*_ACTORS)
    shapes, colours = rng.sample(SHAPES, number), rng.sample(COLOURS, number + 1)
    actors: list[Actor] = []
    changes = False
    for shape, colour in zip(shapes, colours, strict=False):
        role = rng.choices(list(ROLES), list(ROLES.values()))[0]
        if role == "changing" and changes:
            role = "still"  # one change in a clip: there is one colour left to change to
        for _ in range(40):
            actor = _act(role, shape, colour, colours[-1], rng)
            if all(_apart(actor, other) for other in actors):
                actors.append(actor)
                changes = changes or role == "changing"
                break
    return Clip(tuple(actors), (), seed)


def make_clip(seed: int) -> Clip:
    """The clip of a seed with up to two questions for every skill that the clip allows."""
    clip = compose_clip(seed)
    return Clip(clip.actors, ask_each_skill(clip.actors, random.Random(f"questions {seed}"), per_skill=2), seed)


def held_out_clips(n: int, split: str = "test") -> Iterator[Clip]:
    """The first `n` clips of a held-out split."""
    return (make_clip(SPLITS[split] + index) for index in range(n))
