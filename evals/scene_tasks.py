"""The documents, pictures and metrics of our own tasks for lmms-eval (`evals/tasks/`): questions about drawn scenes, offline.

A document names the seed of its scene, and the picture is drawn when it is asked about: nothing is downloaded or stored. The
tasks read `evals/tasks/scenes.jsonl`, which says which scenes; a copy of a task's YAML file with another such file asks about
others.

Existence follows POPE (Li et al., EMNLP 2023, arXiv:2305.10355): as many objects that are there as objects that are not, and
three ways to choose the latter:

    random       any colour and shape that is not in the picture
    popular      those that are in most of the other pictures
    adversarial  its colour is in the picture, and its shape too, but on different objects

In POPE, adversarial objects are those that often stand beside the ones in the picture; drawn objects are independent, so we
take what is hard here. The yes-ratio is that of the *answers*; half of the right ones are yes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from PIL import Image

from vlmprune.tiny.questions import SKILLS
from vlmprune.tiny.scenes import COLOURS, SHAPES, Scene, held_out, make_scene

Document = dict[str, Any]
Thing = tuple[str, str]
"""Colour and shape."""
PAIRS = 3
"""Objects that are there, and as many that are not, in the questions about one picture; fewer if there are fewer."""
CHOICES = {"colour": COLOURS, "shape": SHAPES}


# -- documents: what `process_docs` makes of the lines of scenes.jsonl --------------------------------------------------------


def everything(lines: Iterable[Mapping[str, Any]]) -> Any:
    """Every question of `vlmprune eval` about the same scenes, in its order."""
    return _dataset(_asked(lines, SKILLS))


def attributes(lines: Iterable[Mapping[str, Any]]) -> Any:
    """Colours and shapes, with all colours or shapes as choices for tasks that are scored by likelihood."""
    return _dataset({**document, "choices": list(CHOICES[document["skill"]])} for document in _asked(lines, tuple(CHOICES)))


def counting(lines: Iterable[Mapping[str, Any]]) -> Any:
    """How many objects of a kind there are."""
    return _dataset(_asked(lines, ("counting",)))


def position(lines: Iterable[Mapping[str, Any]]) -> Any:
    """In which ninth of the picture an object is."""
    return _dataset(_asked(lines, ("position",)))


def relation(lines: Iterable[Mapping[str, Any]]) -> Any:
    """On which side of another object an object is."""
    return _dataset(_asked(lines, ("relation",)))


def reading(lines: Iterable[Mapping[str, Any]]) -> Any:
    """The number on the sign."""
    return _dataset(_asked(lines, ("reading",)))


def existence_random(lines: Iterable[Mapping[str, Any]]) -> Any:
    """Objects that are there, and any that are not."""
    return _dataset(_existence(lines, lambda scenes: _shuffled))


def existence_popular(lines: Iterable[Mapping[str, Any]]) -> Any:
    """Objects that are there, and those that are not but are in most other pictures."""
    return _dataset(_existence(lines, lambda scenes: partial(_most_frequent, Counter(t for s in scenes for t in _things(s)))))


def existence_adversarial(lines: Iterable[Mapping[str, Any]]) -> Any:
    """Objects that are there, and those whose colour and shape are in the picture on different objects."""
    return _dataset(_existence(lines, lambda scenes: _mixed))


def _asked(lines: Iterable[Mapping[str, Any]], skills: Sequence[str]) -> Iterator[Document]:
    for scene in _scenes(lines):
        for question in scene.questions:
            if question.skill in skills:
                yield _document(scene, question.skill, question.text, question.answer)


Chooser = Callable[[Sequence[Thing], set[Thing], random.Random], list[Thing]]
"""From what is not in a picture, what is there, and a source of chance to the best negatives, the best first."""


def _existence(lines: Iterable[Mapping[str, Any]], chooser: Callable[[Sequence[Scene]], Chooser]) -> Iterator[Document]:
    scenes = _scenes(lines)
    choose = chooser(scenes)
    for scene in scenes:
        rng = random.Random(scene.seed)
        there = _things(scene)
        absent = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in there]
        no, yes = choose(absent, there, rng), rng.sample(sorted(there), min(PAIRS, len(there)))
        count = min(len(yes), len(no))
        for thing, answer in [*((thing, "yes") for thing in yes[:count]), *((thing, "no") for thing in no[:count])]:
            yield _document(scene, "existence", _is_there(*thing), answer)


def _shuffled(absent: Sequence[Thing], there: set[Thing], rng: random.Random) -> list[Thing]:
    return rng.sample(absent, len(absent))


def _most_frequent(frequency: Counter[Thing], absent: Sequence[Thing], there: set[Thing], rng: random.Random) -> list[Thing]:
    return sorted(_shuffled(absent, there, rng), key=lambda thing: -frequency[thing])


def _mixed(absent: Sequence[Thing], there: set[Thing], rng: random.Random) -> list[Thing]:
    colours, shapes = {colour for colour, _ in there}, {shape for _, shape in there}
    return [thing for thing in _shuffled(absent, there, rng) if thing[0] in colours and thing[1] in shapes]


def _is_there(colour: str, shape: str) -> str:
    return f"is there {'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape} ?"


def _things(scene: Scene) -> set[Thing]:
    return {(thing.colour, thing.shape) for thing in scene.objects}


def _scenes(lines: Iterable[Mapping[str, Any]]) -> list[Scene]:
    return [scene for line in lines for scene in held_out(line["scenes"], line["split"])]


def _document(scene: Scene, skill: str, question: str, answer: str) -> Document:
    return {"scene": scene.seed, "skill": skill, "question": question, "answer": answer}


def _dataset(documents: Iterable[Document]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(list(documents))


# -- what the model is given --------------------------------------------------------------------------------------------------


def picture(document: Document) -> list[Image.Image]:
    """The scene of a document, drawn."""
    return [_drawn(document["scene"])]


@lru_cache(maxsize=64)
def _drawn(seed: int) -> Image.Image:
    return make_scene(seed).image


def question(document: Document, words: Mapping[str, str] | None = None) -> str:
    """The text of a question, between `pre_prompt` and `post_prompt` of the task's `lmms_eval_specific_kwargs`."""
    words = words or {}
    return f"{words.get('pre_prompt', '')}{document['question']}{words.get('post_prompt', '')}"


# -- metrics ------------------------------------------------------------------------------------------------------------------


def judge(document: Document, results: Sequence[str]) -> dict[str, Any]:
    """The score of an answer, among all and in its skill. Case, spaces between digits and a full stop do not count."""
    score = float(_plain(results[0]) == _plain(document["answer"]))
    entry = {"score": score, "picture": document["scene"], "skill": document["skill"]}
    return {"accuracy": entry, "mean_of_skills": entry, document["skill"]: entry}


def judge_existence(document: Document, results: Sequence[str]) -> dict[str, Any]:
    """Right answer and given answer; given is "" if the answer's first word is neither yes nor no."""
    first = next(iter(results[0].lower().replace(",", " ").replace(".", " ").split()), "")
    given = first if first in ("yes", "no") else ""
    right, scene = document["answer"], document["scene"]
    entry = {"score": float(given == right), "picture": scene, "right": right, "given": given}
    return dict.fromkeys(("accuracy", "precision", "recall", "f1", "yes_ratio", "unclear"), entry)


def accuracy(entries: Sequence[Mapping[str, Any]]) -> float:
    """Share of right answers."""
    return sum(entry["score"] for entry in entries) / len(entries)


def mean_of_skills(entries: Sequence[Mapping[str, Any]]) -> float:
    """Mean over skills of their accuracies."""
    skills = {entry["skill"] for entry in entries}
    return sum(accuracy([entry for entry in entries if entry["skill"] == skill]) for skill in skills) / len(skills)


def precision(entries: Sequence[Mapping[str, Any]]) -> float:
    """Share of the answers yes that are right."""
    return _share(entries, "given", "right")


def recall(entries: Sequence[Mapping[str, Any]]) -> float:
    """Share of the objects that are there and were seen."""
    return _share(entries, "right", "given")


def f1(entries: Sequence[Mapping[str, Any]]) -> float:
    """Harmonic mean of precision and recall."""
    one, other = precision(entries), recall(entries)
    return 2 * one * other / (one + other) if one + other else 0.0


def yes_ratio(entries: Sequence[Mapping[str, Any]]) -> float:
    """Share of the *answers* that are yes. More than half: the model says yes too readily."""
    return sum(entry["given"] == "yes" for entry in entries) / len(entries)


def unclear(entries: Sequence[Mapping[str, Any]]) -> float:
    """Share of the answers that are neither yes nor no."""
    return sum(not entry["given"] for entry in entries) / len(entries)


def _share(entries: Sequence[Mapping[str, Any]], among: str, which: str) -> float:
    """Among the entries whose `among` is yes, the share of those whose `which` is yes; 0 if there are none."""
    found = [entry[which] == "yes" for entry in entries if entry[among] == "yes"]
    return sum(found) / len(found) if found else 0.0


def _plain(text: str) -> str:
    words = text.lower().strip().rstrip(".").split()
    return "".join(words) if all(word.isdigit() for word in words) else " ".join(words)
