"""What the ways of generating are given: beginnings of prompts and questions, later pictures, embeddings with pictures."""

from __future__ import annotations

from typing import Any

import torch
from families import table
from families.oracles import language_model, positions_of
from families.table import FIRST_WORD, TINY, VOCAB, make_inputs
from torch import Tensor

BY_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Arguments with one number per token."""


def words(count: int, seed: int) -> Tensor:
    """`[1, count]` random words."""
    return torch.randint(FIRST_WORD, VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))


def beginning(name: str) -> dict[str, Any]:
    """The beginning of a prompt: words, a picture, two words."""
    return make_inputs(name, [["text4", "image", "text2"]])


def padded(questions: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and mask of a batch of questions `[1, n]`, padded on the left and on the right by turns."""
    width = max(question.shape[1] for question in questions)
    ids = torch.zeros(len(questions), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(questions):
        count = question.shape[1]
        place = slice(0, count) if row % 2 else slice(width - count, width)
        ids[row, place], mask[row, place] = question[0], 1
    return ids, mask


def with_later(name: str, inputs: dict[str, Any], answer: Tensor, later: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a whole conversation: a prompt, an answer `[1, n]`, and a second prompt with a picture of its own."""
    whole: dict[str, Any] = {}
    between = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    for key, value in inputs.items():
        if key in BY_TOKEN:
            middle = between.get(key, torch.full_like(answer, TINY[name].kind_of_new))
            whole[key] = torch.cat([value, middle, later[key]], 1)
        else:  # pictures; Idefics3 and SmolVLM take them [row, tile, …]
            whole[key] = torch.cat([value, later[key]], int(TINY[name].collate is table._by_row))
    return whole


class _Seen(Exception):  # noqa: N818 (nothing went wrong)
    pass


@torch.no_grad()
def merged(name: str, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same prompt as embeddings that hold its pictures, with what `generate` takes beside them."""
    entering: dict[str, Any] = {}

    def look(module: Any, args: tuple, kwargs: dict) -> None:
        entering.update(kwargs)
        raise _Seen

    handle = language_model(model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        model(**inputs)
    except _Seen:
        pass
    finally:
        handle.remove()
    given = {"inputs_embeds": entering["inputs_embeds"].detach(), "attention_mask": inputs["attention_mask"]}
    positions = positions_of(model, inputs)
    return given if positions.ndim == 2 else {**given, "position_ids": positions}  # those of M-RoPE need ids
