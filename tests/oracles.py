"""What a pruned model must compute, obtained without dropping anything.

A token that layers ``>= L`` no longer see is, exactly, a token whose column those layers mask.  The oracles run the
stock model at full length and hide columns through pre-hooks on its decoder layers; they share no code with vlmprune.
In addition: naive dropping (one unpadded sample), the FastV and CLS scores from Transformers' own eager attentions, and
a loop-by-loop transcription of DivPrune.

``keep`` is, as in ``run.last.keep``, a dict: stage layer -> bool tensor [batch, sequence]; True means that layers from
that stage on still see the position.  A sequence longer than the tensor is True from there on (generated tokens).
"""

from __future__ import annotations

import torch

Keep = dict[int, torch.Tensor]
TOLERANCE = 5e-5
"""Absolute, for float32 logits of standard deviation 1; rounding alone reaches 2e-5."""


# --- masks -----------------------------------------------------------------------------------------------------------
def visible_columns(keep: Keep, layer: int, rows: int, columns: int) -> torch.Tensor:
    """Columns [rows, columns] that ``layer`` may look at: kept by every stage up to it."""
    visible = torch.ones(rows, columns, dtype=torch.bool)
    for stage, mask in keep.items():
        if stage <= layer:
            # Transformers expands beams and returned sequences by repeat_interleave, and beams never leave their sample
            assert rows % mask.shape[0] == 0, f"{rows} rows are not a multiple of the {mask.shape[0]} in keep"
            mask = mask.repeat_interleave(rows // mask.shape[0], 0)[:, :columns]
            visible[:, : mask.shape[1]] &= mask
    return visible


class LiveMaskOracle:
    """Context manager: ``model`` masks (never drops) the columns outside ``keep``, in prefill and in every later step.

    Works for plain forwards and for every strategy of ``generate`` that uses a ``DynamicCache`` or no cache.
    """

    def __init__(self, model, keep: Keep):
        self.model, self.keep, self.handles = model, keep, []

    def __enter__(self):
        for index, layer in enumerate(decoder_layers(self.model)):
            if any(stage <= index for stage in self.keep):
                self.handles.append(layer.register_forward_pre_hook(self._masking(index), with_kwargs=True))
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _masking(self, index: int):
        def hook(module, args, kwargs):
            hidden = args[0]
            rows, queries = hidden.shape[:2]
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length(index)
            given = kwargs.get("attention_mask")
            own = torch.arange(past + queries) == torch.arange(past, past + queries)[:, None]
            if given is None:
                allowed = (torch.arange(past + queries) <= torch.arange(past, past + queries)[:, None])[None, None]
            else:
                assert given.shape[-2:] == (queries, past + queries), f"unexpected mask of shape {tuple(given.shape)}"
                allowed = given if given.dtype == torch.bool else given == 0
            visible = visible_columns(self.keep, index, rows, past + queries)
            allowed = (allowed & visible[:, None, None, :]) | own
            kwargs["attention_mask"] = allowed if uses_sdpa(self.model) else as_float_mask(allowed, hidden.dtype)
            return args, kwargs

        return hook


@torch.no_grad()
def masked_logits(model, inputs: dict, keep: Keep, extra_ids: torch.Tensor | None = None, **flags) -> torch.Tensor:
    """Logits [batch, sequence (+ extra), vocabulary] of a full forward without cache, columns outside ``keep`` hidden.

    ``extra_ids`` [batch, n] are teacher-forced behind the (left-padded) prompt.
    """
    return masked_forward(model, inputs, keep, extra_ids, **flags).logits


@torch.no_grad()
def masked_forward(model, inputs: dict, keep: Keep, extra_ids: torch.Tensor | None = None, **flags):
    """As :func:`masked_logits`, returning the whole output (``output_attentions=True`` for eager models)."""
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

    length = ids.shape[1]
    causal = torch.arange(length) <= torch.arange(length)[:, None]
    own = torch.eye(length, dtype=torch.bool)

    def masking(index):
        def hook(module, args, kwargs):
            visible = visible_columns(keep, index, *ids.shape) & padding.bool()
            allowed = (causal & visible[:, None, None, :]) | own
            kwargs["attention_mask"] = allowed if uses_sdpa(model) else as_float_mask(allowed, args[0].dtype)
            return args, kwargs

        return hook

    return _forward_with_hooks(
        model, masking, input_ids=ids, attention_mask=padding, position_ids=positions, use_cache=False, **feed, **flags
    )


@torch.no_grad()
def naively_dropped_logits(model, inputs: dict, keep: Keep) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one unpadded sample whose hidden rows really are cut at each stage, and the columns that remain."""
    ids = inputs["input_ids"]
    assert ids.shape[0] == 1
    alive = torch.arange(ids.shape[1])
    columns = alive

    def dropping(index):
        def hook(module, args, kwargs):
            nonlocal alive
            hidden = args[0]
            if index in keep:
                wanted = keep[index][0, alive]
                hidden, alive = hidden[:, wanted], alive[wanted]
            if any(stage <= index for stage in keep):
                cos, sin = kwargs["position_embeddings"]
                kwargs["position_embeddings"] = (cos[:, alive], sin[:, alive])
                allowed = torch.ones(len(alive), len(alive), dtype=torch.bool).tril()[None, None]
                kwargs["attention_mask"] = allowed if uses_sdpa(model) else as_float_mask(allowed, hidden.dtype)
            return (hidden, *args[1:]), kwargs

        return hook

    positions = prompt_positions(model, inputs)
    logits = _forward_with_hooks(model, dropping, **inputs, position_ids=positions, use_cache=False).logits
    return logits, columns[alive]


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


def uses_sdpa(model) -> bool:
    return model.config._attn_implementation == "sdpa"


def as_float_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
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


def assert_equals_masked(model, inputs: dict, keep: Keep, generated: torch.Tensor, logits: torch.Tensor) -> None:
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
    """``last.keep`` rebuilt from ``last.kept`` (indices per image) and the prompt alone."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    keep = {}
    for layer in last.keep:
        mask = real & ~image_columns(model, ids)
        for image in (image for image in last.kept if image.layer == layer):
            mask[image.sample, columns_of_image(model, inputs, image.sample, image.ordinal)[image.index]] = True
        keep[layer] = mask
    return keep


def columns_of_image(model, inputs: dict, row: int, ordinal: int) -> torch.Tensor:
    """Columns of the n-th image of a row."""
    columns = image_columns(model, inputs["input_ids"])[row].nonzero()[:, 0]
    if "image_grid_thw" in inputs:
        per_image = (inputs["image_grid_thw"].prod(1) // model.config.vision_config.spatial_merge_size**2).tolist()
    elif "image_sizes" in inputs:
        per_image = [len(features) for features in projected_features(model, inputs)]
    else:
        return columns.split(model.config.image_seq_length)[ordinal]
    before, taken = int(image_columns(model, inputs["input_ids"])[:row].sum()), 0
    while taken < before:
        taken += per_image.pop(0)
    start = sum(per_image[:ordinal])
    return columns[start : start + per_image[ordinal]]


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
