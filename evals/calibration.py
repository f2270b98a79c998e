"""Questions as samples for choosing settings: one prompt at a time, with the tokens of its right answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import vlmprune
from vlmprune.evals.question import Question
from vlmprune.evals.questions import scene_questions
from vlmprune.loading.placement import to_model
from vlmprune.loading.prompts import make_batch, prompt_text
from vlmprune.tiny.questions import SKILLS

KEEP_ALL = "random:layer=0,fraction=1"
"""Drops nothing, so that it runs exactly as the un-pruned model does, and leaves a record of the prompt."""


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


def scenes(images: int, split: str = "dev") -> list[Question]:
    """One question about each of some held-out scenes of the embedded model, cycling through the skills; independent."""
    asked: dict[str, list[Question]] = {}
    for question in scene_questions(images, split):
        asked.setdefault(question.unit, []).append(question)
    chosen = []
    for number, own in enumerate(asked.values()):
        wanted = [*SKILLS[number % len(SKILLS) :], *SKILLS[: number % len(SKILLS)]]  # not every scene has a sign to read
        first = min(own, key=lambda question: wanted.index(question.group))
        chosen.append(replace(first, id=f"{first.unit} {first.group}"))
    return chosen


def samples(processor: Any, questions: Sequence[Question], answers: bool = True) -> Callable[[Any], Iterator[Sample]]:
    """Check that a model can take the questions, before its weights are read.

    Args:
        processor: the model's.
        questions: each with a picture.
        answers: whether the tokens of the right answers are wanted.

    Returns:
        A function from the model to the samples, one at a time, so that not all pixels are in memory at once.

    Raises:
        UsageError: a question has no picture, or cannot be made a prompt; or its answer is not in the vocabulary.
    """
    texts, tokens = [], []
    for question in questions:
        if not question.images:
            raise vlmprune.UsageError(f"question {question.id} has no picture, which this measurement looks at: leave it out.")
        texts.append(prompt_text(processor, question.text, len(question.images)))
        known = answers and bool(question.answers)
        tokens.append(answer_tokens(processor.tokenizer, texts[-1], question) if known else ())

    def make(model: Any) -> Iterator[Sample]:
        for question, text, answer in zip(questions, texts, tokens, strict=True):
            inputs = make_batch(processor, [question.pictures()], [text])
            yield Sample(to_model(model, inputs), answer, question.id)

    return make


def answer_tokens(tokenizer: Any, prompt: str, question: Question) -> tuple[int, ...]:
    """Ids of the tokens that a model would have to generate: what the first right answer after the prompt adds to it.

    A space is put between them unless the prompt ends with white space (a chat template's new line).

    Raises:
        vlmprune.UsageError: the answer is not in the vocabulary.
    """
    between = "" if prompt[-1:].isspace() else " "
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + between + question.answers[0])["input_ids"]
    start = _common(before, whole)
    end = len(whole) - _common(before[start:][::-1], whole[start:][::-1])  # a tokenizer may end every text with a token
    added = tuple(whole[start:end])
    if not added or tokenizer.unk_token_id in added:
        raise vlmprune.UsageError(
            f"the model has no token for the answer {question.answers[0]!r} ({question.id}): check its spelling."
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
