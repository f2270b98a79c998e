"""One picture, many questions: the beginning of a prompt is pruned once, and its cache is shared.

    prefix = run.encode(**processor(text=up_to_the_question, images=picture, return_tensors="pt"))
    questions = tokenizer(["…", "…"], padding=True, add_special_tokens=False, return_tensors="pt")
    answers = model.generate(**prefix.ask(**questions), max_new_tokens=32)

That is transformers' own way to share a prefix: a copy of a filled cache as `past_key_values`, and the ids of whole prompts.
Masks and positions of a batch are made here. It is exact where nothing before the question depends on the question: the model
is causal there, and the recipe's methods look at nothing behind the picture. Everything else is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from vlmprune.device import on_host
from vlmprune.errors import UsageError, shown
from vlmprune.live.attention import CALL_ARGUMENT
from vlmprune.live.call import Call
from vlmprune.view import OF_QUESTION, known_probes

if TYPE_CHECKING:
    from vlmprune.live.plan import Plan


@dataclass(eq=False)
class Prefix:
    """The beginning of a prompt, with its pictures, as one pruned cache.

    Attributes:
        input_ids: `[1, token]` of the beginning, dropped tokens included.
    """

    input_ids: Tensor
    _mask: Tensor
    _cache: Cache
    _positions: Tensor | None
    _plan: Plan

    def __repr__(self) -> str:
        return f"<vlmprune.Prefix of {len(self)} tokens under {str(self._plan.recipe)!r}, {self.bytes:,} bytes>"

    def __len__(self) -> int:
        """Tokens, dropped ones included."""
        return self.input_ids.shape[1]

    @property
    def bytes(self) -> int:
        """What the cache takes. `n` questions in one batch take `n` times as much beside it, while they run; questions one
        after the other take it once beside it."""
        return sum(x.numel() * x.element_size() for layer in self._cache.layers for x in _stored(layer))

    def cache(self, questions: int = 1) -> Cache:
        """A cache for so many questions, each of which goes on from the prefix. The prefix itself is not changed.

        Args:
            questions: rows of the batch.

        Raises:
            UsageError: no whole number from 1.
        """
        if isinstance(questions, bool) or not isinstance(questions, int) or questions < 1:
            raise UsageError(f"a cache is for a whole number of questions from 1 on, found {shown(questions)}.")
        # Layers with attention replace what they store, and never write into it: the copy may hold the same tensors.
        shared = [x for layer in self._cache.layers if isinstance(layer, DynamicLayer) for x in _stored(layer)]
        found: Cache = copy.deepcopy(self._cache, {id(x): x for x in shared})
        if questions > 1:
            first = torch.LongTensor([0] * questions)  # every row goes on from the only one
            found.reorder_cache(first.to(self.input_ids.device))  # type: ignore[arg-type]
        return found

    def ask(self, input_ids: Any, attention_mask: Any = None, *, copies: int = 1, **others: Any) -> dict[str, Any]:
        """Arguments of `model.generate` for questions on the prefix: the whole prompts, and a cache that knows the prefix.

        Args:
            input_ids: `[question, token]` of the questions alone, as a tokenizer gives them with `add_special_tokens=False`.
            attention_mask: `[question, token]`, 0 on padding at either side; padding is moved to the left of each question.
            copies: sequences that `generate` makes of each question: the larger of `num_beams` and `num_return_sequences`.
            others: what a tokenizer gives beside. Token types of words are left out, because nothing needs them.

        Returns:
            `input_ids` (prefix, padding, question; what `generate` returns begins with them), `attention_mask`,
            `past_key_values`, and for models with M-RoPE `position_ids`.

        Raises:
            UsageError: these are no questions that can go on from the prefix; says why.
        """
        ids, mask = self._questions(input_ids, attention_mask, others)
        order = mask.long().argsort(dim=1, stable=True)  # padding first
        ids, mask = ids.gather(1, order), mask.gather(1, order)
        count = len(ids)
        whole_mask = torch.cat((self._mask.expand(count, -1), mask.to(self._mask)), dim=1)
        given = {
            "input_ids": torch.cat((self.input_ids.expand(count, -1), ids), dim=1),
            "attention_mask": whole_mask,
            "past_key_values": self.cache(count * self._copies(copies)),
        }
        if self._positions is not None:
            given["position_ids"] = _continued(self._positions, whole_mask, len(self))
        return given

    def _copies(self, copies: object) -> int:
        if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
            raise UsageError(f"copies is a whole number of sequences for each question, from 1 on, found {shown(copies)}.")
        return copies

    def _questions(self, input_ids: Any, attention_mask: Any, others: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Ids and mask of questions, on the prefix's device."""
        device = self.input_ids.device
        for name, value in others.items():
            if value is not None and not (name.endswith("token_type_ids") and not torch.as_tensor(value).any()):
                raise UsageError(
                    f"a question on a prefix has ids and a mask, found {name}: pictures belong into run.encode(…), and other "
                    "arguments of generate beside **prefix.ask(…)."
                )
        try:
            ids = torch.as_tensor(input_ids).to(device)
            mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask).to(device)
        except (TypeError, ValueError) as error:
            raise _no_questions(input_ids) from error
        if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            raise _no_questions(input_ids)
        if mask.shape != ids.shape:
            raise UsageError(
                f"attention_mask has the shape {list(mask.shape)}, the questions {list(ids.shape)}: pass both alike."
            )
        mask = mask != 0
        known, real = on_host(ids), on_host(mask)
        images, config = self._plan.family.placeholders(self._plan.config), self._plan.language_model.config
        begin, first = getattr(config, "bos_token_id", None), self.input_ids[0, int(on_host(self._mask[0]).argmax())]
        for number, (row, there) in enumerate(zip(known, real, strict=True)):
            words = row[there]
            if not len(words):
                raise UsageError(f"question {number} is empty: its mask hides all of it.")
            if np.isin(words, images).any():
                raise UsageError(
                    f"question {number} holds an image token: the pictures of all questions belong into run.encode(…); encode "
                    "another prefix for another picture."
                )
            if begin is not None and words[0] == begin and int(first) == begin:
                raise UsageError(
                    f"question {number} starts with the token that begins a text, as the prefix does: tokenize questions with "
                    "add_special_tokens=False, and pass no part of the prefix again."
                )
            if (there[1:] != there[:-1]).sum() > 1 or not (there[0] or there[-1]):
                raise UsageError(f"the mask of question {number} has holes: only padding at its sides can be hidden.")
        if not real.all():
            self._refuse_padding()
        return ids, mask

    def _refuse_padding(self) -> None:
        """Refuse padding between the prefix and a question where it would be seen.

        Raises:
            UsageError: says what would see it.
        """
        kinds = self._plan.kinds
        recurrent = next((number for number, kind in enumerate(kinds.of) if kind.recurrent), None)
        if recurrent is not None:
            why = f"{kinds.in_words(recurrent)}: padding between the prefix and a question would change what it remembers"
        elif kinds.window is not None:
            why = (
                f"layers see a window of {kinds.window} tokens, in which padding between the prefix and a question would count"
            )
        else:
            return
        raise UsageError(f"{why}; ask questions of equal length together, or one at a time.")


def encode(plan: Plan, inputs: dict[str, Any]) -> Prefix:
    """Run the beginning of a prompt, and keep its cache; the caller's settings are those of a call.

    Raises:
        UsageError: as `Run.encode`.
    """
    _check_recipe(plan)
    if not plan.contexts.settings.enabled:
        raise UsageError(
            "the recipe is switched off here (run.enabled, override(enabled=False)), so that there is no pruned prefix to "
            "make: switch it on, or run the questions one by one."
        )
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise UsageError(
            "encode takes what the processor gives for the beginning of a prompt, with input_ids [1, token], found "
            f"{', '.join(inputs) or 'nothing'}{'' if ids is None else f'; input_ids are {shown(ids)}, no such tensor'}."
        )
    if len(ids) != 1:
        raise UsageError(f"a prefix is the beginning of one prompt, found a batch of {len(ids)}: encode them one by one.")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise UsageError(f"attention_mask must have the shape of input_ids, {list(ids.shape)}, found {shown(mask)}.")
    if inputs.get("past_key_values") is not None:
        raise UsageError("a prefix begins a conversation: pass no past_key_values to encode.")
    call = Call()
    given = {**inputs, "use_cache": True, "return_dict": True, CALL_ARGUMENT: call}
    with torch.no_grad():
        output = plan.base(**given)
    if call.images is None:
        raise UsageError(
            "this beginning of a prompt has no picture, so that there is nothing to prune: pass its pixels to encode."
        )
    positions = call.positions
    rotary = positions if positions is not None and positions.ndim == 3 else None
    return Prefix(ids, mask.to(ids.device), output.past_key_values, rotary, plan)


def _check_recipe(plan: Plan) -> None:
    """Refuse recipes under which what is before the question depends on the question.

    Raises:
        UsageError: names what a method looks at.
    """
    if plan.family.whole_prompt:
        raise UsageError(
            f"in {type(plan.model).__name__} the tokens of the whole prompt see each other, so that pictures are computed anew "
            "for every question: no prefix can be shared; run the questions one by one."
        )
    if names := plan.redistribution.names:
        raise UsageError(
            f"{', '.join(names)} marks tokens where the prompt ends, and a prefix ends before the question: leave the method "
            "out, or run the questions one by one."
        )
    for bound in plan.pruning.stages:
        if bound.stage.site == "cache":
            raise UsageError(
                f"{bound.method.name} removes tokens from the cache after the prompt (cache_layer={bound.stage.layer}): a "
                "question on a shared prefix would be computed without them; turn that stage off (cache_layer=-1), or run the "
                "questions one by one."
            )
        for name in sorted(bound.needs & OF_QUESTION):
            probe = known_probes()[name]
            raise UsageError(
                f"{bound.method.name} needs the question: before layer {bound.stage.layer} it looks at the "
                f"{probe.looks_at or probe.meaning}, and a prefix ends before the question; choose a method that looks at the "
                "picture alone, or run the questions one by one."
            )


def _stored(layer: Any) -> list[Tensor]:
    """All tensors that a cache layer stores of a conversation."""
    states = [getattr(layer, name, None) for name in ("keys", "values")]
    states += [x for name in ("conv_states", "recurrent_states") for x in (getattr(layer, name, None) or {}).values()]
    return [x for x in states if isinstance(x, Tensor)]


def _continued(positions: Tensor, mask: Tensor, prefix: int) -> Tensor:
    """`[4, question, token]`: the place among the tokens that are there, as transformers gives it to models with M-RoPE, and
    their rotary positions, which go on behind the largest of the prefix."""
    count = len(mask)
    text = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    rotary = positions[-3:]  # some models put the place before them
    ahead = mask[:, prefix:].long().cumsum(dim=1) - 1
    behind = (rotary.amax() + 1 + ahead).clamp(min=0).expand(3, -1, -1)
    return torch.cat((text[None], torch.cat((rotary.expand(3, count, -1), behind), dim=2)))


def _no_questions(found: object) -> UsageError:
    return UsageError(f"questions are token ids [question, token], found {shown(found)}: pass what the tokenizer returns.")
