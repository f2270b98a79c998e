"""What must come out of ways of generating for which `families/oracles.py` has nothing. No code is shared with vlmprune."""

from __future__ import annotations

from typing import Any

import torch
from families.oracles import (
    Keep,
    allowed_by,
    before_layers,
    dropped_logits,
    in_its_form,
    language_model,
    masked_logits,
    positions_of,
    seen_from,
    whole,
)
from families.table import TINY
from torch import Tensor


@torch.no_grad()
def alone_logits(name: str, model: Any, inputs: dict[str, Any], keep: Keep, new: Tensor, steps: int) -> Tensor:
    """Logits `[1, steps, vocabulary]` at the end of one sample with `new`: *masked*, or *dropped* in recurrent layers."""
    logits = dropped_logits(name, model, inputs, keep, new)[0] if TINY[name].recurrent else None
    logits = masked_logits(name, model, inputs, keep, new) if logits is None else logits
    return logits[:, -steps:]


@torch.no_grad()
def embedded_logits(name: str, model: Any, inputs: dict[str, Any], given: dict[str, Any], keep: Keep, new: Tensor) -> Tensor:
    """*Masked*, of a prompt that is given as embeddings; what is injected into visual tokens is lost with their ids."""
    layers, call = language_model(model).layers, whole(name, model, inputs, new)

    def hide(index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden, mask = args[0], kwargs["attention_mask"]
        rows, length = hidden.shape[:2]
        seen = seen_from(keep, index, length)
        if seen is None:
            return args, kwargs
        allowed = allowed_by(layers[index], mask, rows, length) & seen[:, None, None] | torch.eye(length, dtype=torch.bool)
        implementation = layers[index].self_attn.config._attn_implementation
        return args, {**kwargs, "attention_mask": in_its_form(allowed, mask, implementation, hidden.dtype)}

    embeddings = torch.cat([given["inputs_embeds"], model.get_input_embeddings()(new)], 1)
    call = {name: call[name] for name in ("attention_mask", "position_ids")}
    with before_layers(model, hide):
        return model(inputs_embeds=embeddings, **call, use_cache=False).logits


@torch.no_grad()
def stored_logits(name: str, model: Any, inputs: dict[str, Any], keep: Keep, new: Tensor, cache: Any) -> Tensor:
    """Logits `[1, 1 + n, vocabulary]` behind a prompt and in decoding steps of the stock model, on a cache that stores only
    what is left: the prompt's dropped rows are really cut out. One sample without padding; attention that sees every entry."""
    positions = positions_of(model, inputs)
    logits = [dropped_logits(name, model, inputs, keep, cache=cache)[0][:, -1:]]
    for step in range(new.shape[1]):
        call = {"input_ids": new[:, step : step + 1], "position_ids": positions[..., -1:] + 1 + step}
        logits.append(model(**call, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)
