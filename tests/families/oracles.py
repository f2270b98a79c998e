"""What a pruned model must compute, from the stock model alone. No code is shared with vlmprune.

`keep` is a dict: stage's layer -> bool `[batch, sequence]`; True means that the layers from that stage on still see the token.

masked   No cache, full length. Each decoder layer is given the mask that the model itself made for it (windows, blocks,
         padding), with the columns of dropped tokens hidden from the stage on. Defined for layers with attention only.
dropped  One sample without padding, no cache. The rows of dropped tokens are really cut out before the stage's layer, and with
         them those of whatever the model gives its layers by token: its own masks (rows and columns), rotary embeddings,
         per-layer inputs; features that are injected later are added to the rows that are left. A dropped token is as if it had
         never been in the sequence from that layer on. This is the contract of recurrent layers.
native   The stock model, fed the shorter embeddings with the same positions, for a stage before the first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from families.table import TINY, extended, make_inputs, make_single
from torch import Tensor

Keep = dict[int, Tensor]

TOLERANCE = 5e-5
"""Absolute, for float32 logits of standard deviation 1; rounding alone reaches 2e-5."""
MOVED = 0.1
"""By how much pruning must change the logits for a comparison to mean anything."""


def language_model(model: Any) -> Any:
    """The text model of any family."""
    base = model.model
    return base.language_model if hasattr(base, "language_model") else base.text_model


@contextmanager
def before_layers(model: Any, hook: Callable[[int, tuple, dict], tuple[tuple, dict]]) -> Iterator[None]:
    """Inside the block, every decoder layer is given what `hook(index, args, kwargs)` makes of its arguments."""

    def bound(index: int) -> Callable[..., Any]:
        return lambda module, args, kwargs: hook(index, args, kwargs)

    layers = language_model(model).layers
    handles = [layer.register_forward_pre_hook(bound(index), with_kwargs=True) for index, layer in enumerate(layers)]
    deltas = getattr(model.model, "rope_deltas", None)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = deltas


class _Seen(Exception):  # noqa: N818 (nothing went wrong)
    pass


@torch.no_grad()
def positions_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The position ids with which stock `generate` calls the base model for a prompt: `[batch, …]` or `[4, batch, …]`."""
    found: list[Tensor] = []

    def look(module: Any, args: tuple, kwargs: dict) -> None:
        found.append(kwargs["position_ids"])
        raise _Seen

    deltas = getattr(model.model, "rope_deltas", None)
    handle = model.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model.generate(**inputs, max_new_tokens=1)
    except _Seen:
        pass
    finally:
        handle.remove()
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = deltas
    return found[0]


def whole(name: str, model: Any, inputs: dict[str, Any], new: Tensor | None) -> dict[str, Any]:
    """Arguments of one call for the prompt and `new` generated tokens `[batch, n]`, with the positions that `generate` uses."""
    positions = positions_of(model, inputs)
    if new is not None and new.shape[1]:
        inputs = extended(name, inputs, new)
        positions = torch.cat([positions, positions[..., -1:] + torch.arange(1, new.shape[1] + 1)], -1)
    return {**inputs, "position_ids": positions, "use_cache": False}


def allowed_by(layer: Any, given: Tensor | None, rows: int, length: int) -> Tensor:
    """`[rows or 1, 1, query, column]` bool: what a layer's attention may look at under the mask that the model gave it."""
    if given is None:
        square = torch.ones(length, length, dtype=torch.bool)
        return (square.tril() if layer.self_attn.is_causal else square)[None, None]
    return given if given.dtype == torch.bool else given == 0


def in_its_form(allowed: Tensor, given: Tensor | None, implementation: str, dtype: torch.dtype) -> Tensor:
    """A mask in the form that the attention implementation takes."""
    if implementation == "sdpa" if given is None else given.dtype == torch.bool:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def seen_from(keep: Keep, layer: int, length: int) -> Tensor | None:
    """`[batch, length]`: the columns that `layer` still sees; None before the first stage."""
    stages = [stage for stage in keep if stage <= layer]
    if not stages:
        return None
    seen = torch.ones(keep[stages[0]].shape[0], length, dtype=torch.bool)
    for stage in stages:
        seen[:, : keep[stage].shape[1]] &= keep[stage]
    return seen


@torch.no_grad()
def masked_logits(name: str, model: Any, inputs: dict[str, Any], keep: Keep, new: Tensor | None = None) -> Tensor:
    """Logits `[batch, prompt + new, vocabulary]` of the stock model with the columns outside `keep` hidden."""
    layers = language_model(model).layers
    assert not (TINY[name].recurrent and keep), "masking is not dropping in recurrent layers"

    def hide(index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0]
        rows, length = hidden.shape[:2]
        seen = seen_from(keep, index, length)
        if seen is None:
            return args, kwargs
        given = kwargs["attention_mask"]
        allowed = allowed_by(layers[index], given, rows, length) & seen[:, None, None]
        allowed = allowed | torch.eye(length, dtype=torch.bool)  # a row that sees nothing would be NaN
        implementation = layers[index].self_attn.config._attn_implementation
        return args, {**kwargs, "attention_mask": in_its_form(allowed, given, implementation, hidden.dtype)}

    with before_layers(model, hide):
        return model(**whole(name, model, inputs, new)).logits


@torch.no_grad()
def dropped_logits(
    name: str, model: Any, inputs: dict[str, Any], keep: Keep, new: Tensor | None = None, cache: Any = None
) -> tuple[Tensor, Tensor]:
    """Logits `[1, left, vocabulary]` of one sample without padding whose rows are really cut out, and the columns `[left]`.

    A `cache` is filled by the way: stock layers store in it what they are given.
    """
    assert inputs["input_ids"].shape[0] == 1
    assert inputs["attention_mask"].all()
    text, call = language_model(model), whole(name, model, inputs, new)
    call |= {} if cache is None else {"past_key_values": cache, "use_cache": True}
    alive = torch.arange(call["input_ids"].shape[1])

    def cut(index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        nonlocal alive
        hidden, *rest = args
        if index in keep:
            behind = call["input_ids"].shape[1] - keep[index].shape[1]
            wanted = torch.nn.functional.pad(keep[index][0], (0, behind), value=True)
            stays = wanted[alive]
            hidden, alive = hidden[:, stays], alive[stays]
        if any(stage <= index for stage in keep):
            rest = [x[:, alive] if isinstance(x, Tensor) else x for x in rest]
            kwargs = {**kwargs, "attention_mask": _mask_of(kwargs["attention_mask"], alive)}
            if kwargs.get("position_embeddings") is not None:
                kwargs["position_embeddings"] = tuple(x[..., alive, :] for x in kwargs["position_embeddings"])
            if isinstance(kwargs.get("position_ids"), Tensor):
                kwargs["position_ids"] = kwargs["position_ids"][..., alive]
        return (hidden, *rest), kwargs

    def inject(hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
        """The features of the tokens that are left, added to their rows."""
        full = hidden.new_zeros(1, places.shape[1], hidden.shape[-1])
        full[places] = features
        return hidden + full[:, alive]

    if TINY[name].injected:
        text._deepstack_process = inject
    try:
        with before_layers(model, cut):
            return model(**call).logits, alive
    finally:
        if TINY[name].injected:
            del text._deepstack_process


def _mask_of(given: Tensor | None, alive: Tensor) -> Tensor | None:
    """A layer's own mask with the rows and columns that are left."""
    if given is None:
        return None  # causal, or everything, whichever rows are left
    return given[..., alive] if given.ndim == 2 else given[..., alive, :][..., alive]


@torch.no_grad()
def native_logits(name: str, model: Any, inputs: dict[str, Any], keep: Tensor, new: Tensor) -> Tensor:
    """Logits `[1, left, vocabulary]` of the stock text model and head for the embeddings that are left, with their positions.

    For causal families without windows, blocks or injected layers; one sample without padding.
    """
    assert TINY[name].plain
    assert inputs["attention_mask"].all()
    text, call, entering = language_model(model), whole(name, model, inputs, new), {}

    def look(module: Any, args: tuple, kwargs: dict) -> None:
        entering.update(kwargs)
        raise _Seen

    handle = text.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model(**call)
    except _Seen:
        pass
    finally:
        handle.remove()
    wanted = torch.nn.functional.pad(keep[0], (0, new.shape[1]), value=True)
    out = text(
        inputs_embeds=entering["inputs_embeds"][:, wanted],
        position_ids=entering["position_ids"][..., wanted],
        attention_mask=torch.ones(1, int(wanted.sum()), dtype=torch.long),
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state)


@torch.no_grad()
def expected_logits(name: str, model: Any, samples: list[list[str]], keep: Keep, new: Tensor) -> Tensor:
    """Logits `[batch, 1 + new, vocabulary]` behind the prompt of `make_inputs(name, samples)`, under each row's `keep`.

    *Masked* for layers with attention; where there are others, *dropped*, one sample after the other.
    """
    if not TINY[name].recurrent:
        inputs = make_inputs(name, samples)
        return masked_logits(name, model, inputs, keep, new)[:, inputs["input_ids"].shape[1] - 1 :]
    return torch.cat([dropped_row(name, model, samples, row, keep, new) for row in range(len(samples))])


def dropped_row(name: str, model: Any, samples: list[list[str]], row: int, keep: Keep, new: Tensor) -> Tensor:
    """Logits `[1, 1 + new, vocabulary]` of one row of a left-padded batch, alone and with its dropped tokens cut out."""
    single = make_single(name, samples, row)
    length = single["input_ids"].shape[1]
    alone = {stage: mask[row : row + 1, -length:] for stage, mask in keep.items()}
    logits, _ = dropped_logits(name, model, single, alone, new[row : row + 1])
    return logits[:, -new.shape[1] - 1 :]
