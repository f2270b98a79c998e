"""Accuracy of the tiny model per skill on held-out scenes: `python -m vlmprune.tiny.evaluate`."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vlmprune.tiny import CHECKPOINT, load
from vlmprune.tiny.answers import Accuracy, Record, accuracy_by_skill, answer, mean_over_skills
from vlmprune.tiny.questions import SKILLS
from vlmprune.tiny.scenes import COLOURS, SHAPES, SPLITS, Question, Scene, held_out

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import ProcessorMixin

    from vlmprune.tiny.clip_questions import ClipQuestion
    from vlmprune.tiny.clips import Clip


def shifted(picture: Image.Image, pixels: int) -> Image.Image:
    """The picture moved right and down by some pixels, its first column and row repeated to fill the gap."""
    if not pixels:
        return picture
    whole = np.pad(np.asarray(picture), ((pixels, 0), (pixels, 0), (0, 0)), mode="edge")
    return Image.fromarray(whole[:-pixels, :-pixels])


def records(
    model: Any,
    processor: ProcessorMixin,
    scenes: Iterable[Scene],
    shift: int = 0,
    batch_size: int = 64,
    **generate: Any,
) -> list[Record]:
    """Ask every question of every scene."""
    pairs, expected = [], []
    for number, scene in enumerate(scenes):
        picture = shifted(scene.image, shift)
        for question in scene.questions:
            pairs.append((picture, question.text))
            expected.append((number, question.skill, question.answer))
    given = answer(model, processor, pairs, batch_size, **generate)
    return [Record(*known, said) for known, said in zip(expected, given, strict=True)]


def wording(question: Question | ClipQuestion) -> str:
    """The text of a question without its colours and shapes."""
    plurals = {f"{shape}s" for shape in SHAPES} | {"crosses"}
    kinds = {**dict.fromkeys(COLOURS, "<colour>"), **dict.fromkeys((*SHAPES, *plurals), "<shape>"), "an": "a"}
    return " ".join(kinds.get(word, word) for word in question.text.split())


def blind_baseline(
    known: Iterable[Scene | Clip], scenes: Iterable[Scene | Clip], skills: Sequence[str] = SKILLS
) -> dict[str, Accuracy]:
    """Accuracy without looking: give the answer that is most frequent in `known` for the question's wording."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in known:
        for question in scene.questions:
            answers[wording(question)][question.answer] += 1
    usual = {words: counts.most_common(1)[0][0] for words, counts in answers.items()}
    guessed = (
        Record(number, question.skill, question.answer, usual.get(wording(question), ""))
        for number, scene in enumerate(scenes)
        for question in scene.questions
    )
    return accuracy_by_skill(guessed, skills=skills)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--images", type=int, default=1_200, help="held-out scenes (default: 1200, over 1,000 questions per skill)"
    )
    parser.add_argument("--split", choices=sorted(SPLITS), default="test")
    parser.add_argument("--shift", type=int, default=0, metavar="PIXELS", help="move every picture right and down")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to a file")
    arguments = parser.parse_args()

    from rich.console import Console

    model, processor = load(checkpoint=arguments.checkpoint)
    console = Console()
    with console.status(f"answering questions about {arguments.images} scenes"):
        scenes = list(held_out(arguments.images, arguments.split))
        reached = accuracy_by_skill(records(model, processor, scenes, arguments.shift, arguments.batch_size))
        blind = blind_baseline(held_out(2_000, "dev" if arguments.split == "test" else "test"), scenes)

    report(reached, blind, f"{arguments.split}, shift {arguments.shift}", console, arguments.json)


def report(reached: dict[str, Accuracy], blind: dict[str, Accuracy], title: str, console: Console, target: Path | None) -> None:
    """Show accuracies beside those without looking, and write them to `target` as JSON."""
    from vlmprune.show.table import show, table

    rows = [
        (
            skill,
            f"{100 * entry.value:.1f}",
            f"{100 * entry.low:.1f} to {100 * entry.high:.1f}",
            str(entry.n),
            f"{100 * blind[skill].value:.1f}",
        )
        for skill, entry in reached.items()
    ]
    rows.append(("mean", f"{100 * mean_over_skills(reached):.1f}", "", "", f"{100 * mean_over_skills(blind):.1f}"))
    show(table(("skill", "accuracy %", "95 % interval", "questions", "blind %"), rows, title=title), console)
    if target:
        numbers = {skill: {**asdict(entry), "blind": blind[skill].value} for skill, entry in reached.items()}
        target.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
