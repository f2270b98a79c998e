"""A decoding step of a conversation in a static cache, which `torch.compile` may run as one graph.

Nothing begins in it, and all that it needs is on the cache: which entries a layer has (`StaticPrunedLayer`), what
redistribution marked (`Marks`), and whose conversation it is (`Owner`). So there is no `Call`. The hooks of the model, the base
model and the language model do nothing, and those of the decoder layers are compiled with the layers. In a step that is not
compiled, the hooks also check what would wait for the device, or what a compiled graph takes for granted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmprune.errors import UsageError
from vlmprune.kernels.grouped_attention import grouped_attention, plain_grouped, plain_scored, scored_attention
from vlmprune.live.attention import CALL_ARGUMENT
from vlmprune.live.cache_layer import Marked
from vlmprune.live.marks import Marks
from vlmprune.live.masks import not_masked
from vlmprune.live.static_cache import StaticMarkedLayer, StaticPrunedLayer, is_filled
from vlmprune.live.text_only import scaled
from vlmprune.methods.redistributing import GroupEditor, HeadScaler, Redistributor, ScoreEditor

if TYPE_CHECKING:
    from vlmprune.live.redistribution import Redistribution

IMAGES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
"""Arguments of a call that brings images."""


def is_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a model is called for one token that follows others in a static cache."""
    if not is_filled(kwargs.get("past_key_values")):
        return False
    for name in IMAGES:
        if kwargs.get(name) is not None:
            return False
    tokens = tokens_of(args, kwargs)
    return tokens is not None and tokens.shape[1] == 1


def tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Ids or embeddings of a call, `[batch, token, …]`; None if it has neither."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    return kwargs.get("inputs_embeds") if tokens is None else tokens


def is_compiled_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The same where it is compiled: the hooks around the layers have nothing to do, because the plan that the conversation
    began with is there."""
    if not is_step(args, kwargs):
        return False
    owner = getattr(kwargs["past_key_values"], "vlmprune", None)
    return owner is not None and owner.plan is not None


def enter_layer(
    index: int,
    stored_at: int | None,
    rotary: Callable[..., tuple[Tensor, Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What a decoder layer is given in a step: the mask of the entries that it has, and what redistribution does.

    Args:
        index: of the layer.
        stored_at: the layer in whose cache the keys are that it sees; None where it is recurrent.
        rotary: cosines and sines of positions `[batch, token]`, given hidden states.
        args, kwargs: the layer's own.
    """
    cache = kwargs.get("past_key_values")
    if cache is None or stored_at is None or stored_at >= len(cache.layers):
        return None
    layer = cache.layers[stored_at]
    if not isinstance(layer, Marked):
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    if hidden.shape[1] != 1:
        return None
    changed: dict[str, Any] = {}
    if isinstance(layer, StaticPrunedLayer) and layer.recorded is not None:
        changed["attention_mask"] = layer.step_mask(kwargs.get("attention_mask"), lent=stored_at != index)
        if layer.recorded.shift is not None:
            changed["position_embeddings"] = rotary(hidden, kwargs["position_ids"] - layer.recorded.shift[:, None])
    marks = layer.marks
    if marks is not None and not marks.idle and stored_at == index and (edit := _edit_of(index, cache, marks)) is not None:
        changed[CALL_ARGUMENT] = edit
    return (args, {**kwargs, **changed}) if changed else None


def _edit_of(index: int, cache: Any, marks: Marks) -> StepEdit | None:
    """What redistribution does in a layer with marks; None where the caller has switched it off."""
    owner = getattr(cache, "vlmprune", None)
    if owner is None or owner.plan is None:
        return None
    contexts = owner.plan.contexts
    if not contexts.always_on and not _enabled(contexts):
        return None
    method = owner.plan.redistribution.by_layer.get(index)
    return None if method is None else StepEdit(method, marks)


@torch.compiler.disable
def _enabled(contexts: Any) -> bool:
    """A caller's switch is in a context variable, which cannot be compiled."""
    return bool(contexts.settings.enabled)


class StepEdit:
    """What redistribution does in one layer, in one step. It travels where the `Call` does otherwise.

    Args:
        method: bound to the model.
        marks: of the layer.
    """

    def __init__(self, method: Redistributor, marks: Marks) -> None:
        self.method, self.marks = method, marks

    def attend_step(
        self,
        own: Callable[[], Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        weights_wanted: bool,
    ) -> Any:
        """Attention of one row, as `Redistribution.attend` returns it.

        Args:
            own: runs the model's own attention.
            query, key, value: `[batch, head, 1, dim]`, `[batch, kv_head, place, dim]`.
            mask: `[batch or 1, head or 1, 1, place]`, or None if the row sees all.
            scaling: factor on the scores.
            weights_wanted: the model's attention weights are returned, too.
        """
        if isinstance(self.method, HeadScaler):
            result = own()
            heads = self.marks.heads
            return result if heads is None else (scaled(result[0], heads), *result[1:])
        weights = own()[1] if weights_wanted else None
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        dtype, keys = torch.promote_types(query.dtype, torch.float32), key.shape[2]
        valid = None if mask is None else not_masked(mask).any(dim=1)[:, 0].expand(query.shape[0], -1)
        table = _table(self.method, self.marks, keys, dtype)
        key, value = key.to(query.dtype), value.to(query.dtype)
        compiled = torch.compiler.is_compiling()  # a kernel of ours is not traced
        if isinstance(self.method, ScoreEditor):
            scored = plain_scored if compiled else scored_attention
            return scored(query, key, value, scaling, None, valid, table).to(value.dtype), weights
        assert isinstance(self.method, GroupEditor)
        coefficients = partial(self.method.coefficients, present=self.marks.present)
        grouped = plain_grouped if compiled else grouped_attention
        return grouped(query, key, value, scaling, None, valid, table, coefficients)[0].to(value.dtype), weights


def _table(method: Redistributor, marks: Marks, keys: int, dtype: torch.dtype) -> Tensor:
    """The table of a layer's marks, for `keys` keys."""
    if isinstance(method, ScoreEditor):
        return marks.weights(method.strengths, keys, dtype)
    assert isinstance(method, GroupEditor)
    return marks.members(method.group_count, keys, dtype)


def prepare_steps(method: Redistributor, layer: Marked) -> None:
    """After a prompt: make the table that all steps of a static layer use, so that no step that is compiled makes it."""
    marks = layer.marks
    if isinstance(layer, StaticMarkedLayer) and marks is not None and marks.groups is not None and not marks.idle:
        assert layer.keys is not None
        _table(method, marks, layer.keys.shape[2], torch.promote_types(layer.keys.dtype, torch.float32))


def check_marked(cache: Any, redistribution: Redistribution) -> None:
    """Before a step that is not compiled: every edited layer has marks of its method.

    Raises:
        UsageError: the conversation began without it, or with another one.
    """
    for index, name in redistribution.edited_by.items():
        if index < len(cache.layers):
            redistribution.check_goes_on(getattr(cache.layers[index], "marks", None), name)


def check_implementation(implementation: str, what: str) -> None:
    """Refuse a static cache for attention implementations whose masks are not gathered.

    Raises:
        UsageError: flash or flex attention.
    """
    if "flash" in implementation or implementation == "flex_attention":
        raise UsageError(
            f"{what} in a static cache needs a mask for every place of the cache, which {implementation!r} does not take: call "
            'model.set_attn_implementation("sdpa"), or leave the static cache out.'
        )
