"""What one stage keeps: its method is shown the images of one size together, and what it chooses is put together per image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmprune.adapters.family import Family, has_mrope
from vlmprune.device import on_device, on_host
from vlmprune.errors import UsageError, shown
from vlmprune.live.attention_probes import attention_ahead
from vlmprune.live.call import Call, Prompt, StageResult
from vlmprune.live.explain import by_picture, judged
from vlmprune.live.kinds import Kinds
from vlmprune.live.layout import group_by_size
from vlmprune.live.probes import build_view
from vlmprune.live.prompt_rows import rows_now
from vlmprune.live.record import Judged
from vlmprune.live.section import Rotary
from vlmprune.live.source import Part, Tools
from vlmprune.methods import Choice, Pruner
from vlmprune.schedule import Budget, Stage, share


@dataclass(frozen=True, eq=False)
class BoundStage:
    """One stage of a recipe on a model.

    Attributes:
        number: its place among the stages of the recipe.
        stage, method: as the recipe has them.
        needs: probes that the method looks at here.
        label: how the report names it.
        per_crop: each crop of an image is decided by itself.
        per_frame: each frame of a video is decided by itself, with the whole budget.
        adaptive: the method decides how many tokens it keeps; the budget is an upper limit.
    """

    number: int
    stage: Stage
    method: Pruner
    needs: frozenset[str]
    label: str
    per_crop: bool
    adaptive: bool
    per_frame: bool = False

    def keeps(self, budget: Budget, prompt: Prompt, image: int) -> int:
        """How many tokens of an image the stage keeps at most, of those that the call's mask does not hide."""
        if self.per_frame:
            return sum(map(budget.resolve, prompt.by_frame(image)))
        return budget.resolve(prompt.candidates[image])


@dataclass(frozen=True, eq=False)
class Model:
    """The model that a stage is in: its family, its base model and its language model, and the kinds of its decoder layers."""

    family: Family
    base: Any
    language_model: Any
    kinds: Kinds


def make_tools(
    model: Model,
    module: nn.Module,
    index: int,
    call: Call,
    hidden: Tensor,
    kwargs: dict[str, Any],
    rotary: Callable[[], Rotary],
) -> Tools:
    """The pieces of the model that probes are made with.

    Args:
        module, index: the stage's decoder layer, and its number.
        hidden, kwargs: what enters it.
        rotary: gives the rotary embeddings of `hidden`.
    """
    kind = model.kinds.of[index]
    own = kwargs.get("attention_mask") if call.keeps_masks(kind) else None
    run, tower = partial(_as_the_model, call, hidden.device), model.family.tower

    def ahead() -> Tensor:
        cache_ = kwargs.get("past_key_values")
        given: dict[str, Any] = {"position_embeddings": rotary()}
        if "shared_kv_states" in kwargs:
            given["shared_kv_states"] = {}  # the model's own stays as it is
        return attention_ahead(call, model.family, module, index, hidden, given, cache_, own, kind.window)

    return Tools(
        ahead=cache(partial(run, ahead)),
        rotary=rotary,
        norm=partial(run, model.language_model.get_submodule(model.family.final_norm)),
        # Without its hooks: nothing is recorded.
        project=partial(run, None if tower is None else model.base.get_submodule(tower.projector).forward),
        start=partial(_start, model, index, call, hidden, kwargs),
    )


def _as_the_model(call: Call, device: torch.device, run: Callable[..., Any], *args: Any) -> Any:
    """Run a piece of the model as the model itself does: inside `torch.autocast` if it was called so."""
    enabled, dtype = call.autocast
    with torch.autocast(device.type, dtype=dtype, enabled=enabled):
        return run(*args)


def _start(model: Model, layer: int, call: Call, hidden: Tensor, kwargs: dict[str, Any]) -> Rotary | None:
    """Rotary embeddings `[batch, segment, head_dim]` of the first token of each sample: of the conversation's, in a later turn,
    where positions count tokens. They are those of the layer before the stage's, whose keys are turned back."""
    assert call.prompt is not None
    starts = on_device(call.prompt.tokens.starts, hidden.device)
    module = model.language_model.get_submodule(model.family.rotary)
    differ = "layer_type" in signature(module.forward).parameters
    by_kind = (model.language_model.config.layer_types[layer - 1],) if differ else ()
    if not call.past and not by_kind:
        cos, sin = (part.expand(hidden.shape[0], -1, -1) for part in kwargs["position_embeddings"])
        index = starts.to(cos.device)[..., None].expand(-1, -1, cos.shape[-1])
        return cos.gather(1, index), sin.gather(1, index)
    position = kwargs.get("position_ids")
    if position is None or has_mrope(model.language_model.config):
        return None
    before = call.past if call.mask is None else (call.mask[:, : call.past] != 0).sum(dim=1, keepdim=True).to(starts.device)
    first = (position.expand(hidden.shape[0], -1).gather(1, starts) - before).clamp_min(0)
    cos, sin = module(hidden, first, *by_kind)
    return cos, sin


def choose(
    bound: BoundStage, budget: Budget, call: Call, prompt: Prompt, hidden: Tensor, tools: Tools, explains: bool
) -> StageResult:
    """What remains of every image after a stage.

    Args:
        hidden: `[batch, token, dim]` entering the stage's layer.
        tools: pieces of the model.
        explains: what is decided by is kept, for `run.explain`.
    """
    method, layer = bound.method, bound.stage.layer
    parts: list[Part] = []
    for image in range(len(prompt.candidates)):
        if bound.per_frame:
            parts += _frames(call, prompt, image, budget)
        else:
            parts += _parts(bound, call, prompt, image, bound.keeps(budget, prompt, image))
    groups: dict[tuple[int, ...], tuple[list[int], list[Part]]] = {}  # of equal sizes: decided in one batch
    for number, part in enumerate(parts):
        group, members = groups.setdefault(part.size, ([], []))
        group.append(number)
        members.append(part)
    over_image = cache(partial(_over_images, bound, call, prompt, hidden, tools))
    kept: dict[int, list[tuple[Tensor, Tensor | None]]] = {}
    reasons: dict[int, Judged] = {}
    for group, members in groups.values():
        see = None
        first, keep = members[0].index, min(members[0].keep, len(members[0].index))
        chosen: Choice | Tensor
        if keep == 0:
            chosen = torch.empty(len(group), 0, dtype=torch.long, device=first.device)
        elif keep == len(first) and not bound.adaptive:
            chosen = torch.arange(keep, device=first.device).expand(len(group), keep)
        else:
            see = build_view(call, layer, bound.needs, members, hidden, tools)
            if bound.per_crop and method.scales_over_picture:
                see = replace(see, over_picture=_of_parts(over_image(), members))
            chosen = method.select(see, keep)
        choice = chosen if isinstance(chosen, Choice) else Choice(chosen)
        check_choice(method, choice, len(group), len(first), keep, hidden.shape[-1])
        if explains:
            reasons |= zip(group, judged(method, see, choice, [part.index for part in members]), strict=True)
        for number, part in enumerate(members):
            index = part.index[choice.index[number].to(part.index.device)]
            kept.setdefault(part.image, []).append((index, None if choice.features is None else choice.features[number]))
    joined = []
    for image in range(len(prompt.layout.images)):
        pieces = kept[image]
        joined.append(pieces[0] if len(pieces) == 1 else _joined(call, prompt, hidden, image, pieces))
    why = by_picture(reasons, [part.image for part in parts], len(kept)) if explains else None
    remaining, features = zip(*joined, strict=True)
    return StageResult(remaining, features, any(x is not None for x in features), judged=why)


def left_by_tower(call: Call, prompt: Prompt, hidden: Tensor, first: bool, last: bool) -> StageResult:
    """What a stage before or inside the vision tower left of every image: rows of NaN in `hidden` `[batch, token, dim]` were
    dropped.

    Args:
        first, last: of the stages there. If there are two, rows that end in infinity entered the tower, and were dropped inside
            it (`TowerSequence.restore`).
    """
    images, real = prompt.layout.images, prompt.tokens.real
    places = [image.places_on_device for image in images]
    if not first:
        places = [rows_now(call, number, index) for number, index in enumerate(call.section.remaining)]

    def column(number: int) -> Tensor:
        rows = zip(images, places, strict=True)
        return torch.cat([hidden[image.sample, mine.to(hidden.device), number] for image, mine in rows])

    there = on_host(~(column(0).isnan() if last else column(0).isnan() & ~column(-1).isinf()))
    ends = np.cumsum(list(map(len, places)))[:-1]
    if first:
        seen = np.concatenate([real[image.sample, image.places] for image in images])
        numbers = [mine.nonzero()[0] for mine in np.split(there & seen, ends)]
        left = [on_device(mine, image.places_on_device.device) for mine, image in zip(numbers, images, strict=True)]
    else:
        pairs = zip(call.section.remaining, np.split(there, ends), strict=True)
        left = [index[on_device(mine.nonzero()[0], index.device)] for index, mine in pairs]
    return StageResult(tuple(left), (None,) * len(left), emptied=not there.all())


def merged(call: Call, prompt: Prompt, chosen: StageResult, hidden: Tensor) -> Tensor:
    """Hidden states `[batch, token, dim]` with merged features in the places of the kept tokens that represent several."""
    if not chosen.merges:
        return hidden
    hidden = hidden.clone()
    for image, (remaining, features) in enumerate(zip(chosen.remaining, chosen.features, strict=True)):
        if features is not None:
            rows = rows_now(call, image, remaining).to(hidden.device)
            hidden[prompt.layout.images[image].sample, rows] = features.to(hidden)
    return hidden


def _parts(bound: BoundStage, call: Call, prompt: Prompt, image: int, keep: int) -> list[Part]:
    """What is decided together of one image: all of it, or each of its crops with its share of the budget."""
    index, original, entered = call.section.remaining[image], len(prompt.layout.images[image].places), prompt.entered[image]
    frames = prompt.layout.images[image].frames
    if not bound.per_crop or keep >= len(index):
        return [Part(image, index, original, entered, keep, frames)]
    crop = prompt.crops[image][:, 0]
    numbers, sizes = np.unique(crop[crop >= 0], return_counts=True)  # −1: dropped inside the tower
    there = np.arange(original) if len(index) == original else on_host(index)
    left = [on_device(there[crop[there] == number], index.device) for number in numbers]
    shares = share(keep, sizes.tolist(), list(map(len, left)))
    frame = range(frames) if frames == len(numbers) else [None] * len(numbers)  # a frame is a crop of its video
    parts = zip(left, sizes.tolist(), shares, frame, strict=True)
    return [Part(image, here, size, entered, kept, frame=one) for here, size, kept, one in parts]


def _frames(call: Call, prompt: Prompt, image: int, budget: Budget) -> list[Part]:
    """Every frame of a video, with what the budget keeps of it."""
    video, index = prompt.layout.images[image], call.section.remaining[image]
    assert video.frame is not None
    there = np.arange(len(video)) if len(index) == len(video) else on_host(index)
    of_token, sizes = video.frame[there], np.bincount(video.frame, minlength=video.frames).tolist()
    parts = []
    for frame, candidates in enumerate(prompt.by_frame(image)):
        mine = on_device(there[of_token == frame], index.device)
        parts.append(Part(image, mine, sizes[frame], sizes[frame], budget.resolve(candidates), frame=frame))
    return parts


def _over_images(bound: BoundStage, call: Call, prompt: Prompt, hidden: Tensor, tools: Tools) -> list[Tensor]:
    """Per image `[original]`, what a method that decides crop by crop scales over all of them; 0 where dropped."""
    images, remaining = prompt.layout.images, call.section.remaining
    wholes = [
        Part(number, index, len(image), prompt.entered[number], 0, image.frames)
        for number, (image, index) in enumerate(zip(images, remaining, strict=True))
    ]
    found: dict[int, Tensor] = {}
    for group in group_by_size([whole.size for whole in wholes]):
        members = [wholes[number] for number in group]
        numbers = bound.method.over_picture(build_view(call, bound.stage.layer, bound.needs, members, hidden, tools))
        for whole, own in zip(members, numbers, strict=True):
            found[whole.image] = own.new_zeros(whole.original).index_put((whole.index.to(own.device),), own)
    return [found[image] for image in range(len(wholes))]


def _of_parts(over_image: list[Tensor], members: list[Part]) -> Tensor:
    """`[image, visual]` of some parts of what was made of their whole images."""
    return torch.stack([over_image[part.image][part.index.to(over_image[part.image].device)] for part in members])


def _joined(
    call: Call, prompt: Prompt, hidden: Tensor, image: int, pieces: list[tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """The parts of one image in one, in rising order; parts that merged nothing stay as they are."""
    index, order = torch.cat([index for index, _ in pieces]).sort()
    if all(features is None for _, features in pieces):
        return index, None
    entered = hidden[prompt.layout.images[image].sample]
    own: Callable[[Tensor], Tensor] = lambda index: entered[rows_now(call, image, index).to(entered.device)]  # noqa: E731
    features = torch.cat([own(index) if features is None else features for index, features in pieces])
    return index, features[order.to(features.device)]


def check_choice(method: Pruner, choice: Choice, images: int, visual: int, keep: int, dim: int | None) -> None:
    """Refuse what a method chose, if it is not what it was asked for. It does not wait for a GPU: there, wrong indices fail as
    an assertion on the device.

    Args:
        images, visual: pictures that were shown, and tokens of each.
        keep: tokens to keep of each; the most of them, if the method is `adaptive`.
        dim: width of hidden states; None where nothing can be merged.

    Raises:
        UsageError: the wrong kind of index, another number, indices that are out of range or do not rise, features that do not
            fit.
    """
    name = f"{method.name}.select"
    apart = choice.index.ndim > 0 if isinstance(choice.index, Tensor) else isinstance(choice.index, list | tuple)
    rows: Any = choice.index if apart else [choice.index]
    for row in rows:
        if not isinstance(row, Tensor) or row.ndim != 1 or row.is_floating_point() or row.dtype == torch.bool:
            found = f"{row.dtype} of shape {list(row.shape)}" if isinstance(row, Tensor) else shown(row)
            raise UsageError(f"{name} must return whole numbers [image, keep], found {found} for a picture.")
    counts = [len(row) for row in rows]
    if len(counts) != images or max(counts) > keep or (min(counts) < keep and not method.adaptive):
        at_most = "at most " if method.adaptive else ""
        raise UsageError(f"{name} chose {counts} tokens of {images} pictures, expected {at_most}{keep} of each.")
    for row in rows:
        if row.device.type == "meta" or not len(row):
            continue
        good = (row[:1] >= 0).all() & (row[-1:] < visual).all() & (row.diff() > 0).all()
        bad = f"{name} must return rising indices from 0 to {visual - 1}, each once"
        if row.device.type == "cuda":
            torch._assert_async(good, bad)
        elif not good:
            raise UsageError(f"{bad}, found {row.tolist()}.")
    if choice.features is not None and dim is None:
        raise UsageError(f"{name} returned features, and nothing can be merged before the vision tower: return indices alone.")
    if choice.features is not None and list(choice.features.shape) != (wanted := [images, keep, dim]):
        raise UsageError(
            f"{name} must return features [image, keep, dim] of shape {wanted}, found {list(choice.features.shape)}."
        )
