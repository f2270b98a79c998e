"""Ask a model questions about pictures and score its answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmprune.show.stats import mean_interval
from vlmprune.tiny import prompt
from vlmprune.tiny.questions import SKILLS

if TYPE_CHECKING:
    from PIL import Image
    from transformers import ProcessorMixin

LONGEST_ANSWER = 3
"""Words in the longest answer; generation stops there, or earlier when every answer of a batch has ended."""


@dataclass(frozen=True)
class Record:
    """One answered question. Records with the same `image` number are about the same picture."""

    image: int
    skill: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        return self.given == self.expected


@dataclass(frozen=True)
class Accuracy:
    """Share of `n` answers that are exactly right, with a 95 % interval (`vlmprune/show/stats.py`)."""

    value: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}] (n={self.n})"


def answer(
    model: Any,
    processor: ProcessorMixin,
    pairs: Sequence[tuple[Image.Image, str]],
    batch_size: int = 64,
    **generate: Any,
) -> list[str]:
    """Answer each (picture, question) by greedy decoding in left-padded batches.

    It calls only `processor(...)` and `model.generate(...)`, so any model or wrapper with this interface works. Further keyword
    arguments go to `generate`.
    """
    given: list[str] = []
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        texts = [prompt(question) for _, question in chunk]
        given += _generated(model, processor, texts, {"images": [picture for picture, _ in chunk]}, generate)
    return given


def answer_clips(
    model: Any,
    processor: ProcessorMixin,
    pairs: Sequence[tuple[Sequence[Image.Image], str]],
    batch_size: int = 32,
    **generate: Any,
) -> list[str]:
    """As `answer`, for (frames of a clip, question). Each clip, which is each list of frames, is encoded once per batch."""
    from vlmprune.tiny.clip_model import clip_prompt

    given: list[str] = []
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        texts = [clip_prompt(question) for _, question in chunk]
        shown = [id(frames) for frames, _ in chunk]
        clip_of = [shown.index(one) for one in shown]
        given += _generated(model, processor, texts, {"videos": [frames for frames, _ in chunk]}, generate, clip_of)
    return given


def _generated(
    model: Any,
    processor: ProcessorMixin,
    texts: Sequence[str],
    seen: dict[str, Any],
    generate: dict[str, Any],
    clip_of: Sequence[int] | None = None,
) -> list[str]:
    """The answers to one batch.

    Args:
        seen: the processor's arguments for what the texts ask about.
        generate: further arguments of `generate`.
        clip_of: for each text about a clip, the first text about the same clip.
    """
    import torch

    from vlmprune.device import to_model

    inputs = to_model(model, processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **seen))
    with torch.inference_mode():
        if clip_of is not None:
            first = sorted(set(clip_of))
            encoded = model.get_video_features(inputs.pop("pixel_values_videos")[first], return_dict=True)
            encoded.pooler_output = encoded.pooler_output[[first.index(clip) for clip in clip_of]]
            inputs["mm_encoder_outputs"] = {"video": encoded}
        tokens = model.generate(**{"do_sample": False, "max_new_tokens": LONGEST_ANSWER, **inputs, **generate})
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def accuracy(records: Sequence[Record], seed: int = 0) -> Accuracy:
    """Accuracy over records. The interval resamples pictures, because questions about one picture are not independent."""
    if not records:
        return Accuracy(float("nan"), 0, float("nan"), float("nan"))
    right: dict[int, list[bool]] = defaultdict(list)
    for record in records:
        right[record.image].append(record.right)
    hits = np.array([[sum(answers)] for answers in right.values()], float)
    asked = np.array([[len(answers)] for answers in right.values()])
    low, high, _ = mean_interval(hits, asked, seed)
    return Accuracy(float(hits.sum() / asked.sum()), int(asked.sum()), low, high)


def accuracy_by_skill(records: Iterable[Record], seed: int = 0, skills: Sequence[str] = SKILLS) -> dict[str, Accuracy]:
    """Accuracy of every skill that occurs in the records, in the order of `skills`."""
    records = list(records)
    chosen = {skill: [record for record in records if record.skill == skill] for skill in skills}
    return {skill: accuracy(own, seed) for skill, own in chosen.items() if own}


def mean_over_skills(by_skill: dict[str, Accuracy]) -> float:
    """Unweighted mean of the skills' accuracies."""
    return float(np.mean([entry.value for entry in by_skill.values()]))
