"""What a pruned model must compute, obtained without dropping anything.

A token that layers ``>= L`` no longer see is, exactly, a token whose column those layers mask.  The oracles run the
stock model at full length and hide columns through pre-hooks on its decoder layers; they share no code with vlmprune.
In addition: naive dropping (one unpadded sample), the FastV and CLS scores from Transformers' own eager attentions, and
a loop-by-loop transcription of DivPrune.

``keep`` is, as in ``run.last.keep``, a dict: stage layer -> bool tensor [batch, sequence]; True means that layers from
that stage on still see the position.  A sequence longer than the tensor is True from there on (generated tokens).

Methods that do more than drop are told by an :class:`Effect`: what they merged into the kept tokens, which stages
renumber positions, what decoding no longer sees.  Every oracle takes a ``keep``, an effect, or the effects of several
turns of a conversation.  What the vision tower merged or dropped is taken from the pruned run itself: the oracle starts
from the survivors' rows as they entered the language model, and says nothing about how the tower made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tiny_models import FLEX
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

Keep = dict[int, torch.Tensor]
TOLERANCE = 5e-5
"""Absolute, for float32 logits of standard deviation 1; rounding alone reaches 2e-5."""


# --- what a run did --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Effect:
    """All that a pruned run may do to the tokens of one prompt.

    ``keep_cache`` is what rows behind the prompt see in addition to ``keep``; ``merged`` holds, per stage's layer,
    (row, columns, hidden states) that take these places before the layer runs; the stages in ``compact`` move
    everything behind a token they drop one position up; ``real`` [batch, sequence] is False on padding; ``start`` is
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
        """Tokens [batch, sequence] whose place was closed up before ``layer``."""
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
    """The effect of a run's last prefill: of ``inputs``, at column ``start``, whose rows it may have repeated (beams).

    ``entered`` [batch, sequence, dim] is what entered the language model (:class:`Entering`), for methods that work
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
    if any(image.site == "vision" for image in last.kept):
        places = image_columns(model, ids)
        tower = [(row, columns.nonzero()[:, 0], entered[row, columns].nan_to_num()) for row, columns in enumerate(places)]
        merged[0] = [entry for entry in tower if len(entry[1])] + merged.get(0, [])
    layers = {True: set(), False: set()}  # by whether positions are renumbered
    for image in (image for image in last.kept if image.site != "cache"):
        named = [method for method in run.recipe.methods if method.name == image.method.split()[0]]
        mine = [method for method in named if image.layer in {stage.layer for stage in method.stages}]
        # Stages that a method adds for a model are not in its schedule, but follow one in the tower
        mine = mine or [method for method in named if method.stages[0].site == "vision"] or named
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


# --- masks -----------------------------------------------------------------------------------------------------------
def visible_cells(effects: Sequence[Effect], layer: int, rows: int, first: int, columns: int) -> torch.Tensor:
    """[rows, query, column]: what the queries from column ``first`` on may look at in ``layer``."""
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
    """[rows, column]: by how many positions each token has moved up in ``layer``; None if none has."""
    moved = torch.zeros(rows, columns, dtype=torch.long)
    for effect in effects:
        gone = effect.renumbered(layer)
        if gone is not None:
            gone = repeated(gone, rows)[:, : columns - effect.start].long()
            moved[:, effect.start :] += torch.nn.functional.pad(gone, (0, columns - effect.start - gone.shape[1])).cumsum(1)
    return moved if moved.any() else None


def altered(model, effects: Sequence[Effect], index: int, args: tuple, kwargs: dict, allowed: torch.Tensor):
    """The arguments of decoder layer ``index`` under the effects.

    ``allowed`` [rows or 1, 1, query, column] is what the stock model's queries, the last columns, may look at.
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
    """Context manager: ``model`` computes under the claims, in prefill and in every later step, dropping nothing.

    Works for plain forwards and for every strategy of ``generate`` that uses a ``DynamicCache`` or no cache.
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
    """Logits [batch, sequence (+ extra), vocabulary] of a full forward without cache, columns outside ``keep`` hidden.

    ``extra_ids`` [batch, n] are teacher-forced behind the (left-padded) prompt.
    """
    return masked_forward(model, inputs, keep, extra_ids, **flags).logits


@torch.no_grad()
def masked_forward(model, inputs: dict, keep: Claims, extra_ids: torch.Tensor | None = None, **flags):
    """As :func:`masked_logits`, returning the whole output (``output_attentions=True`` for eager models)."""
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


@torch.no_grad()
def naively_dropped_logits(
    model, inputs: dict, keep: Keep | Effect, extra_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one unpadded sample whose hidden rows really are cut at each stage, and the columns that remain.

    ``extra_ids`` [1, n] are teacher-forced behind the prompt.  Stages renumber positions all or not at all.
    """
    ids = inputs["input_ids"]
    assert ids.shape[0] == 1
    (effect,) = effects_of(keep)
    assert not effect.keep_cache, "what decoding forgets cannot be dropped before"
    assert effect.compact in (frozenset(), frozenset(effect.keep)), "stages of both kinds"
    if extra_ids is not None:
        prompt = ids.shape[1]
        inputs = {"input_ids": torch.cat([ids, extra_ids], 1)} | {
            name: torch.nn.functional.pad(value, (0, extra_ids.shape[1]), value=int(name == "attention_mask"))
            if value.shape == (1, prompt)
            else value
            for name, value in inputs.items()
            if name != "input_ids"
        }
    extra = inputs["input_ids"].shape[1] - ids.shape[1]
    alive = torch.arange(inputs["input_ids"].shape[1])

    def dropping(index):
        def hook(module, args, kwargs):
            nonlocal alive
            hidden = args[0]
            for _, places, features in effect.merged.get(index, []):
                hidden = hidden.clone()
                hidden[0, (alive == places[:, None]).nonzero()[:, 1]] = features[(alive == places[:, None]).any(1)]
            if index in effect.keep:
                wanted = torch.nn.functional.pad(effect.keep[index][0], (0, extra), value=True)[alive]
                hidden, alive = hidden[:, wanted], alive[wanted]
            if any(stage <= index for stage in effect.keep):
                if effect.compact:
                    numbers = torch.arange(len(alive))[None]
                    kwargs["position_embeddings"] = model.model.language_model.rotary_emb(hidden, numbers)
                else:
                    cos, sin = kwargs["position_embeddings"]
                    kwargs["position_embeddings"] = (cos[:, alive], sin[:, alive])
                allowed = torch.ones(len(alive), len(alive), dtype=torch.bool).tril()[None, None]
                kwargs["attention_mask"] = as_mask(model, allowed, hidden.dtype)
            return (hidden, *args[1:]), kwargs

        return hook

    positions = prompt_positions(model, inputs)
    logits = _forward_with_hooks(model, dropping, **inputs, position_ids=positions, use_cache=False).logits
    return logits, alive


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


# --- the model's own conventions -------------------------------------------------------------------------------------
def decoder_layers(model) -> torch.nn.ModuleList:
    return model.model.language_model.layers


def as_mask(model, allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | BlockMask:
    """``allowed`` [rows or 1, 1, query, column] in the form that the model's attention takes."""
    implementation = model.config._attn_implementation
    if implementation == "sdpa":
        return allowed
    if implementation == FLEX:
        rows, _, queries, columns = allowed.shape
        return create_block_mask(
            lambda row, head, query, column: allowed[row % rows, 0, query, column], rows, None, queries, columns, "cpu"
        )
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def prompt_positions(model, inputs: dict) -> torch.Tensor:
    """The position ids that ``generate`` would start with: [batch, sequence], or [4, batch, sequence] with M-RoPE."""
    ids = inputs["input_ids"]
    known = {name: value for name, value in inputs.items() if name not in ("input_ids", "pixel_values")}
    known.setdefault("attention_mask", torch.ones_like(ids))
    deltas = getattr(model.model, "rope_deltas", None)
    positions = model._prepare_position_ids_for_generation(ids, known)
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = deltas
    return positions


def image_columns(model, ids: torch.Tensor) -> torch.Tensor:
    return ids == model.config.image_token_id


def separators(model, inputs: dict) -> list[torch.Tensor]:
    """Per LLaVA-NeXT picture of the batch, [tokens] bool: the row separators among its tokens.

    The stock packing, told to pack ones with zeros between the rows.
    """
    vision, packed = model.config.vision_config, []
    for size in inputs["image_sizes"].tolist():
        crops = image_size_to_num_patches(size, model.config.image_grid_pinpoints, vision.image_size)
        ones = torch.ones(crops, (vision.image_size // vision.patch_size) ** 2, 1)
        (values,), _ = model.model.pack_image_features([ones], torch.tensor([size]), "default", torch.zeros(1))
        packed.append(values[:, 0] == 0)
    return packed


def random_keep(model, inputs: dict, fractions: dict[int, float], seed: int = 0) -> Keep:
    """A keep dict that drops visual tokens at random (nested stages), padding too, text never."""
    random = torch.Generator().manual_seed(seed)
    ids = inputs["input_ids"]
    luck = torch.rand(ids.shape, generator=random)
    visual, real = image_columns(model, ids), inputs["attention_mask"].bool()
    return {layer: real & (~visual | (luck < fraction)) for layer, fraction in fractions.items()}


# --- scores and selections -------------------------------------------------------------------------------------------
@torch.no_grad()
def fastv_scores(eager_model, inputs: dict, layer: int, keep: Keep | None = None) -> torch.Tensor:
    """Attention [batch, sequence] from the last prompt token in decoder layer ``layer - 1``, mean over heads."""
    attentions = masked_forward(eager_model, inputs, keep or {}, output_attentions=True).attentions
    return attentions[layer - 1].mean(1)[:, -1]


@torch.no_grad()
def cls_scores(eager_model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Attention [image, patch] from the class token in the tower layer whose output LLaVA uses, mean over heads."""
    output = eager_model.model.vision_tower(pixel_values, output_attentions=True)
    used = eager_model.config.vision_feature_layer  # -2: hidden_states[-2] is the output of the last layer but one
    assert used < 0
    return output.attentions[used + 1 - 1][:, :, 0, 1:].mean(1)


def divprune(features: torch.Tensor, keep: int) -> list[int]:
    """DivPrune (arXiv:2503.02175, algorithm 1) for the features [n, dim] of one image, in the order of selection.

    First the token whose nearest other token is farthest away, then repeatedly the token farthest from the chosen set.
    """
    n = len(features)
    unit = [row / row.norm() for row in features.double()]
    distance = [[1 - float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)]
    chosen: list[int] = []
    while len(chosen) < keep:
        best, best_distance = -1, -float("inf")
        for j in range(n):
            if j in chosen:
                continue
            others = chosen or [i for i in range(n) if i != j]
            nearest = min((distance[i][j] for i in others), default=0.0)
            if nearest > best_distance:
                best, best_distance = j, nearest
        chosen.append(best)
    return chosen


@torch.no_grad()
def projected_features(model, inputs: dict) -> list[torch.Tensor]:
    """Per image of the batch, in order, the features [visual, dim] that enter the language model."""
    wanted = {"pixel_values", "image_grid_thw", "image_sizes"} & inputs.keys()
    output = model.model.get_image_features(**{name: inputs[name] for name in wanted}, return_dict=True)
    return list(output.pooler_output)


# --- runs of a pruned model ------------------------------------------------------------------------------------------
@torch.no_grad()
def generate_logits(model, inputs: dict, new_tokens: int = 6, **strategy):
    """``generate`` with its raw logits; returns (output, generated ids [batch, n], logits [batch, n, vocabulary])."""
    output = model.generate(**inputs, max_new_tokens=new_tokens, return_dict_in_generate=True, output_logits=True, **strategy)
    return output, output.sequences[:, -new_tokens:], torch.stack(output.logits, 1)


def rows_with_pictures(model, inputs: dict) -> torch.Tensor:
    return image_columns(model, inputs["input_ids"]).any(1)


def assert_equals_masked(model, inputs: dict, keep: Claims, generated: torch.Tensor, logits: torch.Tensor) -> None:
    """Every step's ``logits`` equal the masked oracle's, and the un-pruned model's do not."""
    prompt = inputs["input_ids"].shape[1]
    expected = masked_logits(model, inputs, keep, generated[:, :-1])[:, prompt - 1 :]
    unpruned = masked_logits(model, inputs, {}, generated[:, :-1])[:, prompt - 1 :]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    for row in rows_with_pictures(model, inputs).nonzero()[:, 0]:
        assert (logits[row] - unpruned[row]).abs().max() > 0.1, f"pruning changed nothing in row {row}"


def expected_counts(lengths: list[list[int]], budget: float | int) -> list[list[int]]:
    """Tokens kept of each image: a whole number, or a fraction of the image's tokens rounded half up."""
    if isinstance(budget, int):
        return [[min(budget, n) for n in row] for row in lengths]
    return [[int(budget * n + 0.5) for n in row] for row in lengths]


def keep_from_record(model, inputs: dict, last) -> Keep:
    """``last.keep`` rebuilt from ``last.kept`` (indices per image) and the prompt alone.

    LLaVA-NeXT's row separators are text, which nothing but ``newlines_kept = False`` drops.
    """
    real = inputs["attention_mask"].bool()
    keep = {}
    for layer in last.keep:
        keep[layer] = real.clone()
        for image in (image for image in last.kept if image.layer == layer and image.site != "cache"):
            whole = columns_of_image(model, inputs, image.sample, image.ordinal)
            visual = visual_columns(model, inputs, image.sample, image.ordinal)
            stays = torch.zeros_like(real[0])
            stays[visual[image.index]] = True
            if last.newlines_kept:
                stays[whole[~torch.isin(whole, visual)]] = True
            keep[layer][image.sample, whole] &= stays[whole]
    return keep


def columns_of_image(model, inputs: dict, row: int, ordinal: int) -> torch.Tensor:
    """Columns of the n-th image of a row, LLaVA-NeXT's row separators among them."""
    number, lengths = _place_of_image(model, inputs, row, ordinal)
    columns = image_columns(model, inputs["input_ids"])[row].nonzero()[:, 0]
    start = sum(lengths[number - ordinal : number])
    return columns[start : start + lengths[number]]


def visual_columns(model, inputs: dict, row: int, ordinal: int) -> torch.Tensor:
    """The same without row separators: the tokens that a budget counts."""
    columns = columns_of_image(model, inputs, row, ordinal)
    if "image_sizes" not in inputs:
        return columns
    return columns[~separators(model, inputs)[_place_of_image(model, inputs, row, ordinal)[0]]]


def _place_of_image(model, inputs: dict, row: int, ordinal: int) -> tuple[int, list[int]]:
    """An image's number in the batch, and the tokens of every image of the batch."""
    image = image_columns(model, inputs["input_ids"])
    if "image_grid_thw" in inputs:
        lengths = (inputs["image_grid_thw"].prod(1) // model.config.vision_config.spatial_merge_size**2).tolist()
    elif "image_sizes" in inputs:
        lengths = [len(packed) for packed in separators(model, inputs)]
    else:
        lengths = [model.config.image_seq_length] * (int(image.sum()) // model.config.image_seq_length)
    before, number = int(image[:row].sum()), 0
    while before > 0:
        before -= lengths[number]
        number += 1
    return number + ordinal, lengths


def kept_sets(last) -> dict[tuple[int, int, int], list[int]]:
    """(layer, row, ordinal) -> kept in-image indices."""
    return {(image.layer, image.sample, image.ordinal): image.index.tolist() for image in last.kept}


def physical_lengths(cache) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


def scheduled_lengths(keep: Keep, real: torch.Tensor, layers: int) -> list[int]:
    """Entries that each layer's cache must hold after prefill: the longest row of what the layer still computes."""
    lengths = []
    for layer in range(layers):
        passed = [stage for stage in keep if stage <= layer]
        lengths.append(int(keep[max(passed)].sum(1).max()) if passed else real.shape[1])
    return lengths


def resident_lengths(effect: Effect, layers: int) -> list[int]:
    """Entries that each layer's cache must hold when prefill is over: the longest row of what is still visible there.

    While nothing is dropped the sequence stays as it is, padding too.
    """
    lengths = []
    for layer in range(layers):
        left = effect.real.clone()
        for stage, mask in (*effect.keep.items(), *effect.keep_cache.items()):
            if stage <= layer:
                left &= mask
        lengths.append(left.shape[1] if torch.equal(left, effect.real) else int(left.sum(1).max()))
    return lengths


def decisions(last) -> dict[tuple[str, int, int, int], list[int]]:
    """(site, layer, row, ordinal) -> kept in-image indices."""
    return {(image.site, image.layer, image.sample, image.ordinal): image.index.tolist() for image in last.kept}
