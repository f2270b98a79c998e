"""The stages of a recipe at work in one model: what they keep, and how the layers behind them are told.

Methods decide; what they decide is applied to hidden states and rotary embeddings in one launch, and put down in the call and
on the cache. No hook is made here (that is `live/plan.py`), and nothing is known of redistribution (`live/redistribution.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmprune.adapters.family import Family, has_mrope
from vlmprune.device import on_device, on_host
from vlmprune.errors import UsageError
from vlmprune.live.cache import PrunedLayer, keep_only, pruned_layer
from vlmprune.live.call import Call, Chosen
from vlmprune.live.layout import group_by_size, real_tokens
from vlmprune.live.masks import part_of_mask, pruned_mask
from vlmprune.live.probes import Part, Tools, attention_ahead, build_view, rows_now
from vlmprune.live.record import Clock, Kept
from vlmprune.live.rows import Reduction
from vlmprune.methods import Choice, Pruner
from vlmprune.recipe import Recipe
from vlmprune.schedule import Budget, Stage, share
from vlmprune.view import TowerFacts


@dataclass(frozen=True, eq=False)
class Cut:
    """One stage of a recipe on this model: its method, what that looks at, and how the report names it."""

    stage: Stage
    method: Pruner
    needs: frozenset[str]
    label: str


class Cutting:
    """What a recipe drops in one model.

    Args:
        recipe, family, facts: as they are.
        base, text: the model's base model and its language model.
        layers: how many decoder layers it has.

    Attributes:
        cuts: the stages, in the order in which they run.
        at: their layers.
        cache_cut: the stage after prefill, or None.
        needs: all probes that methods look at.
    """

    def __init__(
        self,
        recipe: Recipe,
        family: Family,
        facts: TowerFacts,
        base: Any,
        text: Any,
        layers: int,
    ) -> None:
        self._family, self._facts, self._base, self._text = family, facts, base, text
        self._count = layers
        self.cuts: list[Cut] = []
        for stage, method in recipe.cuts(facts):
            needs = method.needs_at(stage) if stage.site == "llm" else frozenset()
            if stage.site == "vision" or (method.per_view and facts.crops):
                needs |= {"cell"}  # brings with it which view a token belongs to, and that this tower made it
            variant = method.variant(facts)
            self.cuts.append(Cut(stage, method, needs, f"{method.name} ({variant})" if variant else method.name))
        self.at = tuple(sorted({cut.stage.layer for cut in self.cuts}))
        self.cache_cut = next((cut for cut in self.cuts if cut.stage.site == "cache"), None)
        self.needs: frozenset[str] = frozenset().union(*(cut.needs for cut in self.cuts))

    # -- what is known beforehand ----------------------------------------------------------------------------------------

    def budget_of(self, cut: Cut, other: Budget | None) -> Budget:
        """The stage's budget, or what `override` has put in its place."""
        return other if other is not None and self.may_override(cut) else cut.stage.budget

    def may_override(self, cut: Cut) -> bool:
        """Not a stage that only merges, or only forgets what others dropped."""
        return len(self.cuts) == 1 or cut.stage.budget.fraction != 1.0

    def shortens_at_once(self, call: Call) -> bool:
        """Whether all layers will compute fewer tokens than the prompt has, as far as budgets tell."""
        return any(
            cut.stage.layer == 0
            and cut.stage.site == "llm"
            and not cut.method.adaptive
            and any(self.budget_of(cut, call.budget).resolve(len(index)) < len(index) for index in call.remaining)
            for cut in self.cuts
        )

    def may_drop(self, pictures: Sequence[int] | None, other: Budget | None) -> bool:
        """Whether pictures with so many tokens could lose some; None: of any size. `other` is the budget of `override`."""
        return any(self._may_drop(cut, pictures, self.budget_of(cut, other)) for cut in self.cuts if cut.stage.site != "cache")

    def _may_drop(self, cut: Cut, pictures: Sequence[int] | None, budget: Budget) -> bool:
        if cut.method.adaptive or (self._family.newline is not None and not cut.method.keeps_newlines):
            return True
        if pictures is None or cut.stage.site == "vision":  # which counts views
            return budget.fraction != 1.0
        return any(budget.resolve(count) < count for count in pictures)

    def chooses_at(self, layer: int, call: Call) -> bool:
        """Whether a method will choose before a layer: it is asked where it keeps fewer tokens than are there."""
        return not call.replayed and any(
            cut.stage.layer == layer
            and cut.stage.site == "llm"
            and (
                cut.method.adaptive
                or any(
                    self.budget_of(cut, call.budget).resolve(count) < len(index)
                    for count, index in zip(call.candidates, call.remaining, strict=True)
                )
            )
            for cut in self.cuts
        )

    def decodes_without_padding(self, call: Call, kwargs: dict[str, Any]) -> bool:
        """One token follows a conversation in which every stored entry is visible: no layer needs a mask, nor us."""
        cache = kwargs.get("past_key_values")
        embeddings = kwargs.get("inputs_embeds")
        if not self.at or cache is None or embeddings is None or embeddings.shape[1] != 1 or call.custom or not cache.layers:
            return False
        layers = [cache.layers[index] for index in self.at]  # the others store what one of these does, or everything
        if not all(isinstance(layer, PrunedLayer) for layer in layers):
            return False
        # Samples of a batch that have ended may hide their tokens. Where the answer is no, transformers need not ask it again.
        if embeddings.shape[0] > 1 and call.mask is not None:
            call.padded_step = not on_host(_all_seen(call, layers[0])).all()
        if call.padded_step or not all(layer.dense and layer.shift is None for layer in layers):
            return False
        implementation = self._text.config._attn_implementation  # the others make a mask in any case, and we a shorter one
        return (implementation == "sdpa" or "flash" in implementation) and (self.at[0] == 0 or layers[0].unpadded)

    # -- at a layer ----------------------------------------------------------------------------------------------------

    def shorten(self, index: int, module: nn.Module, call: Call, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """At a layer's stages: let their methods choose, and shorten the hidden states `[batch, token, dim]`."""
        for number, cut in enumerate(self.cuts):
            if cut.stage.layer != index or cut.stage.site == "cache":
                continue
            cache_ = kwargs.get("past_key_values")
            layer = cache_.layers[index] if call.past and cache_ is not None else None
            pruned = layer if isinstance(layer, PrunedLayer) else None
            now = partial(self._rotary, index, call, hidden, pruned, kwargs)
            with timed(call, hidden.device, f"layer {index}"):
                if cut.stage.site == "vision":
                    call.chosen[number] = _left_by_tower(call, hidden)
                    call.entered = list(map(len, call.chosen[number].remaining))
                elif number not in call.chosen:
                    _refuse_lost_gradient(cut, call)
                    own = kwargs.get("attention_mask") if call.custom else None
                    ahead = partial(attention_ahead, call, self._family, module, index, hidden, cache=cache_, mask=own)
                    tools = Tools(
                        ahead=cache(lambda: _as_the_model(call, hidden.device, lambda: ahead(rotary=now()))),  # noqa: B023
                        rotary=now,
                        norm=partial(_as_the_model, call, hidden.device, self._text.get_submodule(self._family.final_norm)),
                        project=partial(_as_the_model, call, hidden.device, self._projector()),
                        start=partial(self._start, call, hidden, kwargs),
                    )
                    call.chosen[number] = self._choose(cut, call, hidden, tools)
                hidden = self._drop(cut, call, call.chosen[number], hidden, kwargs, now)
                call.chosen[number] = call.chosen[number].detached()
        return hidden

    def _start(self, call: Call, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Rotary embeddings `[batch, segment, head_dim]` of the first token of each sample: of the conversation's, in a later
        turn, where positions count tokens."""
        assert call.prompt is not None
        starts = on_device(call.prompt.starts, hidden.device)
        if not call.past:
            cos, sin = (part.expand(hidden.shape[0], -1, -1) for part in kwargs["position_embeddings"])
            index = starts.to(cos.device)[..., None].expand(-1, -1, cos.shape[-1])
            return cos.gather(1, index), sin.gather(1, index)
        position = kwargs.get("position_ids")
        if position is None or has_mrope(self._text.config):
            return None
        before = call.past if call.mask is None else (call.mask[:, : call.past] != 0).sum(dim=1, keepdim=True).to(starts.device)
        first = (position.expand(hidden.shape[0], -1).gather(1, starts) - before).clamp_min(0)
        cos, sin = self._text.get_submodule(self._family.rotary)(hidden, first)
        return cos, sin

    def _projector(self) -> Any:
        tower = self._family.tower
        return None if tower is None else self._base.get_submodule(tower.projector).forward  # no hooks: nothing is remembered

    def _choose(self, cut: Cut, call: Call, hidden: Tensor, tools: Tools) -> Chosen:
        """What remains of every picture after this stage; pictures of one size are decided together."""
        assert call.layout is not None
        index, method, budget = cut.stage.layer, cut.method, self.budget_of(cut, call.budget)
        per_view = method.per_view and self._facts.crops and not index
        parts = [
            part
            for image, candidates in enumerate(call.candidates)
            for part in _parts(call, image, budget.resolve(candidates), per_view)
        ]
        scaled = cache(partial(_over_pictures, cut, call, hidden, tools))
        kept: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in call.layout.images]
        for group in group_by_size([part.size for part in parts]):
            first = parts[group[0]].index
            visual, keep = len(first), min(parts[group[0]].keep, len(first))
            chosen: Choice | Tensor
            if keep == 0:
                chosen = torch.empty(len(group), 0, dtype=torch.long, device=first.device)
            elif keep == visual and not method.adaptive:
                chosen = torch.arange(visual, device=first.device).expand(len(group), visual)
            else:
                see = build_view(call, index, cut.needs, [parts[i] for i in group], hidden, tools)
                if per_view and method.scales_over_picture:
                    over = [(scaled()[parts[i].image], parts[i].index) for i in group]
                    see = replace(see, over_picture=torch.stack([whole[here.to(whole.device)] for whole, here in over]))
                chosen = method.select(see, keep)
            choice = chosen if isinstance(chosen, Choice) else Choice(chosen)
            _check_choice(method, choice, len(group), keep)
            for number, part in enumerate(parts[i] for i in group):
                rows = choice.index[number].to(part.index.device)
                kept[part.image].append((part.index[rows], None if choice.features is None else choice.features[number]))
        for image, pieces in enumerate(kept):
            if any(features is not None for _, features in pieces):  # parts of the picture that merged nothing stay as they are
                entered = hidden[call.layout.images[image].sample]
                kept[image] = [
                    (index, entered[rows_now(call, image, index).to(entered.device)] if features is None else features)
                    for index, features in pieces
                ]
        joined = [_join(pieces) for pieces in kept]
        return Chosen([index for index, _ in joined], [features for _, features in joined])

    def _drop(
        self,
        cut: Cut,
        call: Call,
        chosen: Chosen,
        hidden: Tensor,
        kwargs: dict[str, Any],
        rotary: Callable[[], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Drop what was not chosen, after what was merged has taken its place. `rotary` gives the embeddings of `hidden`."""
        assert call.layout is not None
        assert call.record is not None
        assert call.alive is not None
        images, layer = call.layout.images, cut.stage.layer
        hidden = _merged(call, chosen, hidden)
        call.record.kept += [
            Kept(layer, cut.label, cut.stage.site, image.sample, image.ordinal, len(image), remaining, features)
            for image, remaining, features in zip(images, chosen.remaining, chosen.detached().features, strict=True)
        ]
        changed = chosen.emptied or any(
            len(now) != len(before) for now, before in zip(chosen.remaining, call.remaining, strict=True)
        )
        before, alive = call.alive, call.alive.clone()
        for image, remaining, left in zip(images, chosen.remaining, call.remaining, strict=True):
            alive[image.sample, image.positions] = False
            alive[image.sample, image.positions[remaining]] = True
            call.counts[image.sample] += len(remaining) - len(left)
        call.remaining = chosen.remaining
        if call.newlines is not None and not cut.method.keeps_newlines and call.record.newlines_kept:
            alive &= ~on_device(call.newlines, alive.device)
            assert call.prompt is not None
            call.counts = (call.counts - (call.newlines & call.prompt.real).sum(axis=1)).tolist()
            call.record.newlines_kept = False
            changed = True
        call.record.keep[layer] = alive
        if not changed:
            return hidden  # everything kept: the layer runs exactly as without us
        if cut.method.positions == "compact":
            moved = _moved(call, before & ~alive)
            call.shift = moved if call.shift is None else call.shift + moved
        shorter = Reduction.keeping(alive, call.counts)
        stays = shorter.after(call.reduction)
        if call.shift is None:
            hidden, cos, sin = stays.gather_all(hidden, *rotary())
            call.rotary.clear()
            full = kwargs["position_embeddings"]
            call.rotary[id(full[0]), 0] = full, (cos, sin)
        else:  # "compact" makes new ones
            hidden = stays.gather(hidden)
            call.rotary.clear()
        call.reduction, call.alive = shorter, alive
        call.edits.rows.clear()  # they are places among what a layer computes
        return hidden

    def arguments(self, index: int, call: Call, hidden: Tensor, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer that computes fewer tokens than the conversation has."""
        batch, device, implementation = hidden.shape[0], hidden.device, self._text.config._attn_implementation
        group = self._group(index)
        layer = None
        if cache is not None:
            layer = pruned_layer(cache, index, self.at, call.mask)
        # position_ids serve only flash attention's search for packed sequences, which gaps would mislead.
        changed = {**kwargs, "position_ids": None, "position_embeddings": self._rotary(index, call, hidden, layer, kwargs)}
        if layer is not None and call.reduction is None and hidden.shape[1] == 1 and not (call.padded_step or call.custom):
            # Decoding: the cache appends by itself.
            if group not in call.masks:
                slots, valid = layer.entries(batch, device)
                here = torch.full((batch, 1), call.past, device=device)
                valid = torch.nn.functional.pad(valid, (0, 1), value=True)
                call.masks[group] = pruned_mask(
                    here,
                    valid[:, -1:],
                    torch.cat((slots, here), dim=1),
                    valid,
                    layer.dense,
                    implementation,
                    hidden.dtype,
                )
            return {**changed, "attention_mask": call.masks[group]}
        rows = call.reduction or _every_row(call, hidden)
        slots, valid, dense = rows.rows.to(device) + call.past, rows.valid.to(device), rows.dense
        keys, keys_valid, keys_dense = slots, valid, dense
        if layer is not None:
            keys, keys_valid, keys_dense = layer.announce(slots, valid, dense, call.sequence or hidden.shape[1])
            layer.unpadded &= dense if call.prompt is None else bool(call.prompt.real.all())
            if call.shift is not None:
                layer.shift = call.shift[:, -1] + (0 if layer.shift is None else layer.shift)
        if group not in call.masks:
            own = kwargs.get("attention_mask") if call.custom else None
            if own is not None:
                call.masks[group] = part_of_mask(own, rows.rows.to(device), valid, keys, keys_valid)
            else:
                keys_valid, keys_dense = _seen_now(call, keys, keys_valid, keys_dense)
                call.masks[group] = pruned_mask(slots, valid, keys, keys_valid, keys_dense, implementation, hidden.dtype)
        if call.record is not None:
            call.record.entering.append(hidden.shape[1])
            call.record.stored.append(keys.shape[1])
        return {**changed, "attention_mask": call.masks[group]}

    def _group(self, index: int) -> int:
        """Number of the stages up to a layer: masks, and what is stored, are equal in all layers between two stages."""
        return sum(layer <= index for layer in self.at)

    def _rotary(
        self, index: int, call: Call, hidden: Tensor, layer: PrunedLayer | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The rotary embeddings of the rows that a layer computes; some models hand different ones to different layers."""
        full: tuple[Tensor, Tensor] = kwargs["position_embeddings"]
        carried = None if layer is None else layer.shift
        if call.reduction is None and call.shift is None and carried is None:
            return full
        name = id(full[0]), 0 if carried is None else self._group(index)
        if name not in call.rotary:  # the full ones are held with their name, so that it cannot be given to another tensor
            shift = carried if carried is None else carried[:, None]
            if call.shift is not None:
                shift = call.shift + (0 if shift is None else shift)
            moved = full
            if shift is not None:  # "compact": everything behind a dropped token moves up
                moved = self._text.get_submodule(self._family.rotary)(hidden, kwargs["position_ids"] - shift)
            rows = call.reduction
            call.rotary[name] = full, moved if rows is None else (rows.gather(moved[0]), rows.gather(moved[1]))
        return call.rotary[name][1]

    # -- after prefill -------------------------------------------------------------------------------------------------

    def forget(self, call: Call, cache_: Any) -> None:
        """After prefill, forget in the layers from the stage's on what the last cut dropped."""
        cut = self.cache_cut
        if cut is None or cache_ is None or call.reduction is None:
            return
        assert call.alive is not None
        assert call.layout is not None
        assert call.record is not None
        assert call.prompt is not None
        counts, unpadded = (None, None) if call.past else (call.counts, bool(call.prompt.real.all()))
        last = max(other.stage.layer for other in self.cuts if other.stage.site != "cache")  # from there on it is forgotten
        for _, group in groupby(range(cut.stage.layer, last), self._group):
            layers = {index: pruned_layer(cache_, index, self.at, call.mask, unpadded) for index in group}
            keep_only(list(layers.values()), call.alive, call.past, counts)
            shorter: list[int] = [layer.keys.shape[-2] for layer in layers.values()]  # type: ignore[union-attr]
            call.record.peak = max(call.record.peak, sum(call.record.resident) + sum(shorter))  # both exist for a moment
            for index, entries in zip(layers, shorter, strict=True):
                call.record.resident[index] = entries
        call.record.keep_cache[cut.stage.layer] = call.alive
        call.record.kept += [
            Kept(cut.stage.layer, cut.label, "cache", image.sample, image.ordinal, len(image), remaining)
            for image, remaining in zip(call.layout.images, call.remaining, strict=True)
        ]


def _as_the_model(call: Call, device: torch.device, run: Callable[..., Any], *args: Any) -> Any:
    """Run a piece of the model as the model itself does: inside `torch.autocast` if it was called so."""
    enabled, dtype = call.autocast
    with torch.autocast(device.type, dtype=dtype, enabled=enabled):
        return run(*args)


@contextmanager
def timed(call: Call, device: torch.device, what: str) -> Iterator[None]:
    """Note the time that choosing takes; and let it compute in full precision, also inside `torch.autocast`."""
    clock = Clock(start=Clock.now(device), what=what)
    call.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, enabled=False):
        yield
    clock.end = Clock.now(device)
    if call.record is not None:
        call.record.selection.append(clock)


def _every_row(call: Call, hidden: Tensor) -> Reduction:
    """A turn without a new cut on a pruned cache: all rows, minus padding."""
    if call.every_row is None:
        batch, sequence = hidden.shape[:2]
        rows = torch.arange(sequence, device=hidden.device).expand(batch, sequence)
        valid = real_tokens(call.mask, batch, sequence, hidden.device)
        call.every_row = Reduction(rows, valid, call.mask is None or bool(on_host(valid.all())))
    return call.every_row


def _all_seen(call: Call, layer: PrunedLayer) -> Tensor:
    """`[batch]` bool: the 2-D mask of a decoding step hides nothing of what a layer stores, nor the step's own token."""
    assert call.mask is not None
    slots, valid = layer.entries(call.mask.shape[0], call.mask.device)
    mask = call.mask != 0
    slots = slots.to(mask.device).clamp(max=mask.shape[1] - 1)
    return (mask.gather(1, slots) | ~valid.to(mask.device)).all(dim=1) & mask[:, -1]


def _seen_now(call: Call, keys: Tensor, valid: Tensor, dense: bool) -> tuple[Tensor, bool]:
    """Which stored entries this turn's 2-D mask shows: it may hide what earlier turns saw."""
    if not call.past or call.mask is None or call.mask.shape[1] < call.past + 1:
        return valid, dense
    seen = valid & (call.mask != 0).to(keys.device).gather(1, keys.clamp(max=call.mask.shape[1] - 1))
    return seen, bool(on_host(seen.all()))


def _moved(call: Call, dropped: Tensor) -> Tensor:
    """`[batch, sequence]` how many of the tokens that are dropped, bool, stand before each token in its sample."""
    moved = dropped.cumsum(dim=1)
    if call.prompt is None or call.prompt.segments is None:
        return moved
    segment = on_device(call.prompt.segments, moved.device)
    before = moved.new_zeros(len(moved), int(call.prompt.segments.max()) + 1)
    before = before.scatter_reduce(1, segment, moved - dropped.long(), "amin", include_self=False)
    return moved - before.gather(1, segment)


def _left_by_tower(call: Call, hidden: Tensor) -> Chosen:
    """What the vision tower left of every picture: the rest are rows of NaN."""
    assert call.layout is not None
    images = call.layout.images
    assert call.prompt is not None
    there = on_host(~torch.cat([hidden[image.sample, image.positions.to(hidden.device), 0] for image in images]).isnan())
    seen = np.concatenate([call.prompt.real[image.sample, image.places] for image in images])
    ends = np.cumsum(list(map(len, images)))[:-1]
    remaining = [
        on_device(mine.nonzero()[0], image.positions.device)
        for mine, image in zip(np.split(there & seen, ends), images, strict=True)
    ]
    return Chosen(remaining, [None] * len(remaining), emptied=not there.all())


def _parts(call: Call, image: int, keep: int, per_view: bool) -> list[Part]:
    """What is decided together of one picture: all of it, or each of its views with its share of the budget."""
    assert call.layout is not None
    index, original, entered = call.remaining[image], len(call.layout.images[image]), call.entered[image]
    if not per_view or keep >= len(index):
        return [Part(image, index, original, entered, keep)]
    view = call.views[image][:, 0]
    numbers, sizes = np.unique(view[view >= 0], return_counts=True)  # −1: dropped inside the tower
    there = np.arange(original) if len(index) == original else on_host(index)
    left = [on_device(there[view[there] == number], index.device) for number in numbers]
    shares = share(keep, sizes.tolist(), list(map(len, left)))
    return [Part(image, here, size, entered, kept) for here, size, kept in zip(left, sizes.tolist(), shares, strict=True)]


def _over_pictures(cut: Cut, call: Call, hidden: Tensor, tools: Tools) -> list[Tensor]:
    """Of every picture `[original]` what a method that decides view by view scales over all its views; 0 where dropped."""
    assert call.layout is not None
    wholes = [_parts(call, image, 0, per_view=False)[0] for image in range(len(call.layout.images))]
    found: dict[int, Tensor] = {}
    for group in group_by_size([whole.size for whole in wholes]):
        pictures = [wholes[i] for i in group]
        numbers = cut.method.over_picture(build_view(call, cut.stage.layer, cut.needs, pictures, hidden, tools))
        for whole, own in zip(pictures, numbers, strict=True):
            found[whole.image] = own.new_zeros(whole.original).index_put((whole.index.to(own.device),), own)
    return [found[image] for image in range(len(wholes))]


def _join(pieces: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """The parts of one picture in one, in rising order."""
    if len(pieces) == 1:
        return pieces[0]
    index, order = torch.cat([index for index, _ in pieces]).sort()
    features = [features for _, features in pieces if features is not None]
    return index, torch.cat(features)[order.to(features[0].device)] if len(features) == len(pieces) else None


def _check_choice(method: Pruner, choice: Choice, images: int, keep: int) -> None:
    """A method that chooses another number than it was asked for is a bug of the method."""
    counts = [len(row) for row in choice.index]
    wrong = len(counts) != images or any(count > keep if method.adaptive else count != keep for count in counts)
    if wrong or (choice.features is not None and list(choice.features.shape[:2]) != [images, keep]):
        raise RuntimeError(f"{method.name}.select chose {counts} tokens of {images} pictures, expected {keep} of each.")


def _refuse_lost_gradient(cut: Cut, call: Call) -> None:
    """Reentrant checkpointing runs a layer without gradients at first, and again with the layer's arguments alone. Before
    transformers 5.23 hooks are inside of that, where what the tower saw is no argument."""
    if not torch.is_grad_enabled() and any(probe.requires_grad for known in call.tower for probe in known.values()):
        raise UsageError(
            f"{cut.method.name} merges what the vision tower saw, whose gradient is lost in reentrant gradient checkpointing "
            'before transformers 5.23: pass gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )


def _merged(call: Call, chosen: Chosen, hidden: Tensor) -> Tensor:
    """Hidden states `[batch, token, dim]` with merged features in the places of the kept tokens that stand for several."""
    if all(features is None for features in chosen.features):
        return hidden
    assert call.layout is not None
    hidden = hidden.clone()
    for image, (remaining, features) in enumerate(zip(chosen.remaining, chosen.features, strict=True)):
        if features is not None:
            rows = rows_now(call, image, remaining).to(hidden.device)
            hidden[call.layout.images[image].sample, rows] = features.to(hidden)
    return hidden
