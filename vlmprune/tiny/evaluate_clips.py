"""Accuracy of the embedded model for clips per skill, on held-out clips: `python -m vlmprune.tiny.evaluate_clips`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.tiny import CLIPS_CHECKPOINT, load_for_clips
from vlmprune.tiny.answers import Record, accuracy_by_skill, answer_clips
from vlmprune.tiny.clip_questions import CLIP_SKILLS
from vlmprune.tiny.clips import Clip, held_out_clips
from vlmprune.tiny.evaluate import blind_baseline, report
from vlmprune.tiny.scenes import SPLITS

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def clip_records(
    model: Any, processor: ProcessorMixin, clips: Iterable[Clip], batch_size: int = 32, **generate: Any
) -> list[Record]:
    """Ask every question of every clip."""
    pairs, expected = [], []
    for number, clip in enumerate(clips):
        frames = clip.frames()
        for question in clip.questions:
            pairs.append((frames, question.text))
            expected.append((number, question.skill, question.answer))
    given = answer_clips(model, processor, pairs, batch_size, **generate)
    return [Record(*known, said) for known, said in zip(expected, given, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=400, help="held-out clips (default: 400)")
    parser.add_argument("--split", choices=sorted(SPLITS), default="test")
    parser.add_argument("--checkpoint", type=Path, default=CLIPS_CHECKPOINT)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to a file")
    arguments = parser.parse_args()

    from rich.console import Console

    model, processor = load_for_clips(checkpoint=arguments.checkpoint)
    console = Console()
    with console.status(f"answering questions about {arguments.clips} clips"):
        clips = list(held_out_clips(arguments.clips, arguments.split))
        reached = accuracy_by_skill(clip_records(model, processor, clips, arguments.batch_size), skills=CLIP_SKILLS)
        known = held_out_clips(2_000, "dev" if arguments.split == "test" else "test")
        blind = blind_baseline(known, clips, CLIP_SKILLS)
    report(reached, blind, f"{arguments.clips} clips, {arguments.split}", console, arguments.json)


if __name__ == "__main__":
    main()
