"""Ask a model whole prompts in batches, and measure; or compute how likely given answers are.

Both go through `generate`, so that every family gets its own positions and cache. For likelihoods, `generate` is led: the
prompt runs alone, and only then, token by token on its cache, the answer. So an answer never takes part in the choice of the
visual tokens that it is judged by.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vlmprune
from vlmprune.errors import UsageError, first_line
from vlmprune.evals.lmms_columns import Columns, columns
from vlmprune.evals.lmms_prompts import Prompt
from vlmprune.evals.stopwatch import PrefillClock, Stamps, wait
from vlmprune.loading.placement import execution_device, to_model


@dataclass(frozen=True)
class Answer:
    """A generated answer, and what it cost."""

    text: str
    columns: Columns


@dataclass(frozen=True)
class Likelihood:
    """How likely a given answer is.

    Attributes:
        loss: mean over its tokens of −log p(token | prompt, tokens before it). Lower is better.
        greedy: whether greedy decoding would give this answer.
        kept: by layer, indices of the visual tokens that the prompt kept.
        columns: what it cost.
    """

    loss: float
    greedy: bool
    kept: tuple[tuple[int, tuple[int, ...]], ...]
    columns: Columns


class Asker:
    """A loaded model that answers prompts.

    Args:
        model, processor: as loaded; the tokenizer gets a padding token if it has none.
        recipe: is applied to the model until `close`; None leaves it un-pruned.

    Raises:
        UsageError: the recipe does not fit the model.
    """

    def __init__(self, model: Any, processor: Any, recipe: vlmprune.Recipe | None) -> None:
        self.model, self.processor = model, processor
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        self.device = execution_device(model)
        self.run = None if recipe is None else vlmprune.wrap(model, recipe)

    def close(self) -> None:
        """Restore the model."""
        if self.run is not None:
            self.run.remove()

    def answer(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> list[Answer]:
        """The answers to prompts that either all have pictures, or have none.

        Args:
            prompts: are computed together.
            options: keyword arguments of `generate`.

        Raises:
            UsageError: the processor cannot take the prompts.
        """
        output, length, measured = self._generate(prompts, options)
        texts = self.processor.batch_decode(output.sequences[:, length:], skip_special_tokens=True)
        return [Answer(text.strip(), own) for text, own in zip(texts, measured, strict=True)]

    def likelihood(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Likelihood]:
        """How likely each prompt's given answer is. The prompts either all have pictures, or have none.

        Raises:
            UsageError: an answer is empty, or the processor cannot take the prompts.
        """
        wanted = [self._tokens(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        lead = _Lead(wanted, self.processor.tokenizer.pad_token_id)
        options = {
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": lead.steps,
            "output_logits": True,
            "logits_processor": [lead],
        }
        output, _, measured = self._generate(prompts, options)
        logits = torch.stack(output.logits, dim=1).float()  # [batch, token, vocabulary], before the lead
        kept = self._kept(len(prompts))
        return [
            Likelihood(*_judged(logits[row, : len(tokens)], tokens), kept[row], measured[row])
            for row, tokens in enumerate(wanted)
        ]

    def _generate(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> tuple[Any, int, list[Columns]]:
        """What `generate` returned, the number of tokens of its prompts (padding included), and the columns."""
        inputs = self._inputs(prompts)
        pictures = [len(prompt.images) for prompt in prompts]
        stamps = Stamps(self.device)
        with PrefillClock(self.model, self.device) as clock, torch.inference_mode():
            wait(self.device)
            begun = time.perf_counter()
            output = self.model.generate(
                **inputs, **options, use_cache=True, return_dict_in_generate=True, stopping_criteria=[stamps]
            )
            measured = columns(self.model, self.run, inputs, pictures, output, begun, clock, stamps)
        return output, inputs["input_ids"].shape[1], measured

    def _inputs(self, prompts: Sequence[Prompt]) -> Any:
        images = {"images": [list(prompt.images) for prompt in prompts]} if prompts[0].images else {}
        start = self.processor.tokenizer.bos_token
        special = {"add_special_tokens": False} if start and prompts[0].text.startswith(start) else {}  # not twice
        texts = [prompt.text for prompt in prompts]
        try:
            inputs = self.processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **images, **special)
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"the processor cannot take {' and '.join(dict.fromkeys(prompt.where for prompt in prompts))}: "
                f"{first_line(error)}."
            ) from error
        return to_model(self.model, inputs)

    def _kept(self, rows: int) -> list[tuple[tuple[int, tuple[int, ...]], ...]]:
        record = None if self.run is None else self.run.last
        entries = [] if record is None else record.kept
        return [
            tuple((entry.layer, tuple(entry.index.tolist())) for entry in entries if entry.sample == row) for row in range(rows)
        ]

    def _tokens(self, prompt: Prompt, answer: str) -> list[int]:
        """The tokens of an answer after its prompt, whose own tokens stay as they are."""
        tokenizer = self.processor.tokenizer
        if prompt.text[-1:].isspace():
            answer = answer.lstrip()
        alone, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt.text, prompt.text + answer))
        merged = whole[: len(alone)] != alone  # the answer's first letters would change the prompt's last token
        tokens = tokenizer(answer, add_special_tokens=False).input_ids if merged else whole[len(alone) :]
        if not tokens:
            raise UsageError(f"{prompt.where}: the answer whose likelihood is asked for is empty ({answer!r}).")
        return list(tokens)


class _Lead:
    """A processor of logits that lets `generate` choose given tokens only.

    Args:
        answers: tokens of each row.
        filler: what shorter rows go on with.
    """

    def __init__(self, answers: Sequence[Sequence[int]], filler: int) -> None:
        self.steps = max(map(len, answers))
        self.tokens = torch.tensor([[*answer, *[filler] * (self.steps - len(answer))] for answer in answers])
        self.step = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """`[batch, vocabulary]` 0 for the given tokens, and minus infinity for all others."""
        only = torch.full_like(scores, -torch.inf)
        only.scatter_(1, self.tokens[:, self.step, None].to(scores.device), 0.0)
        self.step += 1
        return only


def _judged(logits: Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
    """Loss and greediness of an answer from the logits `[token, vocabulary]` by which its tokens were to be chosen."""
    wanted = torch.tensor(tokens, device=logits.device)
    loss = torch.nn.functional.cross_entropy(logits, wanted)
    return float(loss), bool((logits.argmax(dim=-1) == wanted).all())
