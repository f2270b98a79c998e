"""Attention redistribution in a running model: which layers are edited, where marks are kept, and the edit itself.

Edited rows are computed by `kernels/grouped_attention`. At a prompt, the model's own attention runs first, and the edited rows
replace its rows; where all rows are edited, as in a decoding step, it does not run at all. All other rows and layers are the
model's own. Which keys a row sees follows from the stored entries (they are in the order of the conversation, and padding is
known), not from the mask, so that every attention implementation can be used.

Marks are made at a prompt with an image, when its queries and keys exist (`live/marking.py`), and are kept on the layers of the
conversation's cache. Without a cache, they are kept on empty cache layers that stay with the prompt (`live.prefill.Uncached`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import UsageError
from vlmprune.kernels.grouped_attention import grouped_attention, scored_attention
from vlmprune.live.apart import Apart
from vlmprune.live.attention import CALL_ARGUMENT
from vlmprune.live.cache import MarkedLayer, holds_words_only, marked_layer
from vlmprune.live.cache_layer import Marked, Pruned
from vlmprune.live.call import Call
from vlmprune.live.decoder import Decoder
from vlmprune.live.decoding_step import DecodingStep
from vlmprune.live.edited_rows import find_rows, keys_valid, overwritten
from vlmprune.live.edits import LayerInput
from vlmprune.live.kinds import Kinds
from vlmprune.live.links import check_routes
from vlmprune.live.marking import mark_prompt, mark_words_only
from vlmprune.live.marks import Marks
from vlmprune.live.record import Edit
from vlmprune.live.static_cache import without_empty_places
from vlmprune.live.static_step import prepare_steps
from vlmprune.live.text_only import TextOnly, scaled
from vlmprune.methods.redistributing import GroupEditor, HeadScaler, ModelFacts, Redistributor, ScoreEditor
from vlmprune.recipe import Recipe
from vlmprune.view import TowerFacts


class Redistribution:
    """The redistribution methods of a recipe on one model.

    Args:
        methods: of the recipe, in its order.
        decoder, facts: the model's language model, and facts about its vision tower.

    Attributes:
        by_layer, edited_by: the method, bound to this model, that edits each layer; and as a recipe string.
        names, neutral: of the methods that change something, and of those that change nothing.
        needs: probes of the vision tower.
        routed: layers whose attention module is led through `attend`.

    Raises:
        UsageError: a layer that the model lacks or that has no full attention, two methods in one layer, or a method that does
            not work with the model.
    """

    def __init__(self, methods: Sequence[Redistributor], decoder: Decoder, facts: TowerFacts) -> None:
        self._family, self._language_model, self._layers = decoder.family, decoder.language_model, decoder.layers
        family, language_model = self._family, self._language_model
        model = ModelFacts(language_model.config, language_model.config.hidden_size, len(self._layers), facts)
        edited: dict[int, Redistributor] = {}
        self.edited_by: dict[int, str] = {}
        for method in methods:
            bound = method.bind(model)
            for index in method.layers_of(len(self._layers)):
                if (other := edited.setdefault(index, bound)) is not bound:
                    raise UsageError(
                        f"{other.name} and {method.name} both edit layer {index}: give one of them other layers=…."
                    )
                if not method.neutral:
                    self.edited_by[index] = str(Recipe((method,)))
        self.neutral = tuple(method.name for method in methods if method.neutral)
        self.by_layer = {index: edited[index] for index in self.edited_by}
        self.names = tuple(dict.fromkeys(method.name for method in self.by_layer.values()))
        self.needs: frozenset[str] = frozenset().union(*(m.needs for m in self.by_layer.values()))
        self._routes: dict[str, dict[nn.Module, str]] = {}
        # The text-only stream runs through all layers up to the last that compares with it.
        self._compared = max((index for index, m in self.by_layer.items() if isinstance(m, HeadScaler)), default=-1)
        self.routed = sorted({*self.by_layer, *range(self._compared + 1)})
        _check_kinds(self.names, self.routed, self._compared, decoder.kinds)
        for index, name in self.edited_by.items():
            module = self._layers[index].get_submodule(family.attention)
            self._routes.setdefault(name, {})[module] = f"{family.layers}.{index}"

    # -- hooks -----------------------------------------------------------------------------------------------------------

    def enter_text(self, call: Call, embeddings: Tensor) -> None:
        """A prompt with an image enters the language model: prepare packed samples, and the text-only stream.

        Raises:
            UsageError: a method compares with the text alone, and a prompt has none.
        """
        if self.by_layer and call.prompt is not None and call.prompt.tokens.segments is not None:
            call.edits.apart = apart = Apart.of_packed(call)
            return self.enter_text(apart.now(call), apart.take(embeddings, 1))
        if self._compared >= 0 and not call.past and not call.resumed:
            layers, name = self._layers[: self._compared + 1], self.by_layer[self._compared].name
            call.edits.text_only = TextOnly.enter(call, embeddings, self._language_model, self._family, layers, name)

    def enter_step(self, call: Call, kwargs: dict[str, Any]) -> None:
        """A later call without an image enters the language model: look up the marks of all layers at once. If a layer has none
        of this method, the hooks of the layers do it, and refuse or leave out what they find."""
        embeddings, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if not call.enabled or cache is None:
            return
        layers, marked, idle = cache.layers, call.edits.marked_layers, True
        plain = embeddings is not None and self._compared < 0 and _sees_all(call, embeddings, self._language_model.config)
        for index, name in self.edited_by.items():
            layer = layers[index] if index < len(layers) else None
            if not isinstance(layer, Marked) or (marks := layer.marks) is None or marks.by != name:
                marked.clear()
                return
            marked[index] = layer
            idle = idle and marks.idle
            plain = plain and (not isinstance(layer, Pruned) or layer.recorded is None or layer.recorded.dense)
        if not idle:
            for name, routes in self._routes.items():
                check_routes(routes, name)
        call.edits.ready = True
        if not plain:
            call.edits.inputs = {index: LayerInput(index, call, None, layer) for index, layer in marked.items()}
            call.edits.marked_layers = {}

    def enter_layer(self, index: int, call: Call, hidden: Tensor, cache: Any) -> None:
        """Before an edited layer: note what enters it, and where its marks are kept.

        Raises:
            UsageError: the conversation in the cache began without this method.
        """
        if call.edits.ready:
            return None
        if (apart := call.edits.apart) is not None:
            return self.enter_layer(index, apart.now(call), apart.take(hidden, 1), cache)
        if call.prompt is None and holds_words_only(cache, index, begins=not call.past):
            return None
        layer = call.uncached.setdefault(index, MarkedLayer()) if cache is None else marked_layer(cache, index)
        name = self.edited_by[index]
        if not call.past and call.prompt is None:
            layer.marks = mark_words_only(name, self.by_layer[index], call, hidden)
        if call.past:
            self.check_goes_on(layer.marks, name)
        if call.edits.inputs.get(index) is None or not call.recomputes:  # otherwise the layer runs again, and all is found
            call.edits.inputs[index] = LayerInput(index, call, hidden.detach(), layer)

    def leave(self, call: Call) -> None:
        """A prompt is over. What recomputed layers need stays as long as the call."""
        for given in call.edits.inputs.values():
            prepare_steps(self.by_layer[given.index], given.layer)
        if not call.recomputes:
            call.edits.inputs.clear()
        if call.edits.text_only is not None:
            call.edits.text_only.close()

    def check_goes_on(self, marks: Marks | None, name: str) -> None:
        """Refuse to edit a conversation that began otherwise, or attention that is not led through `attend` any more."""
        if marks is None or marks.by != name:
            began = "without redistribution" if marks is None else f"under {marks.by}"
            raise UsageError(
                f"the conversation in this cache began {began}, this recipe has {name}: go on as it began, start with an empty "
                "cache, or run it inside `with run.override(enabled=False):`."
            )
        if not marks.idle:
            check_routes(self._routes[name], name)

    # -- the attention of a layer ----------------------------------------------------------------------------------------

    def attend(
        self,
        index: int,
        own: Callable[[], Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Attention of a layer in `routed`.

        Args:
            index: of the layer.
            own: runs the model's own attention.
            query: `[batch, head, query, dim]` after rotary embedding.
            key, value: `[batch, kv_head, key, dim]`.
            scaling: factor on the scores.
            kwargs: further arguments of the attention function, the call among them.

        Returns:
            Output `[batch, query, head, dim]`, and what the model's own attention returns beside it.
        """
        call: Call | None = kwargs.get(CALL_ARGUMENT)
        if call is None:
            return own()
        edits = call.edits
        if (layer := edits.marked_layers.get(index)) is not None and (marks := layer.marks) is not None:
            if marks.idle:
                return own()
            if query.dtype == value.dtype and not kwargs.get("output_attentions"):
                if (step := marks.step) is None or step.dtype != query.dtype or step.entries < key.shape[2]:
                    step = marks.step = DecodingStep.of(self.by_layer[index], marks, query, key, value)
                return step(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
            edits.inputs[index] = LayerInput(index, call, None, layer)
        method = self.by_layer.get(index)
        if edits.is_text_only:
            assert edits.text_only is not None
            return edits.text_only.attend(method, own())
        if edits.apart is not None:
            return self._attend_apart(index, call, own(), query, key, value, scaling, kwargs)
        given = edits.inputs.get(index)
        if given is not None and isinstance(method, HeadScaler):
            return _scaled(self.edited_by[index], given, method, own())
        if edits.text_only is not None:
            edits.text_only.advance(index)
        return own() if given is None else self._edit(given, own, query, key, value, scaling, kwargs)

    def _edit(
        self,
        given: LayerInput,
        own: Callable[[], Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """The same for a layer whose rows are edited: all of them, or some that take the places of the model's own."""
        method = self.by_layer[given.index]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        key, value = without_empty_places(given.layer, given.call.past + query.shape[2], key, value)
        # Inside `torch.autocast`, rotated queries and keys are fp32, and values have the dtype of what the model returns.
        returned = value.dtype
        if not query.dtype == key.dtype == returned:
            key, value = key.to(query.dtype), value.to(query.dtype)
        first = not given.ran
        if first:
            self._find(given, method, query, key, scaling)
        marks, rows = given.layer.marks, given.rows
        assert marks is not None
        if marks.idle:
            _record(given, method, marks, first)
            return own()
        result = None
        if rows is not None or kwargs.get(
            "output_attentions", getattr(self._language_model.config, "output_attentions", False)
        ):
            result = own()
            if rows is not None and rows.rows.shape[1] == 0:
                return result
        past, chosen, position = key.shape[2] - query.shape[2], query, None
        if rows is not None:
            chosen = query.gather(2, rows.rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
            position = rows.rows + past
        elif query.shape[2] > 1:
            position = torch.arange(past, key.shape[2], device=key.device)[None]
        device = query.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            edited, changed = _edited(given, method, marks, chosen, key, value, scaling, position, first)
        if result is None:
            return edited.to(returned).contiguous(), None
        return (overwritten(result[0], edited.to(result[0].dtype), rows, changed), *result[1:])

    def _attend_apart(
        self, index: int, call: Call, result: Any, query: Tensor, key: Tensor, value: Tensor, scaling: Any, kwargs: Any
    ) -> Any:
        """The same for samples that are packed into one row: each is taken out, edited alone, and put back."""
        assert call.edits.apart is not None
        apart = call.edits.apart.in_layer(index, call)
        query, key, value = (apart.take(x, 2) for x in (query, key, value))
        mine = {**kwargs, CALL_ARGUMENT: apart.call}
        edited = self.attend(index, lambda: (apart.take(result[0], 1), None), query, key, value, scaling, **mine)
        return (apart.put_back(result[0], edited[0]), *result[1:])

    def _find(self, given: LayerInput, method: Redistributor, query: Tensor, key: Tensor, scaling: float) -> None:
        """In a layer's first run: which keys are padding, what is marked, and which rows are edited."""
        call, marks = given.call, given.layer.marks
        given.valid = keys_valid(call, given.layer, key)
        if call.prompt is not None and not (call.resumed and marks is not None):
            assert isinstance(method, GroupEditor | ScoreEditor)
            with torch.autocast(query.device.type, enabled=False):
                marks = mark_prompt(self.edited_by[given.index], method, given, query, key, scaling)
            given.layer.marks = marks
        assert marks is not None
        if not marks.idle and (call.prompt is not None or query.shape[2] > 1):
            kind = method.rows, query.shape[2], call.section.start
            if kind not in call.edits.rows:
                call.edits.rows[kind] = find_rows(call, method.rows, query.shape[0], query.shape[2], query.device)
            given.rows = call.edits.rows[kind]
        given.hidden, given.ran = None, True


def _edited(
    given: LayerInput,
    method: Redistributor,
    marks: Marks,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    position: Tensor | None,
    first: bool,
) -> tuple[Tensor, Tensor | None]:
    """`[batch, row, head, dim]` of the edited rows, and which heads of them differ from the model's own `[batch, row,
    head]`; None if all may."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    entries, valid, rows = key.shape[2], given.valid, given.rows
    if isinstance(method, ScoreEditor):
        weight = marks.weights(method.strengths, entries, dtype)
        _record(given, method, marks, first)
        return scored_attention(query, key, value, scaling, position, valid, weight), None
    assert isinstance(method, GroupEditor)
    members = marks.members(method.group_count, entries, dtype)
    coefficients = partial(method.coefficients, present=marks.present)
    out, factors, masses = grouped_attention(query, key, value, scaling, position, valid, members, coefficients)
    if given.call.record is None:
        return out, None
    _record(given, method, marks, first, factors.detach(), masses.detach(), None if rows is None else rows.valid)
    return out, (factors != 1).any(dim=-1).transpose(1, 2)


def _record(given: LayerInput, method: Redistributor, marks: Marks, first: bool, *edit: Tensor | None) -> None:
    record = given.call.record
    if first and record is not None and marks.groups is not None and marks.groups.shape[-1]:  # otherwise words only
        record.edits.append(Edit(given.index, method.name, marks.groups, *edit))


def _check_kinds(names: Sequence[str], layers: Sequence[int], compared: int, kinds: Kinds) -> None:
    """Refuse to edit what is no attention, or attention that does not see the whole conversation by keys of its own.

    Raises:
        UsageError: names the layers that can be edited.
    """
    fits = [layer for layer, kind in enumerate(kinds.of) if kind.window is None and kinds.stored_at[layer] == layer]
    wrong = next((layer for layer in layers if layer not in fits), None)
    if wrong is None:
        return
    window, where = kinds.of[wrong].window, kinds.stored_at[wrong]
    found = kinds.in_words(wrong) if where is None else f"layer {wrong} sees a window of {window} tokens"
    found = found if where is None or window is not None else f"layer {wrong} sees the keys of layer {where}"
    todo = f"give it layers={'|'.join(map(str, fits))}" if fits and compared < 0 else "choose another method"
    runs = "runs through" if compared >= 0 else "edits"
    raise UsageError(f"{', '.join(names)} {runs} attention that sees the whole conversation, but {found}: {todo}.")


def _scaled(name: str, given: LayerInput, method: HeadScaler, result: Any) -> Any:
    """The model's own result, its heads scaled by factors that are found at the prompt."""
    call, marks = given.call, given.layer.marks
    if call.edits.text_only is not None and marks is None:
        heads = call.edits.text_only.compare(given.index, call, result[0])
        marks = given.layer.marks = Marks(name, heads=heads)
        if call.record is not None:
            call.record.edits.append(Edit(given.index, method.name, heads=heads))
    assert marks is not None
    if marks.heads is None:  # the conversation began without an image
        return result
    return (scaled(result[0], marks.heads), *result[1:])


def _sees_all(call: Call, embeddings: Tensor, config: Any) -> bool:
    """Whether a call decodes one token that sees every key, in the model's own dtype, with nothing to compute beside."""
    if embeddings.shape[1] != 1 or call.padded_step or torch.is_grad_enabled():
        return False
    if getattr(config, "output_attentions", False) or torch.is_autocast_enabled(embeddings.device.type):
        return False
    mask = call.mask
    # Read on a CPU only, where nothing waits.
    return mask is None or (mask.device.type == "cpu" and mask.shape[1] == call.past + 1 and bool(mask.all()))
