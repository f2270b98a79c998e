"""Pruning as masking: what a pruned model must compute, obtained without dropping anything.

A token that layers `>= L` no longer see is, exactly, a token whose column those layers mask. The oracles run the stock model at
full length and hide columns through pre-hooks on its decoder layers; they share no code with vlmprune.

`keep` is, as in `run.last.keep`, a dict: stage layer -> bool tensor [batch, sequence]; True means that layers from that stage
on still see the position. A sequence longer than the tensor is True from there on (generated tokens).

Methods that do more than drop are described by an `Effect`: what they merged into the kept tokens, which stages renumber
positions, what decoding no longer sees. Every oracle takes a `keep`, an effect, or the effects of several turns of a
conversation. What the vision tower merged or dropped is taken from the pruned run itself: the oracle starts from the survivors'
rows as they entered the language model, and says nothing about how the tower made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tiny_models import FLEX
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from oracles.places import decoder_layers, image_columns, prompt_positions, visual_columns

Keep = dict[int, torch.Tensor]

TOLERANCE = 5e-5
"""Absolute, for float32 logits of standard deviation 1; rounding alone reaches 2e-5."""


@dataclass(frozen=True)
class Effect:
    """All that a pruned run may do to the tokens of one prompt.

    `keep_cache` is what rows behind the prompt see in addition to `keep`; `merged` holds, per stage's layer,
    (row, columns, hidden states) that take these places before the layer runs; the stages in `compact` move
    everything behind a token they drop one position up; `real` [batch, sequence] is False on padding; `start` is
    the prompt's first column in the conversation.
    """

    keep: Keep
    keep_cache: Keep = field(default_factory=dict)
    merged: dict[int, list[tuple[int, torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    compact: frozenset[int] = frozenset()
    real: torch.Tensor | None = None
    start: int = 0

    @property
    def end(self) -> int:
        masks = [*self.keep.values(), *self.keep_cache.values()]
        return self.start + (masks[0].shape[1] if masks else 0)

    def renumbered(self, layer: int) -> torch.Tensor | None:
        """Tokens [batch, sequence] whose place was closed up before `layer`."""
        if not self.compact:
            return None
        before, gone = self.real, torch.zeros_like(self.real)
        for stage in sorted(stage for stage in self.keep if stage <= layer):
            if stage in self.compact:
                gone = gone | (before & ~self.keep[stage])
            before = self.keep[stage]
        return gone

    def one_per_sample(self, samples: int) -> Effect:
        """Beams and returned sequences repeat a sample's row: all must have made the same decision."""

        def first(mask):
            copies = mask.view(samples, -1, mask.shape[1])
            assert (copies == copies[:, :1]).all(), "copies of one sample kept different tokens"
            return copies[:, 0]

        keep, keep_cache = ({layer: first(mask) for layer, mask in masks.items()} for masks in (self.keep, self.keep_cache))
        times = next(iter(self.keep.values())).shape[0] // samples
        merged = {
            layer: [(row // times, columns, hidden) for row, columns, hidden in entries if row % times == 0]
            for layer, entries in self.merged.items()
        }
        real = None if self.real is None else first(self.real)
        return Effect(keep, keep_cache, merged, self.compact, real, self.start)


Claims = Keep | Effect | Sequence[Effect]
"""What an oracle plays on the stock model."""


def effects_of(claims: Claims) -> list[Effect]:
    if isinstance(claims, Effect):
        return [claims]
    return [Effect(claims)] if isinstance(claims, dict) else list(claims)


def effect_of(model, inputs: dict, run, entered: torch.Tensor | None = None, start: int = 0) -> Effect:
    """The effect of a run's last prefill: of `inputs`, at column `start`, whose rows it may have repeated (beams).

    `entered` [batch, sequence, dim] is what entered the language model (`Entering`), for methods that work
    inside the vision tower.
    """
    last, length = run.last, inputs["input_ids"].shape[1]
    rows = last.batch // len(inputs["input_ids"])
    ids, real = (inputs[name].repeat_interleave(rows, 0) for name in ("input_ids", "attention_mask"))
    merged: dict[int, list] = {}
    for image in last.kept:
        if image.features is not None:
            columns = visual_columns(model, inputs, image.sample // rows, image.ordinal)[image.index]
            merged.setdefault(image.layer, []).append((image.sample, columns, image.features))
    if any(image.site in ("pixels", "vision") for image in last.kept):
        places = image_columns(model, ids)
        tower = [
            (row, columns.nonzero()[:, 0], entered[row, columns].nan_to_num(posinf=0)) for row, columns in enumerate(places)
        ]
        merged[0] = [entry for entry in tower if len(entry[1])] + merged.get(0, [])
    layers = {True: set(), False: set()}  # by whether positions are renumbered
    for image in (image for image in last.kept if image.site != "cache"):
        named = [method for method in run.recipe.methods if method.name == image.method.split()[0]]
        mine = [method for method in named if image.layer in {stage.layer for stage in method.stages}]
        # Stages that a method adds for a model are not in its schedule, but follow one in the tower
        mine = mine or [method for method in named if method.stages[0].site in ("pixels", "vision")] or named
        (positions,) = {method.positions for method in mine}
        layers[positions == "compact"].add(image.layer)
    assert not layers[True] & layers[False], "stages of both kinds at one layer cannot be told apart"
    # Generation without a cache, and assisted decoding, run generated tokens together with the prompt
    assert all(mask[:, length:].all() for mask in (*last.keep.values(), *last.keep_cache.values()))
    keep, keep_cache = ({layer: mask[:, :length] for layer, mask in masks.items()} for masks in (last.keep, last.keep_cache))
    return Effect(keep, keep_cache, merged, frozenset(layers[True]), real.bool(), start)


class Entering:
    """Context manager that notes what enters the language model with each prompt [batch, sequence, dim]."""

    def __init__(self, model):
        self.model, self.prompts = model, []

    def __enter__(self):
        def hook(module, args, kwargs):
            if kwargs["inputs_embeds"].shape[1] > 1:
                self.prompts.append(kwargs["inputs_embeds"].clone())

        self.handle = self.model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
        return self

    def __exit__(self, *error):
        self.handle.remove()


def visible_cells(effects: Sequence[Effect], layer: int, rows: int, first: int, columns: int) -> torch.Tensor:
    """[rows, query, column]: what the queries from column `first` on may look at in `layer`."""
    visible = torch.ones(rows, columns - first, columns, dtype=torch.bool)
    for effect in effects:
        behind = min(max(effect.end - first, 0), columns - first)
        for queries, masks in ((visible, effect.keep), (visible[:, behind:], effect.keep_cache)):
            for stage, mask in masks.items():
                if stage <= layer:
                    mask = repeated(mask, rows)[:, : columns - effect.start]
                    queries[:, :, effect.start : effect.start + mask.shape[1]] &= mask[:, None]
    return visible


def repeated(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Transformers expands beams and returned sequences by repeat_interleave, and beams never leave their sample."""
    assert rows % x.shape[0] == 0, f"{rows} rows are not a multiple of the {x.shape[0]} in keep"
    return x.repeat_interleave(rows // x.shape[0], 0)


def closed_up(effects: Sequence[Effect], layer: int, rows: int, columns: int) -> torch.Tensor | None:
    """[rows, column]: by how many positions each token has moved up in `layer`; None if none has."""
    moved = torch.zeros(rows, columns, dtype=torch.long)
    for effect in effects:
        gone = effect.renumbered(layer)
        if gone is not None:
            gone = repeated(gone, rows)[:, : columns - effect.start].long()
            moved[:, effect.start :] += torch.nn.functional.pad(gone, (0, columns - effect.start - gone.shape[1])).cumsum(1)
    return moved if moved.any() else None


def altered(model, effects: Sequence[Effect], index: int, args: tuple, kwargs: dict, allowed: torch.Tensor):
    """The arguments of decoder layer `index` under the effects.

    `allowed` [rows or 1, 1, query, column] is what the stock model's queries, the last columns, may look at.
    """
    hidden = args[0]
    rows, queries = hidden.shape[:2]
    columns = allowed.shape[-1]
    first = columns - queries
    own = torch.arange(columns) == torch.arange(first, columns)[:, None]
    allowed = (allowed & visible_cells(effects, index, rows, first, columns)[:, None]) | own
    kwargs["attention_mask"] = as_mask(model, allowed, hidden.dtype)
    for effect in effects:
        if first <= effect.start < columns:
            for sample, places, features in effect.merged.get(index, []):
                copies = rows // len(next(iter(effect.keep.values())))
                hidden = hidden.clone()
                hidden[sample * copies : (sample + 1) * copies, effect.start - first + places] = features
    moved = closed_up(effects, index, rows, columns)
    if moved is not None:
        positions = kwargs["position_ids"] - moved[:, first:]
        kwargs["position_embeddings"] = model.model.language_model.rotary_emb(hidden, positions)
    return (hidden, *args[1:]), kwargs


class LiveMaskOracle:
    """Context manager: `model` computes under the claims, in prefill and in every later step, dropping nothing.

    Works for plain forwards and for every strategy of `generate` that uses a `DynamicCache` or no cache.
    """

    def __init__(self, model, claims: Claims):
        self.model, self.effects, self.handles = model, effects_of(claims), []

    def __enter__(self):
        stages = [stage for effect in self.effects for stage in (*effect.keep, *effect.keep_cache)]
        for index, layer in enumerate(decoder_layers(self.model)):
            if any(stage <= index for stage in stages):
                self.handles.append(layer.register_forward_pre_hook(self._masking(index), with_kwargs=True))
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _masking(self, index: int):
        def hook(module, args, kwargs):
            queries = args[0].shape[1]
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length(index)
            given = kwargs.get("attention_mask")
            if given is None:
                allowed = (torch.arange(past + queries) <= torch.arange(past, past + queries)[:, None])[None, None]
            else:
                assert given.shape[-2:] == (queries, past + queries), f"unexpected mask of shape {tuple(given.shape)}"
                if isinstance(given, BlockMask):
                    given = create_mask(given.mask_mod, given.shape[0], 1, *given.shape[-2:], "cpu")
                allowed = given if given.dtype == torch.bool else given == 0
            return altered(self.model, self.effects, index, args, kwargs, allowed)

        return hook


@torch.no_grad()
def masked_logits(model, inputs: dict, keep: Claims, extra_ids: torch.Tensor | None = None, **flags) -> torch.Tensor:
    """Logits [batch, sequence (+ extra), vocabulary] of a full forward without cache, columns outside `keep` hidden.

    `extra_ids` [batch, n] are teacher-forced behind the (left-padded) prompt.
    """
    return masked_forward(model, inputs, keep, extra_ids, **flags).logits


@torch.no_grad()
def masked_forward(model, inputs: dict, keep: Claims, extra_ids: torch.Tensor | None = None, **flags):
    """As :func:`masked_logits`, returning the whole output (`output_attentions=True` for eager models)."""
    return masked_output(model, inputs, keep, extra_ids, **flags)


def masked_output(model, inputs: dict, keep: Claims, extra_ids: torch.Tensor | None = None, **flags):
    """As :func:`masked_forward`, with gradients where they are enabled."""
    ids = inputs["input_ids"]
    padding = inputs.get("attention_mask", torch.ones_like(ids))
    positions = prompt_positions(model, inputs)
    if extra_ids is not None and extra_ids.shape[1]:
        assert padding[:, -1].all(), "generated tokens follow a left-padded prompt"
        steps = torch.arange(1, extra_ids.shape[1] + 1)
        ids = torch.cat([ids, extra_ids], 1)
        padding = torch.cat([padding, torch.ones_like(extra_ids)], 1)
        positions = torch.cat([positions, positions[..., -1:] + steps], -1)
    feed = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in feed:
        kinds = torch.zeros_like(ids)
        kinds[:, : feed["mm_token_type_ids"].shape[1]] = feed["mm_token_type_ids"]
        feed["mm_token_type_ids"] = kinds

    length, effects = ids.shape[1], effects_of(keep)
    causal = torch.arange(length) <= torch.arange(length)[:, None]
    allowed = causal & padding.bool()[:, None, None]

    def masking(index):
        return lambda module, args, kwargs: altered(model, effects, index, args, kwargs, allowed)

    return _forward_with_hooks(
        model, masking, input_ids=ids, attention_mask=padding, position_ids=positions, use_cache=False, **feed, **flags
    )


def _forward_with_hooks(model, make_hook, **inputs):
    handles = [
        layer.register_forward_pre_hook(make_hook(index), with_kwargs=True) for index, layer in enumerate(decoder_layers(model))
    ]
    deltas = getattr(model.model, "rope_deltas", None)
    try:
        return model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        if deltas is not None:
            model.model.rope_deltas = deltas


def as_mask(model, allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | BlockMask:
    """`allowed` [rows or 1, 1, query, column] in the form that the model's attention takes."""
    implementation = model.config._attn_implementation
    if implementation == "sdpa":
        return allowed
    if implementation == FLEX:
        rows, _, queries, columns = allowed.shape
        return create_block_mask(
            lambda row, head, query, column: allowed[row % rows, 0, query, column], rows, None, queries, columns, "cpu"
        )
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
