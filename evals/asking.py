"""Ask a model questions in fixed batches, so that recipes and processes are compared on the same inputs, padding included.

A batch is the unit of everything: of a store's rows, of shards, of progress. `batches` depends on the questions and the batch
size alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vlmprune
from vlmprune.evals.question import Question, QuestionSet, key_of
from vlmprune.loading.placement import to_model
from vlmprune.loading.prompts import make_batch, placeholders, prompt_text
from vlmprune.tiny.scenes import SPLITS, Scene, make_scene

BATCH_SIZE = 8
"""Questions in a batch, if nothing else is said."""


@dataclass(frozen=True)
class Batch:
    """What a model answered to one batch.

    Attributes:
        given: answers, in the order of the batch.
        seconds: of the whole batch: processor, vision tower, language model and decoding.
        entered: visual tokens that entered a decoder layer, mean over layers; sum over the batch.
        visual: visual tokens of the batch before any was dropped.
        kept: of each question, the visual tokens that leave the last decoder layer. Of an un-wrapped model these three count
            the placeholders of the prompts.
    """

    given: list[str]
    seconds: float
    entered: float
    visual: int
    kept: list[int]

    @property
    def share(self) -> float:
        """The compute average: the share of the visual tokens that enter a decoder layer, mean over layers; 1 without any."""
        return self.entered / self.visual if self.visual else 1.0


class Asking:
    """A set of questions as one processor takes them.

    Args:
        processor: the model's.
        questions: what is asked.
        batch_size: questions in a batch.
        encode_once: encode each picture or video once per batch, not once per question. For LLaVA-1.5 and videos of
            LLaVA-NeXT-Video only, whose features are then exactly those of the plain way.

    Attributes:
        batches: numbers of the questions of each batch. Questions without a picture, and such with a video, have
            batches of their own.
        texts: whole prompts.

    Raises:
        UsageError: a question cannot be made a prompt; says which and why.
    """

    def __init__(self, processor: Any, questions: QuestionSet, batch_size: int = BATCH_SIZE, encode_once: bool = False) -> None:
        if batch_size < 1:
            raise vlmprune.UsageError(f"a batch has at least one question, found {batch_size}.")
        self.processor, self.questions, self.encode_once = processor, questions, encode_once
        self.texts = [_whole(processor, question) for question in questions]
        self.batches = batches_of(questions.questions, batch_size)

    def ask_batch(self, model: Any, number: int) -> list[str]:
        """The answers of a model, which may be wrapped, to one batch, by greedy decoding."""
        inputs = self._inputs(number)
        with torch.inference_mode():
            return self._generate(model, inputs, number)

    def measure_batch(self, model: Any, number: int, run: vlmprune.Run | None = None) -> Batch:
        """The same, with what it cost.

        Args:
            model: the model.
            number: of the batch.
            run: the handle of the wrapped model; None for an un-wrapped one.
        """
        start = time.perf_counter()
        inputs = self._inputs(number)
        seen = placeholders(model, inputs)
        with torch.inference_mode():
            given = self._generate(model, inputs, number)
        seconds = time.perf_counter() - start
        if run is None or (record := run.last) is None:
            return Batch(given, seconds, float(sum(seen)), sum(seen), seen)
        kept = list(seen)
        left = {(one.sample, one.ordinal): one for one in record.kept if one.site != "cache"}
        for (sample, _), one in left.items():
            kept[sample] += len(one.index) - one.original
        report = run.report()
        return Batch(given, seconds, report.visual_compute_average * report.batch, report.visual_tokens, kept)

    def _inputs(self, number: int) -> Any:
        chosen = self.batches[number]
        asked = [self.questions[index] for index in chosen]
        texts = [self.texts[index] for index in chosen]
        return make_batch(self.processor, [one.pictures() for one in asked], texts, [one.clips() for one in asked])

    def _generate(self, model: Any, inputs: Any, number: int) -> list[str]:
        inputs = to_model(model, inputs)
        more = self._encoded(model, inputs, number) if self.encode_once else {}
        tokens = model.generate(**inputs, **more, do_sample=False, num_beams=1, max_new_tokens=self.questions.max_new_tokens)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [self._ended(answer) for answer in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _ended(self, answer: str) -> str:
        """An answer up to the first text at which it ends."""
        for text in self.questions.until:
            answer = answer.split(text)[0]
        return answer.strip()

    def _encoded(self, model: Any, inputs: Any, number: int) -> dict[str, Any]:
        """Features of the batch's pictures or videos as an argument of `generate`, each of them encoded once; takes out the
        pixels."""
        found = {}
        for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if pixels not in inputs:
                continue
            asked = [self.questions[index] for index in self.batches[number]]
            shown = [key_of(one) for question in asked for one in (question.images if modality == "image" else question.videos)]
            distinct = list(dict.fromkeys(shown))
            own: Tensor = inputs.pop(pixels)[[shown.index(key) for key in distinct]]
            encoded = getattr(model, f"get_{modality}_features")(**{pixels: own}, return_dict=True)
            # Each question gets the features of what it is about; a method finds by them what it computed in the tower.
            parts = [encoded.pooler_output[distinct.index(key)] for key in shown]
            encoded.pooler_output = parts if modality == "image" else torch.stack(parts)
            found[modality] = encoded
        return {"mm_encoder_outputs": found} if found else {}


def _whole(processor: Any, question: Question) -> str:
    try:
        return prompt_text(processor, question.text, len(question.images), len(question.videos))
    except vlmprune.UsageError as error:
        raise vlmprune.UsageError(f"question {question.id}: {error}") from error


def batches_of(questions: Sequence[Question], size: int) -> list[list[int]]:
    """Numbers of the questions in batches of at most `size`, in order; with and without pictures, or videos, apart."""
    batches: list[list[int]] = []
    growing: dict[tuple[bool, bool], list[int]] = {}
    for number, question in enumerate(questions):
        pictured = bool(question.images), bool(question.videos)
        if len(growing.get(pictured, ())) in (0, size):
            batches.append([])
            growing[pictured] = batches[-1]
        growing[pictured].append(number)
    return batches


@contextmanager
def under(model: Any, recipe: vlmprune.Recipe | None) -> Iterator[vlmprune.Run | None]:
    """The model wrapped with a recipe inside a `with` block; None leaves it un-pruned."""
    if recipe is None:
        yield None
    else:
        with vlmprune.wrap(model, recipe) as run:
            yield run


def scenes_of_seed(seed: int, images: int, split: str = "test") -> list[Scene]:
    """`images` held-out scenes. Other seeds have other scenes; seed 0 has those of `vlmprune eval`."""
    first = SPLITS[split] + seed * images
    return [make_scene(first + number) for number in range(images)]
