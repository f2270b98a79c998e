"""Reads from a call which tokens are hidden, packed, or pictures.

    2-D mask           0 hides a token, at any place: padding on either side, holes in the text, tokens of a picture
    4-D mask           if it only hides tokens from all rows, it is read as a 2-D mask; any other one is applied cell by cell
    position ids       where transformers reads packed samples from them, every sample is processed separately
    inputs_embeds      placeholders are the places that hold the placeholder's own embedding, as in transformers

What is ambiguous or not supported is refused here, before anything runs; `prefill.begin` does so only if the plan would drop or
redistribute something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices

from vlmprune.adapters.family import has_mrope
from vlmprune.device import on_device, on_host
from vlmprune.errors import UsageError
from vlmprune.live.cache import conversation_layer
from vlmprune.live.cache_layer import Pruned
from vlmprune.live.call import Call, Prompt
from vlmprune.live.feature_index import hash_rows
from vlmprune.live.kinds import Kinds
from vlmprune.live.layout import Bools, Layout, Tokens
from vlmprune.live.masks import not_masked, shown
from vlmprune.view import WEIGHTS

FED_AGAIN = (
    "transformers' assisted decoding feeds the whole prompt once more where past_key_values holds its beginning already, so "
    "that the model would see it twice: leave prompt_lookup_num_tokens and assistant_model out, or start with an empty cache."
)


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `module` by their names, also those that were given by position."""
    return {**dict(zip(_names(type(module).forward), args, strict=False)), **kwargs} if args else dict(kwargs)


def first_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call of `module`."""
    return args[0] if args else kwargs[_names(type(module).forward)[0]]


@cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(signature(forward).parameters)[1:]


def read_mask(call: Call, kwargs: Mapping[str, Any]) -> None:
    """Store a call's mask: as 2-D, or that layers are given one of which every cell counts."""
    mask = full_mask(kwargs)
    call.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    call.custom = mask is not None and call.mask is None


def check_rows(last: Any, rows: int | None) -> None:
    """Refuse a call with another number of rows than the conversation has.

    Args:
        last: a layer of the conversation's cache, or None.
        rows: of the call; None if unknown.

    Raises:
        UsageError: says how many.
    """
    if isinstance(last, Pruned) and last.recorded is not None and rows not in (None, len(last.recorded.slots)):
        raise UsageError(
            f"the cache holds the conversations of {len(last.recorded.slots)} row(s), and this call has {rows}: copy the cache "
            "and call its batch_repeat_interleave(n); for beams or several sequences of questions on a prefix, "
            "prefix.ask(…, copies=n); a static cache is made for its rows."
        )


def check_mask_goes_on(call: Call, cache: Cache | None, rows: int | None) -> None:
    """Refuse a later turn without a mask, where the conversation has hidden tokens: those that were dropped at the first stage
    cannot become visible again, as they do in the plain model. And one with another number of rows, `rows`.

    Raises:
        UsageError: there is no mask, and something is hidden; or the cache is of another batch.
    """
    last = conversation_layer(cache) if call.past else None
    check_rows(last, rows)
    masked = isinstance(last, Pruned) and last.recorded is not None and not last.recorded.unpadded
    if masked and call.mask is None and not call.custom:
        raise UsageError(
            "the attention mask of earlier turns hid tokens, which were dropped at the first stage, and this call has none: "
            "pass attention_mask, [batch, tokens of the whole conversation]."
        )


def begins_again(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of several tokens goes on with a pruned conversation, and counts its tokens from 0."""
    ids, positions, past = kwargs.get("input_ids"), kwargs.get("position_ids"), kwargs.get("past_key_values")
    if past is None or ids is None or ids.shape[1] == 1 or positions is None:
        return False
    pruned = isinstance(conversation_layer(past), Pruned) and past.get_seq_length() > 0
    return pruned and int(on_host(positions.flatten()[0])) == 0


def full_mask(kwargs: Mapping[str, Any]) -> Any:
    """The mask that was given; `generate` gives some models one for each kind of layer."""
    mask = kwargs.get("attention_mask")
    return mask.get("full_attention") if isinstance(mask, Mapping) else mask


def read_prompt(
    call: Call,
    kwargs: Mapping[str, Any],
    image_token: int,
    language_model: Any,
    needs: frozenset[str],
    editing: Sequence[str],
    video_token: int | None = None,
    placed: Tensor | None = None,
) -> Tokens:
    """Read the tokens of a call with pictures or videos; notes in `call` what their mask says.

    Args:
        call: the running forward pass, after `read_mask`.
        kwargs: the base model's arguments, all by name.
        image_token: id of the placeholder of pictures.
        language_model: it.
        needs: probes that the recipe's methods look at.
        editing: names of the redistribution methods at work.
        video_token: id of the placeholder of videos, if there may be some.
        placed: `[batch, sequence]` bool, where the caller says that pictures are; None if their placeholders say it.

    Raises:
        UsageError: what the call says of its tokens cannot be followed.
    """
    config, mask = language_model.config, full_mask(kwargs)
    flash = "flash" in config._attn_implementation
    ids, *places = _tokens(kwargs, image_token, video_token, language_model, needs)
    places = places if placed is None else [placed, torch.zeros_like(placed)]
    segments = None
    packed = None if mask is not None else packed_samples(kwargs, ids, config, flash)
    if flash and (packed is not None or kwargs.get("cu_seq_lens_q") is not None):
        raise UsageError(
            "several samples are packed into one row (position ids that start anew, or cu_seq_lens_q), which is not supported "
            f'with {config._attn_implementation!r}: call model.set_attn_implementation("sdpa"), or pass one sample per row, '
            "padded, with an attention_mask."
        )
    if call.custom:
        seen = shown(mask, ids.shape[0], ids.shape[1], call.past)
        real, lone, alike = on_host(_said_by(seen, call.past))
        biased = _biased(mask)
        if alike.all() and not biased:
            real &= ~lone
            call.custom, call.mask = False, on_device(real, ids.device)
        else:
            if editing:
                raise UsageError(
                    f"{', '.join(editing)} supports masks that only mark padding; this attention_mask hides more: give a 2-D "
                    "mask, or leave the method out."
                )
            if biased and needs & WEIGHTS:
                raise UsageError(
                    "an attention mask that differs between heads, or weighs tokens instead of hiding them, is not supported "
                    "by methods that look at attention: give a mask of True and False, [batch, 1, query, key], or choose "
                    "another method."
                )
            real &= ~lone
            segments = None if call.past else _apart(on_host(seen), real)
        real = real[:, call.past :]
    elif packed is not None:
        call.custom = True
        segments, real = on_host(packed).astype(int), np.ones(tuple(ids.shape), dtype=bool)
    else:
        prompt = Tokens.read(ids, call.mask, image_token, call.tail, video_token)
        if not places:
            return prompt
        placeholders, videos = map(on_host, places)
        return Tokens.of(prompt.ids, prompt.real, placeholders, call.tail, videos=videos)
    known = on_host(ids)
    placeholders, videos = map(on_host, places) if places else (known == image_token, known == video_token)
    within = None if segments is None else _with_pictures(segments, placeholders | videos)
    return Tokens.of(known, real, placeholders, call.tail, within, videos)


def begin_prompt(
    call: Call,
    tokens: Tokens,
    counts: Sequence[int],
    device: torch.device,
    joins: Callable[[Sequence[int]], bool] | None = None,
    videos: Sequence[int] = (),
) -> Prompt:
    """The prompt of a call with images.

    Args:
        counts: visual tokens of each picture, or of each of its crops.
        joins: as in `Layout.find`.
        videos: visual tokens of each video.
    """
    call.batch, call.sequence = tokens.real.shape
    return Prompt(tokens, Layout.find(tokens, counts, device, joins, videos), on_device(tokens.end, device))


def packed_samples(kwargs: Mapping[str, Any], ids: Tensor, config: Any, flash: bool) -> Tensor | None:
    """`[batch, sequence]` number of the sample that each token belongs to, where transformers takes position ids for several
    samples in one row; else None. It does so without a mask and without a cache only (flash attention: also with one)."""
    position = kwargs.get("position_ids")
    use_cache = kwargs.get("use_cache")
    cached = kwargs.get("past_key_values") is not None or (config.use_cache if use_cache is None else use_cache)
    if position is None or (cached and not flash):
        return None
    if has_mrope(config):  # their first row, if there are four, is the text's
        position = position[0] if position.ndim == 3 and position.shape[0] == 4 else None
    return None if position is None else find_packed_sequence_indices(position.expand(ids.shape[0], -1))


def refuse_merged(kwargs: Mapping[str, Any], language_model: Any) -> None:
    """Refuse embeddings that may have pictures among them, where a call brings none.

    Raises:
        UsageError: an embedding is not a word embedding.
    """
    if count := strange_embeddings(kwargs, language_model):
        raise UsageError(
            f"inputs_embeds holds {count} embeddings that are not word embeddings; if they are pictures, their places are "
            "unknown: say them in `with run.override(image_positions=…):`, or pass pixel_values, with the placeholder's "
            "embedding in the places of the pictures, or input_ids. If they are a soft prompt without pictures, run this call "
            "inside `with run.override(enabled=False):`."
        )


def refuse_later_tokens(
    call: Call, kwargs: Mapping[str, Any], kinds: Kinds, names: Sequence[str], layers: Iterable[int]
) -> None:
    """Refuse to redistribute attention by which tokens see later ones.

    Args:
        kwargs: the language model's arguments.
        names: the redistribution methods.
        layers: those that they edit.

    Raises:
        UsageError: a token sees a later one.
    """
    given = kwargs.get("attention_mask")
    if call.custom or not (call.given_masks or not kinds.causal):
        return
    for kind in {kinds.of[layer] for layer in layers}:
        mask = given.get(kind.name) if isinstance(given, Mapping) else given
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            causal = kind.causal
        else:
            causal = bool(on_host(_said_by(shown(mask, call.batch, call.sequence, call.past), call.past)[2].all()))
        if not causal:
            raise UsageError(
                f"{', '.join(names)} edits attention in which no token sees a later one, but in this model the tokens of a "
                "picture, or of the whole prompt, see each other: leave the method out."
            )


def strange_embeddings(kwargs: Mapping[str, Any], language_model: Any) -> int:
    """How many of a call's embeddings are not those of words; 0 where ids were given, and for a single one (decoding)."""
    embeddings = kwargs.get("inputs_embeds")
    if embeddings is None or kwargs.get("input_ids") is not None or embeddings.shape[1] == 1:
        return 0
    words = language_model.get_input_embeddings().weight.detach().to(embeddings.device, embeddings.dtype)
    return int(on_host((~torch.isin(hash_rows(embeddings.flatten(0, 1)), hash_rows(words))).sum()))


def visible_images(prompt: Prompt) -> tuple[Tensor, ...]:
    """Per image, the indices of its tokens that the call's mask does not hide."""
    real = prompt.tokens.real
    return tuple(
        torch.arange(len(image.places), device=image.places_on_device.device)
        if (there := real[image.sample, image.places]).all()
        else on_device(there.nonzero()[0], image.places_on_device.device)
        for image in prompt.layout.images
    )


def _tokens(
    kwargs: Mapping[str, Any], image_token: int, video_token: int | None, language_model: Any, needs: frozenset[str]
) -> tuple[Tensor, ...]:
    """Ids `[batch, sequence]`; or numbers of their embeddings, and which are placeholders of pictures, and of videos."""
    ids: Tensor | None = kwargs.get("input_ids")
    if ids is not None:
        return (ids,)
    embeddings: Tensor = kwargs["inputs_embeds"]
    if "text_ids" in needs:
        raise UsageError("the method reads the words of the question, but inputs_embeds has no token ids: pass input_ids.")
    words = language_model.get_input_embeddings()
    picture = (embeddings == words(torch.full((), image_token, device=embeddings.device))).all(dim=-1)
    video = torch.zeros_like(picture)
    if video_token is not None:
        video = (embeddings == words(torch.full((), video_token, device=embeddings.device))).all(dim=-1)
    return hash_rows(embeddings.flatten(0, 1)).view(embeddings.shape[:2]), picture, video


def _said_by(seen: Tensor, past: int) -> Tensor:
    """What a mask `[batch, query, key]` means for each key: `[3, batch, key]` bool, whether any row sees it; whether it is
    alone (sees no other, seen by no other); and whether the rows that are not alone see it exactly if it comes before and is no
    padding."""
    _, queries, keys = seen.shape
    place = torch.arange(keys, device=seen.device)
    own = place[past:, None] == place  # [query, key]
    real = seen.any(dim=1)
    lone = ~(seen & ~own).any(dim=1)
    lone[:, past:] &= ~(seen & ~own).any(dim=2) & (queries > 1)
    lone[:, :past] = False
    rows = real[:, past:] & ~lone[:, past:]
    expected = (place <= place[past:, None]) & (real & ~lone)[:, None]
    alike = ((seen == expected) | ~rows[..., None]).all(dim=1)
    return torch.stack((real, lone, alike))


def _biased(mask: Tensor | BlockMask) -> bool:
    """Whether a mask differs between heads or has weights besides "visible" and "masked"."""
    if isinstance(mask, BlockMask):
        return mask.shape[1] > 1
    if mask.shape[1] > 1:
        return True
    if mask.dtype == torch.bool:
        return False
    return bool(on_host(((mask != 0) & not_masked(mask)).any()))


def _apart(seen: Bools, real: Bools) -> np.ndarray[Any, Any]:
    """`[batch, token]` number of the block each token is in: between two blocks, no row looks back."""
    tokens = seen.shape[2]
    first = np.where((seen & real[:, None]).any(axis=2) & real, (seen & real[:, None]).argmax(axis=2), tokens)
    earliest = np.minimum.accumulate(first[:, ::-1], axis=1)[:, ::-1]  # that this row or a later one sees
    begins = earliest >= np.arange(tokens)
    begins[:, 0] = False
    return np.asarray(begins.cumsum(axis=1))


def _with_pictures(segments: np.ndarray[Any, Any], placeholders: Bools) -> np.ndarray[Any, Any] | None:
    """Segments numbered anew: those with a picture from 0 on in each row, all others together after them."""
    numbered = np.full(segments.shape, -1)
    for row, mine, there in zip(numbered, segments, placeholders, strict=True):
        for number, segment in enumerate(np.unique(mine[there])):
            row[mine == segment] = number
    numbered[numbered < 0] = numbered.max() + 1
    return numbered if numbered.any() else None
