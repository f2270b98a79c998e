"""How a prompt begins and ends: its images are found, its first section and its record begin, and the record is completed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from vlmprune.device import on_host
from vlmprune.errors import UsageError
from vlmprune.live.cache import PRUNING, check_growing, conversation_layer, hand_over
from vlmprune.live.cache_layer import Pruned
from vlmprune.live.call import Call, Prompt, StageResult
from vlmprune.live.injected import take_over
from vlmprune.live.merged import as_placeholders, find_merged
from vlmprune.live.owner import Encoded, Owner, encoded_of, features_of
from vlmprune.live.prompt import (
    begin_prompt,
    check_mask_goes_on,
    read_mask,
    read_prompt,
    refuse_later_tokens,
    refuse_merged,
    visible_images,
)
from vlmprune.live.pruning import timed
from vlmprune.live.quantised import QUANTISED
from vlmprune.live.record import Clock, Prefill
from vlmprune.live.section import window_in_slots
from vlmprune.live.static_cache import check_room, first_static, places_of
from vlmprune.live.static_step import check_implementation
from vlmprune.live.tower import look_up_tower
from vlmprune.live.videos import check_budgets, sizes_of, video_placeholder, videos_of, with_frames
from vlmprune.schedule import Budget
from vlmprune.view import EMBEDDINGS

if TYPE_CHECKING:
    from vlmprune.live.plan import Plan

ROWS_WANTED = "logits_to_keep"
"""An argument by which some language models leave out rows in their last layers. Which rows these are they count from the end
of the prompt, and sections count by places: all rows are computed there."""
IGNORED = -100
"""The label that a loss leaves out, as everywhere in transformers."""


@dataclass(eq=False)
class Uncached:
    """A prompt that is run again for every token, with the same encoded images: whose it is, its caller's settings, what
    was chosen, and what redistribution marked. It lives as long as the images."""

    ids: Tensor
    owner: Owner
    enabled: bool
    budget: Budget | None
    chosen: dict[int, StageResult] = field(default_factory=dict)
    marks: dict[int, Any] = field(default_factory=dict)

    def goes_on(self, ids: Tensor) -> bool:
        """Whether `ids` continue the prompt."""
        length = self.ids.shape[1]
        return ids.shape[0] == self.ids.shape[0] and ids.shape[1] > length and torch.equal(ids[:, :length], self.ids)


# -- before the language model -----------------------------------------------------------------------------------------------


def begin(call: Call, kwargs: dict[str, Any]) -> None:
    """A call, whose owner and plan are known, enters the base model with `kwargs`."""
    plan: Plan = call.plan
    settings = plan.contexts.settings
    call.enabled, call.budget, call.blocks = settings.enabled, settings.budget, settings.blocks
    read_mask(call, kwargs)
    if call.past:
        ids = identity_of(kwargs)
        check_mask_goes_on(call, kwargs.get("past_key_values"), None if ids is None else len(ids))
        _check_turn(kwargs)
    else:
        _begin_conversation(plan, call, call.owner, kwargs)
    if not call.enabled:
        return
    try:
        _find_images(plan, call, kwargs)
    except UsageError:  # what cannot be followed is refused only where it matters: the plain model takes it
        if plan.may_change(_sizes(plan, call.images), call.budget):
            raise
        read_mask(call, kwargs)


def _check_turn(kwargs: dict[str, Any]) -> None:
    """Refuse a later turn for which a static cache has no place."""
    cache, tokens = kwargs.get("past_key_values"), identity_of(kwargs)
    if tokens is not None and cache is not None and first_static(cache) is not None:
        check_room(cache.layers, tokens.shape[1])


def _begin_conversation(plan: Plan, call: Call, owner: Owner, kwargs: dict[str, Any]) -> None:
    cache, ids = kwargs.get("past_key_values"), identity_of(kwargs)
    hand_over(cache, owner)
    if ids is not None and ids.shape[1] > 1:  # guidance runs the last token alone, beside the prompt that counts
        plan.contexts.note(None, call.blocks)  # a prompt that is refused, or switched off, has no record
    features = next(iter(features_of(kwargs)), None)
    if cache is not None or features is None or ids is None:
        return
    if (made := encoded_of(features)) is None:  # encoded before the model was wrapped, or put together by the caller
        made = features.vlmprune = Encoded(None, used=True)
    if call.again is None:  # else it was found with its owner
        call.again = Uncached(ids, owner, call.enabled, call.budget)
        made.prompts.append(call.again)
    call.enabled, call.budget = call.again.enabled, call.again.budget


def _find_images(plan: Plan, call: Call, kwargs: dict[str, Any]) -> None:
    encoded, family = kwargs.get("mm_encoder_outputs") or {}, plan.family
    pictures = _encoded_counts(plan, encoded.get("image")) or family.tokens_per_image(kwargs, plan.config)
    videos = videos_of(family, encoded.get("video"), kwargs, plan.config)
    brings = pictures is not None or videos is not None
    merged = find_merged(plan.contexts.settings.image_positions, kwargs, call.past, brings)
    pictures = pictures if merged is None or not merged.counts else merged.counts
    plan.links.check(whole=pictures is not None or videos is not None)
    if pictures is None and videos is None:
        _refuse_paged(plan, kwargs)
        refuse_merged(kwargs, plan.language_model)
        return  # a prompt without an image, a later step, or a turn without a new image
    call.images = [*(pictures or ()), *(videos or ())]
    if (ids := identity_of(kwargs)) is None:
        return  # the model itself refuses this
    cache, edits = kwargs.get("past_key_values"), plan.redistribution.names
    if edits or plan.pruning.may_drop(_sizes(plan, call.images), call.budget):
        check_cache(cache, ids.shape[1], "attention redistribution" if edits else PRUNING, plan.language_model.config)
    shortens = plan.pruning.cache_stage
    if shortens is not None and (call.tail or (cache is None and kwargs.get("mm_encoder_outputs") is not None)):
        raise UsageError(
            f"{shortens.method.name} removes tokens from the KV cache after prefill, which needs use_cache=True and no "
            "assisted decoding; or turn that stage off (cache_layer=-1)."
        )
    if shortens is not None and any(isinstance(layer, QUANTISED) for layer in getattr(cache, "layers", ())):
        raise UsageError(
            f"{shortens.method.name} removes tokens from the KV cache after prefill, and transformers takes no tokens out of a "
            "quantised cache: leave cache_implementation out, or turn that stage off (cache_layer=-1)."
        )
    _refuse_unencoded(plan, call, cache)
    known = call.again
    if known is not None:
        call.tail += ids.shape[1] - known.ids.shape[1]
        call.uncached, call.resumed = known.marks, bool(known.marks)
    image_token, video_token = family.image_token(plan.config), video_placeholder(family, plan.config, pictures, videos)
    placed = None if merged is None else as_placeholders(merged, ids.device)
    joins = family.joins if merged is None else None
    tokens = read_prompt(call, kwargs, image_token, plan.language_model, plan.needs, edits, video_token, placed)
    prompt = begin_prompt(call, tokens, pictures or (), ids.device, joins, videos or ())
    if videos:
        prompt.layout = with_frames(prompt.layout, family, kwargs, plan.config)
    check_budgets(plan.pruning.stages, prompt.layout, merged is not None)
    call.prompt = prompt
    if known is not None:
        call.prompt.chosen, call.prompt.replayed = known.chosen, bool(known.chosen)


def _refuse_paged(plan: Plan, kwargs: Mapping[str, Any]) -> None:
    """Refuse prompts of transformers' continuous batching that have places for pictures: it hands the model ids and its own
    cache, and no pictures. The steps that follow such a prompt have none of these ids.

    Raises:
        UsageError: the ids hold an image token.
    """
    ids = kwargs.get("input_ids")
    if kwargs.get("cache") is None or ids is None:
        return
    if not on_host(torch.isin(ids, ids.new_tensor(plan.family.placeholders(plan.config))).any()):
        return
    raise UsageError(
        f'continuous batching (generate_batch, cache_implementation="paged") hands {type(plan.model).__name__} token ids only, '
        "and no pictures, so that neither the model nor a recipe would see them: call model.generate for prompts with pictures."
    )


def check_cache(cache: Any, tokens: int, what: str, config: Any) -> None:
    """Refuse a cache that cannot follow what a prompt of so many tokens needs, before anything runs.

    Raises:
        UsageError: its kind, its length, or the attention implementation it is used with.
    """
    check_growing(cache, what)
    if first_static(cache) is not None:
        check_implementation(config._attn_implementation, what)
        check_room(cache.layers, tokens)


def _refuse_unencoded(plan: Plan, call: Call, cache: Any) -> None:
    """`generate` encodes images once, beforehand, unless a release of transformers does not do so for a model: then nothing
    shows which of its calls belong to one prompt.

    Raises:
        UsageError: there will be several such calls, or copies of samples in one.
    """
    if (how := call.generation) is None:
        return
    if cache is None:
        setting, why = (
            "use_cache=False",
            f"encodes them again for every token, so that {plan.recipe} would choose anew each time",
        )
    elif (copies := how.num_beams or 1) > 1 or (how.num_return_sequences or 1) > 1:
        setting = f"num_beams={copies}" if copies > 1 else f"num_return_sequences={how.num_return_sequences}"
        why = "mixes the pictures of the copies that it makes of a sample"
    else:
        return
    raise UsageError(
        f"transformers {transformers.__version__} does not encode the pictures of {type(plan.model).__name__} before "
        f"generation, and with {setting} it {why}: leave {setting} out, or update transformers."
    )


def identity_of(kwargs: Mapping[str, Any]) -> Tensor | None:
    """`[batch, token]` by which prompts are compared: ids, or the first numbers of embeddings."""
    ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    return embeddings[..., 0] if ids is None and embeddings is not None else ids


def _sizes(plan: Plan, counts: Sequence[int] | None) -> Sequence[int] | None:
    """Visual tokens of each image; None where these are of crops, so that an image may have any number of them."""
    return counts if plan.family.joins is None else None


def _encoded_counts(plan: Plan, encoded: Any) -> list[int] | None:
    """Visual tokens of each picture, or of each of its crops, where `generate` has encoded them already."""
    if encoded is None:
        return None
    return plan.family.entries(sizes_of(encoded), plan.config)


# -- at the language model ---------------------------------------------------------------------------------------------------


def enter_prompt(plan: Plan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call enters the language model: the first section begins, and the record of a prompt."""
    prompt, embeddings = call.prompt, kwargs.get("inputs_embeds")
    call.positions = kwargs.get("position_ids")
    call.given_masks = _finished(kwargs.get("attention_mask"))
    if prompt is None:
        if not call.past and embeddings is not None:
            _without_image(plan, call, embeddings)
        call.idle = plan.pruning.decodes_without_padding(call, kwargs)
        return (args, {**kwargs, "attention_mask": None}) if call.idle else None
    assert embeddings is not None
    if plan.edited:
        refuse_later_tokens(call, kwargs, plan.kinds, plan.redistribution.names, plan.edited)
    if plan.family.newline is not None:
        _separate_newlines(prompt, embeddings, getattr(plan.base, plan.family.newline))
    remaining = visible_images(prompt)
    prompt.candidates = [len(index) for index in remaining]
    prompt.entered = list(prompt.candidates)
    call.begin_sections(remaining, prompt.layout.real, prompt.layout.counts)
    call.record = _begin_record(plan, call, embeddings)
    if plan.needs & EMBEDDINGS:
        prompt.embeddings = embeddings
    if plan.tower.wanted or plan.edited:
        with timed(call, embeddings.device, "what the tower saw"):
            if plan.tower.wanted and (plan.redistribution.needs or plan.pruning.may_drop(prompt.candidates, call.budget)):
                look_up_tower(call, plan.tower.memory, embeddings)
            plan.redistribution.enter_text(call, embeddings)
    # With padding, the model would make a mask of the whole prompt, [batch, 1, n, n], which no layer would see. Without
    # cache and mask, however, it would take positions with padding for packed sequences, and make a mask for these.
    cached = kwargs.get("past_key_values") is not None or kwargs.get("use_cache", plan.language_model.config.use_cache)
    window = plan.kinds.window
    if window is not None and plan.pruning.may_drop(prompt.candidates, call.budget):  # refused before a layer runs
        window_in_slots(window, call.past + call.sequence, plan.language_model.config._attn_implementation)
    unseen = (cached or kwargs.get("position_ids") is None) and plan.pruning.shortens_at_once(call) and not call.custom
    if unseen and not call.given_masks and plan.kinds.causal:
        kwargs = {**kwargs, "attention_mask": None}
    if kwargs.get(ROWS_WANTED) and plan.pruning.may_drop(prompt.candidates, call.budget):
        kwargs = {**kwargs, ROWS_WANTED: 0}
    if plan.family.injected is not None and plan.pruning.at:
        kwargs, prompt.injections = take_over(plan.family.injected, plan.pruning.at[0], len(plan.layers), kwargs)
    return args, kwargs


def goes_on(plan: Plan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A later call without an image enters the language model."""
    embeddings = kwargs.get("inputs_embeds")
    if embeddings is None or embeddings.shape[1] == 1:
        return None
    call.given_masks = _finished(kwargs.get("attention_mask"))
    pruned = kwargs.get(ROWS_WANTED) and isinstance(conversation_layer(kwargs.get("past_key_values")), Pruned)
    return (args, {**kwargs, ROWS_WANTED: 0}) if pruned else None


def _finished(mask: Any) -> bool:
    """Whether a language model is given masks, and not what to make them from."""
    return mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)


def _without_image(plan: Plan, call: Call, embeddings: Tensor) -> None:
    """A prompt without an image has nothing to prune: it simply runs, and the record says so."""
    if plan.tower.shortens and on_host(embeddings[..., 0].isnan().any()):
        raise UsageError(
            f"the pictures were encoded while {plan.recipe} dropped patches of them inside the vision tower, and "
            "run.enabled is False now: encode them again."
        )
    call.batch, call.sequence = embeddings.shape[:2]
    if call.enabled and call.sequence > 1:  # guidance runs the last token alone beside the prompt, whose record people want
        call.record = _begin_record(plan, call, embeddings)


def _separate_newlines(prompt: Prompt, embeddings: Tensor, newline: Tensor) -> None:
    """Row separators are among an image's placeholders but show nothing: they count as text."""
    device = embeddings.device.type
    if torch.is_autocast_enabled(device):  # transformers packs it among features of that dtype
        newline = newline.to(torch.get_autocast_dtype(device))
    prompt.newlines = on_host((embeddings == newline.to(embeddings)).all(dim=-1)) & prompt.tokens.placeholders
    prompt.layout = prompt.layout.without(prompt.newlines)


def _begin_record(plan: Plan, call: Call, embeddings: Tensor) -> Prefill:
    prompt = call.prompt
    visual = 0 if prompt is None else sum([len(image.places) for image in prompt.layout.images])
    record = Prefill(
        batch=call.batch,
        sequence=call.sequence,
        past=call.past,
        visual=visual,
        shape=plan.shape,
        itemsize=embeddings.element_size(),
        neutral=plan.redistribution.neutral,
        newlines=0 if prompt is None or prompt.newlines is None else int(prompt.newlines.sum()),
        hidden=0 if prompt is None else visual - sum(prompt.candidates),
    )
    record.prefill = Clock(device=embeddings.device).begin()
    record.tower, plan.tower.now.clocks = list(plan.tower.now.clocks), ()
    record.tower_work, plan.tower.now.work = plan.tower.now.work, None
    return record


# -- after the language model ------------------------------------------------------------------------------------------------


@torch.compiler.disable
def leave_prompt(plan: Plan, call: Call, record: Prefill, output: Any) -> Any:
    """A prompt leaves the language model: rows go back to their places, the cache is shortened, the record is complete."""
    hidden, last = output[0], call.sections[-1] if call.sections else call.section
    if last.rows is not None:
        output.last_hidden_state = last.rows.scatter(hidden, call.sequence)
    for section, layers in call.layers_by_section(plan.shape.layers):
        record.entering += [call.sequence if section.rows is None else section.rows.rows.shape[1]] * layers
        begun = len(record.stored)
        record.stored += section.keys_by_layer(plan.kinds, range(begun, begun + layers), call.past, call.sequence)
    record.resident = plan.shape.entries(record.stored)
    record.held.append(list(record.resident))
    plan.pruning.shorten_cache(call, output.get("past_key_values"))  # made by the model itself in a plain call
    record.places, record.places_unpruned = places_of(output.get("past_key_values"))
    record.prefill.end_now()
    hand_over(output.get("past_key_values"), call.owner)
    if call.labels and last.rows is not None and last.alive is not None:
        _ignore_labels(plan, call, last.alive)
    plan.redistribution.leave(call)
    plan.contexts.note(record, call.blocks)
    return output


def _ignore_labels(plan: Plan, call: Call, alive: Tensor) -> None:
    """A label is predicted from the row before it. Where that row was not computed, the label does not count."""
    lost = 0
    for labels, offset in call.labels:
        missing = ~alive[:, : alive.shape[1] - offset].to(labels.device)
        found = (labels[:, offset:] != IGNORED) & missing
        labels[:, offset:].masked_fill_(found, IGNORED)
        lost += int(on_host(found.sum()))
    if lost and not plan.warned_of_labels:
        plan.warned_of_labels = True
        warnings.warn(
            f"{lost} label(s) directly follow tokens that {plan.recipe} dropped, or padding. No row predicts them, so they are "
            f"left out of the loss. Set them to {IGNORED} in your data. (This warning appears once.)",
            stacklevel=2,
        )
