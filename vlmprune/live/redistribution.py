"""Attention redistribution in a running model: what methods see, where their marks are kept, which rows are computed anew.

In a layer that a method edits, the model's own attention runs first, and the rows the method edits are computed by
`kernels/grouped_attention` and put in their places; a decoding step, whose one row is edited, is computed once. All other rows,
and all other layers, are the model's own. Visibility is known from what is stored (entries stand in the order of time; padding
is known), not from the mask, so that every attention implementation will do.

Marks are made at a prompt with a picture, when its queries and keys are there, and live on the conversation's cache; without a
cache they live with the prompt that generation runs again and again (`attach._Uncached`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmprune.adapters.family import Family, has_mrope
from vlmprune.device import on_device
from vlmprune.errors import UsageError
from vlmprune.kernels.grouped_attention import column_means, grouped_attention, scored_attention
from vlmprune.live.apart import Apart
from vlmprune.live.attention import CALL_ARGUMENT
from vlmprune.live.cache import MarkedLayer, PrunedLayer, holds_words_only, marked_layer
from vlmprune.live.call import Call, Steps
from vlmprune.live.layout import real_tokens
from vlmprune.live.links import check_routes
from vlmprune.live.marks import Marks
from vlmprune.live.masks import pruned_mask
from vlmprune.live.prompt_rows import prompt_end, rows_now
from vlmprune.live.record import Steered
from vlmprune.live.rows import Reduction
from vlmprune.methods.redistributing import GroupEditor, HeadScaler, Picture, Redistributor, Scene, ScoreEditor
from vlmprune.methods.redistribution import VAR
from vlmprune.methods.sink_dims import known_or_none, known_sinks
from vlmprune.recipe import Recipe
from vlmprune.view import TowerFacts


@dataclass(eq=False)
class Entered:
    """What an edited layer was given, and what it found in its first run; gradient checkpointing runs it again.

    Attributes:
        call: the call as this layer sees it.
        hidden: `[batch, token, dim]` the residual; None when the marks are made.
        holder: where the marks are kept.
        layer: the cache layer, or None.
        valid: `[batch, key]` bool, False on padding, or None.
        rows: the rows that are edited, or None for all.
        over: the layer ran once.
    """

    index: int
    call: Call
    hidden: Tensor | None
    holder: _Holder
    layer: MarkedLayer | None
    valid: Tensor | None = None
    rows: Reduction | None = None
    over: bool = False


@dataclass(eq=False)
class _Holder:
    """Marks of one layer where there is no cache."""

    marks: Marks | None = None


@dataclass(eq=False)
class Blind:
    """The text-only stream: the prompt without its pictures.

    Attributes:
        hidden: `[batch, text, dim]` entering the coming layer.
        kwargs: arguments of its decoder layers.
        reached: number of layers it has gone through.
        seeing: of the layer that runs, what the prompt itself came to at its last token, `[batch, head, dim]`.
        pictured: `[batch]` bool, samples that have a picture.
        scale: `[batch, head]` what the layer that runs came to.
    """

    hidden: Tensor
    kwargs: dict[str, Any]
    pictured: Tensor
    reached: int = 0
    seeing: Tensor | None = None
    scale: Tensor | None = None


class Steering:
    """The redistribution methods of a recipe on one model.

    Args:
        methods: of the recipe, in its order.
        family, facts, text: the model's family, what is known of its tower, and its language model.

    Raises:
        UsageError: a layer the model lacks, two methods in one layer, unknown sink dimensions, or a probe it cannot give.
    """

    def __init__(self, methods: Sequence[Redistributor], family: Family, facts: TowerFacts, text: Any) -> None:
        self._family, self._text = family, text
        self._layers: Any = text.get_submodule(family.layers)
        self.by_layer: dict[int, Redistributor] = {}
        self._dims: dict[str, tuple[int, ...]] = {}
        self._energy: float | None = None
        self._names = {method.name: str(Recipe((method,))) for method in methods}
        for method in methods:
            self._check(method, facts)
            for index in method.layers_of(len(self._layers)):
                if (other := self.by_layer.get(index)) is not None:
                    raise UsageError(
                        f"{other.name} and {method.name} both edit layer {index}: give one of them other layers=…."
                    )
                self.by_layer[index] = method
        self.neutral = tuple(method.name for method in methods if method.neutral)
        self.by_layer = {index: method for index, method in self.by_layer.items() if not method.neutral}
        self.needs: frozenset[str] = frozenset().union(*(m.needs for m in self.by_layer.values()))
        scalers = [index for index, method in self.by_layer.items() if isinstance(method, HeadScaler)]
        attention = {index: self._layers[index].get_submodule(family.attention) for index in self.by_layer}
        self._routes = {index: {module: f"{family.layers}.{index}"} for index, module in attention.items()}
        # The text-only stream runs through all layers up to the last that needs it.
        self.routed = sorted({*self.by_layer, *range(max(scalers, default=-1) + 1)})
        self._last_blind = max(scalers, default=-1)

    def _check(self, method: Redistributor, facts: TowerFacts) -> None:
        if method.needs and not facts.cls:
            raise UsageError(
                f"{method.name} needs the attention of the vision tower's CLS token, but {facts.refusal}; choose a method that "
                "does not need it."
            )
        if not isinstance(method, VAR) or method.sink_dims == "cosine" or method.neutral:
            return
        size = self._text.config.hidden_size
        dims, self._energy = method.dims, None
        if dims is None:
            known = known_sinks(self._text.config)
            dims, self._energy = known.dims, known.energy
        elif (known_here := known_or_none(self._text.config)) is not None and set(dims) <= set(known_here.dims):
            self._energy = known_here.energy
        if max(dims) >= size:
            raise UsageError(f"{method.name}: sink_dims has {max(dims)}, but the model has dimensions 0 to {size - 1}.")
        if method.tau is not None and method.tau >= size**0.5:
            raise UsageError(
                f"{method.name}: tau={method.tau:g} is never reached: in a residual of {size} numbers φ stays below √{size} = "
                f"{size**0.5:.1f}."
            )
        self._dims[method.name] = dims

    @property
    def names(self) -> tuple[str, ...]:
        """Of the methods that change something."""
        return tuple(dict.fromkeys(method.name for method in self.by_layer.values()))

    # -- hooks -----------------------------------------------------------------------------------------------------------

    def enter_text(self, call: Call, embeddings: Tensor) -> None:
        """A prompt with a picture begins: prepare the text-only stream."""
        if self.by_layer and call.prompt is not None and call.prompt.tokens.segments is not None:
            call.steps.apart = apart = Apart.of_packed(call)
            return self.enter_text(apart.now(call), apart.take(embeddings, 1))
        if self._last_blind < 0 or call.past or call.resumed:
            return
        assert call.prompt is not None
        text = call.prompt.tokens.own & ~call.prompt.tokens.visual
        if (lone := call.prompt.tokens.visual.any(axis=1) & ~text.any(axis=1)).any():
            row = int(lone.argmax())
            hides = (
                " that the mask does not hide"
                if (~call.prompt.tokens.real & ~call.prompt.tokens.placeholders)[row].any()
                else ""
            )
            raise UsageError(
                f"vhr compares with the prompt without its picture, but a prompt is only a picture: row {row} has no "
                f"text{hides}; add a question."
            )
        # A row that is hidden as a whole has no text either, and no picture: whatever stands for it scales nothing.
        counts = np.maximum(text.sum(axis=1), 1).tolist()
        words = Reduction.keeping(on_device(text, call.prompt.layout.real.device), counts)
        hidden = words.gather(embeddings)
        slots = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[0], -1)
        valid = words.valid.to(hidden.device)
        implementation = self._text.config._attn_implementation
        mask = pruned_mask(slots, valid, slots, valid, words.dense, implementation, hidden.dtype)
        positions = (valid.cumsum(dim=1) - 1).clamp_min(0)
        mrope = has_mrope(self._text.config)
        rotary = self._text.get_submodule(self._family.rotary)
        kwargs = {
            "attention_mask": mask,
            "position_ids": None,
            "position_embeddings": rotary(hidden, positions.expand(3, -1, -1) if mrope else positions),
            "past_key_values": None,
            "use_cache": False,
            CALL_ARGUMENT: (alone := Call(owner=call.owner, plan=call.plan, steps=Steps(of_blind=True))),
        }
        pictured = on_device(np.asarray(call.prompt.tokens.visual.any(axis=1)), hidden.device)
        call.steps.blind = alone.steps.blind = Blind(hidden, kwargs, pictured)

    def enter_layer(self, index: int, call: Call, hidden: Tensor, cache: Any) -> None:
        """Before a steered layer: note what enters it, and where its marks are.

        Raises:
            UsageError: the conversation in the cache began without this method.
        """
        if (apart := call.steps.apart) is not None:
            return self.enter_layer(index, apart.now(call), apart.take(hidden, 1), cache)
        if call.prompt is None and holds_words_only(cache, index, begins=not call.past):
            return None
        layer = None if cache is None else marked_layer(cache, index)
        holder = call.uncached.setdefault(index, _Holder()) if layer is None else layer
        name = self._names[self.by_layer[index].name]
        if not call.past and call.prompt is None:  # a chat that begins with words: nothing is marked yet
            anchor = _first_row(call, hidden) if self._anchors(index) else None
            holder.marks = Marks(name, torch.zeros(hidden.shape[0], 1, 0, dtype=torch.int8), anchor=anchor, idle=True)
        if call.past and (holder.marks is None or holder.marks.by != name):
            began = "without redistribution" if holder.marks is None else f"under {holder.marks.by}"
            raise UsageError(
                f"the conversation in this cache began {began}, this recipe has {name}: go on as it began, start with an empty "
                "cache, or run it inside `with run.override(enabled=False):`."
            )
        if call.past and holder.marks is not None and not holder.marks.idle:
            check_routes(self._routes[index], name)
        before = call.steps.entered.get(index)
        if before is None or not call.recomputes:  # else the layer is run again, and has found everything
            call.steps.entered[index] = Entered(index, call, hidden.detach(), holder, layer)  # type: ignore[arg-type]

    def _anchors(self, index: int) -> bool:
        """Whether the method of a layer compares with the conversation's first token."""
        return getattr(self.by_layer[index], "sink_dims", None) == "cosine"

    def leave(self, call: Call) -> None:
        """A prompt is over. What recomputed layers need stays as long as the call."""
        if not call.recomputes:
            call.steps.entered.clear()
        if call.steps.blind is not None:
            call.steps.blind.kwargs.clear()  # they hold a call that holds them

    # -- the editor of an attention module -------------------------------------------------------------------------------

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
        """One layer's attention: output `[batch, query, head, dim]` and what the model's own returns beside it."""
        call: Call | None = kwargs.get(CALL_ARGUMENT)
        if call is None:
            return own()
        if call.steps.of_blind:
            return self._attend_blind(index, call, own())
        if call.steps.apart is not None:
            return self._attend_apart(index, call, own(), query, key, value, scaling, kwargs)
        entered = call.steps.entered.get(index)
        if entered is None:
            if call.steps.blind is not None:
                self._advance_blind(index, call)
            return own()
        method = self.by_layer[index]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if isinstance(method, HeadScaler):
            return self._scaled(entered, own())
        if call.steps.blind is not None:
            self._advance_blind(index, call)
        # Inside `torch.autocast`, rotated queries and keys are fp32, and values have the dtype of what the model returns.
        returned, key, value = value.dtype, key.to(query.dtype), value.to(query.dtype)
        first = not entered.over
        if first:
            self._find(entered, method, query, key, scaling)
        marks, rows = entered.holder.marks, entered.rows
        assert marks is not None
        if marks.idle:
            self._record(entered, method, marks, first)
            return own()
        if rows is not None and rows.rows.shape[1] == 0:
            return own()
        whole = rows is None and not kwargs.get("output_attentions", getattr(self._text.config, "output_attentions", False))
        result = None if whole else own()
        past, chosen, position = key.shape[2] - query.shape[2], query, None
        if rows is not None:
            chosen = query.gather(2, rows.rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
            position = rows.rows + past
        elif query.shape[2] > 1:
            position = torch.arange(past, key.shape[2], device=key.device)[None]
        device = query.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            edited, changed = self._edited(entered, method, marks, chosen, key, value, scaling, position, first)
        edited = edited.to(returned if result is None else result[0].dtype)
        if result is None:
            return edited.contiguous(), None
        return (_overwritten(result[0], edited, rows, changed), *result[1:])

    def _attend_apart(
        self, index: int, call: Call, result: Any, query: Tensor, key: Tensor, value: Tensor, scaling: Any, kwargs: Any
    ) -> Any:
        """The same of samples that are packed into one row: each is shown alone, and put back in its place."""
        apart = call.steps.apart.in_layer(index, call)
        query, key, value = (apart.take(x, 2) for x in (query, key, value))
        mine = {**kwargs, CALL_ARGUMENT: apart.call}
        edited = self.attend(index, lambda: (apart.take(result[0], 1), None), query, key, value, scaling, **mine)
        return (apart.put_back(result[0], edited[0]), *result[1:])

    def _find(self, entered: Entered, method: Redistributor, query: Tensor, key: Tensor, scaling: float) -> None:
        """In a layer's first run: what is padding, what is marked, and which rows are edited."""
        call, marks = entered.call, entered.holder.marks
        entered.valid = _keys_valid(call, entered, key)
        if call.prompt is not None and not (call.resumed and marks is not None):
            with torch.autocast(query.device.type, enabled=False):
                self._mark(method, call, entered, query, key, scaling, entered.valid)
            marks = entered.holder.marks
        assert marks is not None
        if not marks.idle:
            name = method.rows, query.shape[2], call.section.start
            if name not in call.steps.rows:
                call.steps.rows[name] = _find_rows(call, method, query.shape[0], query.shape[2], query.device)
            entered.rows = call.steps.rows[name]
        entered.hidden, entered.over = None, True

    def _edited(
        self,
        entered: Entered,
        method: Redistributor,
        marks: Marks,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        position: Tensor | None,
        first: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """`[batch, row, head, dim]` of some rows, and which heads of them differ from the model's own `[batch, row, head]`."""
        dtype, valid, rows = torch.promote_types(query.dtype, torch.float32), entered.valid, entered.rows
        if isinstance(method, ScoreEditor):
            weight = marks.weighted(method.strengths, dtype)
            self._record(entered, method, marks, first)
            return scored_attention(query, key, value, scaling, position, valid, weight), None
        assert isinstance(method, GroupEditor)
        groups = marks.grouped(method.groups, dtype)
        coefficients = partial(method.coefficients, present=marks.present)
        out, factors, masses = grouped_attention(query, key, value, scaling, position, valid, groups, coefficients)
        if entered.call.record is None:
            return out, None
        self._record(entered, method, marks, first, factors.detach(), masses.detach(), None if rows is None else rows.valid)
        return out, (factors != 1).any(dim=-1).transpose(1, 2)

    def _record(self, entered: Entered, method: Redistributor, marks: Marks, first: bool, *edit: Tensor | None) -> None:
        record = entered.call.record
        if first and record is not None and marks.codes is not None and marks.codes.shape[-1]:  # else words alone
            record.steered.append(Steered(entered.index, method.name, marks.codes, *edit))

    # -- marks -----------------------------------------------------------------------------------------------------------

    def _mark(
        self,
        method: Redistributor,
        call: Call,
        entered: Entered,
        query: Tensor,
        key: Tensor,
        scaling: float,
        valid: Tensor | None,
    ) -> None:
        """At a prompt with a picture: let the method mark its tokens, behind those that are marked already."""
        assert isinstance(method, GroupEditor | ScoreEditor)
        before = entered.holder.marks
        past = key.shape[2] - query.shape[2]
        prompt, visual = _prompt(call, query.device)
        first = None if call.past else prompt.to(torch.int8).argmax(dim=1)
        hidden, anchor = entered.hidden, None if before is None else before.anchor
        assert hidden is not None
        if self._anchors(entered.index) and first is not None:
            anchor = _first_row(call, hidden)
        position = torch.arange(past, key.shape[2], device=key.device)[None]
        see = Scene(
            hidden=hidden.detach(),
            prompt=prompt,
            visual=visual,
            first=first,
            anchor=anchor,
            pictures=_pictures(call, query.device) if method.needs else (),
            sink_dims=self._dims.get(method.name),
            sink_energy=self._energy,
            column_means=lambda: column_means(query.detach(), key.detach(), scaling, position, valid, prompt)[..., past:],
        )
        # A prompt without a picture marks nothing, nor does it beside prompts that have one.
        assert call.prompt is not None
        codes = method.codes(see)
        if not call.prompt.tokens.visual.any(axis=1).all():
            codes = codes * on_device(np.asarray(call.prompt.tokens.visual.any(axis=1)), codes.device)[:, None, None]
        if before is not None and before.codes is not None and past:
            heads = max(before.codes.shape[1], codes.shape[1])
            earlier = before.padded(past).to(codes.device)
            codes = torch.cat((earlier.expand(-1, heads, -1), codes.expand(-1, heads, -1)), dim=2)
        # Known without waiting on a CPU only; elsewhere factors of 1 leave every number as it was.
        idle = codes.device.type == "cpu" and not bool(codes.any())
        entered.holder.marks = Marks(self._names[method.name], codes, anchor=anchor, idle=idle)

    # -- scaling heads ---------------------------------------------------------------------------------------------------

    def _scaled(self, entered: Entered, result: Any) -> Any:
        """The model's own result, its heads scaled by what the two streams say at the prompt."""
        output: Tensor = result[0]
        call, marks = entered.call, entered.holder.marks
        blind = call.steps.blind
        if blind is not None and marks is None:
            end = prompt_end(call, output.shape[1]).to(output.device)
            blind.seeing = output.detach()[torch.arange(len(end), device=end.device), end].float()
            self._advance_blind(entered.index, call)
            name = self.by_layer[entered.index].name
            marks = entered.holder.marks = Marks(self._names[name], heads=blind.scale)
            if call.record is not None:
                call.record.steered.append(Steered(entered.index, name, heads=blind.scale))
        assert marks is not None
        if marks.heads is None:  # the conversation began without a picture
            return result
        return (output * marks.heads.to(output)[:, None, :, None], *result[1:])

    def _advance_blind(self, index: int, call: Call) -> None:
        """One layer of the text-only stream, beside the same layer of the prompt."""
        blind = call.steps.blind
        if blind is None or index > self._last_blind or index < blind.reached:
            return
        blind.reached = index + 1
        with torch.no_grad():
            # Not called as a module: its hooks are for the prompt, and would see every layer twice.
            output = self._layers[index].forward(blind.hidden, **blind.kwargs)
        blind.hidden = output[0] if isinstance(output, tuple) else output
        blind.seeing = None

    def _attend_blind(self, index: int, call: Call, result: Any) -> Any:
        blind, method = call.steps.blind, self.by_layer.get(index)
        assert blind is not None
        result = (result[0], None)  # nobody asked for these weights
        if not isinstance(method, HeadScaler) or blind.seeing is None:
            return result
        scale = method.scale(blind.seeing, result[0][:, -1].float())
        blind.scale = torch.where(blind.pictured[:, None], scale, 1)
        return result[0] * blind.scale.to(result[0])[:, None, :, None], None


def _first_row(call: Call, hidden: Tensor) -> Tensor:
    """`[batch, dim]` fp32 residual of the first token of every conversation that begins with this call."""
    batch, tokens, _ = hidden.shape
    own = call.prompt is not None
    real = _prompt(call, hidden.device)[0] if own else real_tokens(call.mask, batch, tokens, hidden.device)
    samples = torch.arange(batch, device=hidden.device)
    return hidden[samples, real.to(torch.int8).argmax(dim=1)].detach().float()


def _prompt(call: Call, device: torch.device) -> tuple[Tensor, Tensor]:
    """`[batch, token]` bool of what the current layer computes: the prompt's tokens, and visual ones among them."""
    assert call.prompt is not None
    assert call.prompt.end is not None
    place = torch.arange(call.sequence, device=call.prompt.layout.real.device)
    prompt = call.prompt.layout.real & (place <= call.prompt.end[:, None])
    visual = torch.zeros_like(prompt)
    for image in call.prompt.layout.images:
        visual[image.sample, image.positions] = True
    visual &= call.prompt.layout.real
    return _computed(call, prompt).to(device), _computed(call, visual).to(device)


def _computed(call: Call, x: Tensor) -> Tensor:
    """`[batch, token]` of what the current layer computes from `[batch, sequence]` bool; False on padding."""
    return x if call.section.rows is None else x.gather(1, call.section.rows.rows) & call.section.rows.valid


def _find_rows(call: Call, method: Redistributor, batch: int, tokens: int, device: torch.device) -> Reduction | None:
    """The rows a method edits among `tokens` query rows; None for all of them."""
    if call.prompt is None:  # decoding, candidates of assisted decoding, or a turn without a picture: all behind the picture
        wanted = max(call.logits_wanted, 1)
        if method.rows != "last" or wanted >= tokens:
            return None
        rows = torch.arange(tokens - wanted, tokens, device=device).expand(batch, wanted)
        return Reduction(rows, torch.ones_like(rows, dtype=torch.bool), True)
    if method.rows == "all":
        return None
    assert call.prompt is not None
    begin, place = call.prompt.tokens.end, np.arange(call.sequence)
    if method.rows == "behind":
        # Behind all placeholders of the last picture: LLaVA-NeXT's end with a row separator, which is no text behind it.
        # A prompt without a picture has nothing behind one; a later turn stands behind the pictures of earlier turns.
        begin = np.where(call.prompt.tokens.visual, place + 1, 0).max(axis=1)
        begin[begin == 0] = 0 if call.past else call.sequence
    wanted_rows = call.prompt.tokens.real & (place >= begin[:, None])
    edited = Reduction.keeping(
        _computed(call, on_device(wanted_rows, call.prompt.layout.real.device)), wanted_rows.sum(axis=1).tolist()
    )
    return Reduction(edited.rows.to(device), edited.valid.to(device), edited.dense)


def _keys_valid(call: Call, entered: Entered, key: Tensor) -> Tensor | None:
    """`[batch, key]` bool, False on padding; None where there is none."""
    keys = key.shape[2]
    if isinstance(entered.layer, PrunedLayer):
        entries = entered.layer.entries
        return None if entries.dense else entries.valid.to(key.device)
    if call.section.rows is not None:
        return None if call.section.rows.dense else call.section.rows.valid.to(key.device)
    return None if call.mask is None else call.mask[:, :keys].to(key.device, torch.bool)


def _overwritten(output: Tensor, edited: Tensor, rows: Reduction | None, changed: Tensor | None) -> Tensor:
    """`[batch, query, head, dim]` with some rows replaced, in the heads that changed."""
    if rows is None:
        return edited if changed is None else torch.where(changed[..., None], edited, output)
    index = rows.rows[:, :, None, None].expand(-1, -1, *output.shape[2:])
    own = output.gather(1, index)
    new = edited if changed is None else torch.where(changed[..., None], edited, own)
    if not rows.dense:
        new = torch.where(rows.valid[:, :, None, None], new, own)
    return output.scatter(1, index, new)


def _pictures(call: Call, device: torch.device) -> list[Picture]:
    assert call.prompt is not None
    return [
        Picture(image.sample, rows_now(call, number, index).to(device), index, len(image), tower)
        for number, (image, index, tower) in enumerate(
            zip(call.prompt.layout.images, call.section.remaining, call.prompt.tower, strict=True)
        )
    ]
