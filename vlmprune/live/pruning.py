"""The stages of a recipe at work in one model: what they drop, and the section of layers that each of them opens.

A method decides (`choosing.py`). Hidden states and rotary embeddings are shortened in one launch, and all that the layers up to
the next stage are given follows from the section (`section.py`). No hook is made here; redistribution has its own file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.family import Family
from vlmprune.device import on_device, on_host
from vlmprune.errors import UsageError
from vlmprune.live.cache import keep_only, pruned_layers
from vlmprune.live.cache_layer import Pruned
from vlmprune.live.call import Call, Prompt, StageResult
from vlmprune.live.choosing import BoundStage, Model, choose, left_by_tower, make_tools, merged
from vlmprune.live.explain import how_it_chooses
from vlmprune.live.kinds import Kinds
from vlmprune.live.record import Clock, Judged, Kept
from vlmprune.live.rows import Reduction
from vlmprune.live.section import LayerStack, Section, complete_entries
from vlmprune.recipe import Recipe
from vlmprune.schedule import IN_TOWER, Budget
from vlmprune.view import TowerFacts


class Pruning:
    """What a recipe drops in one model.

    Args:
        recipe, family, facts: as they are.
        base, language_model: the model's base model and its language model.
        kinds: what its decoder layers see and keep.

    Attributes:
        stages: in the order in which they run.
        at: their layers.
        cache_stage: the stage after prefill, or None.
        needs: all probes that methods look at.
        explains: what stages decide by is kept, for `run.explain`.
    """

    explains = False

    def __init__(self, recipe: Recipe, family: Family, facts: TowerFacts, base: Any, language_model: Any, kinds: Kinds) -> None:
        self._family, self._facts, self._language_model = family, facts, language_model
        self.stages = [_bound(number, *found, facts) for number, found in enumerate(recipe.stages(facts))]
        self.at = tuple(sorted({bound.stage.layer for bound in self.stages}))
        self._in_tower = [bound for bound in self.stages if bound.stage.site in IN_TOWER]
        self.cache_stage = next((bound for bound in self.stages if bound.stage.site == "cache"), None)
        self.needs: frozenset[str] = frozenset().union(*(bound.needs for bound in self.stages))
        self._running: dict[int, list[BoundStage]] = {layer: [] for layer in self.at}
        for bound in self.stages:
            if bound.stage.site != "cache":
                self._running[bound.stage.layer].append(bound)
        self._model = Model(family, base, language_model, kinds)
        self.stack = LayerStack(
            language_model.config, lambda *args: language_model.get_submodule(family.rotary)(*args), self.at, kinds
        )
        # The other layers store what one of these does, or everything.
        self._storing = [layers[0] for start in self.at for layers in self.stack.storing.get(start, {}).values()]

    # -- what is known beforehand ----------------------------------------------------------------------------------------

    def budget_of(self, bound: BoundStage, override: Budget | None) -> Budget:
        """The stage's budget, or that of `Run.override`."""
        return override if override is not None and self.may_override(bound) else bound.stage.budget

    def may_override(self, bound: BoundStage) -> bool:
        """Not a stage that only merges, or only removes from the cache what others dropped."""
        return len(self.stages) == 1 or bound.stage.budget.fraction != 1.0

    def may_drop(self, images: Sequence[int] | None, override: Budget | None) -> bool:
        """Whether images with so many tokens could lose some; None: of any size."""
        for bound in self.stages:
            budget = self.budget_of(bound, override)
            if bound.stage.site == "cache":
                continue
            if bound.adaptive or (self._family.newline is not None and not bound.method.keeps_newlines):
                return True
            if images is None or bound.stage.site in IN_TOWER or bound.per_frame:  # which count crops, or frames
                if budget.fraction != 1.0:
                    return True
            elif any(budget.resolve(count) < count for count in set(images)):
                return True
        return False

    def shortens_at_once(self, call: Call) -> bool:
        """Whether all layers will compute fewer tokens than the prompt has, as far as budgets tell."""
        for bound in self._running.get(0, ()):
            if bound.stage.site == "llm" and not bound.adaptive and call.prompt is not None:
                budget, prompt = self.budget_of(bound, call.budget), call.prompt
                for image, index in enumerate(call.section.remaining):
                    if bound.keeps(budget, prompt, image) < len(index):
                        return True
        return False

    def chooses_at(self, layer: int, call: Call, prompt: Prompt) -> bool:
        """Whether a method will choose before a layer: it is asked where it keeps fewer tokens than are there."""
        if prompt.replayed or (call.sections and call.sections[-1].start >= layer):
            return False
        for bound in self._running[layer]:
            budget = self.budget_of(bound, call.budget)
            for image, index in enumerate(call.section.remaining):
                if bound.stage.site == "llm" and (bound.adaptive or bound.keeps(budget, prompt, image) < len(index)):
                    return True
        return False

    def decodes_without_padding(self, call: Call, kwargs: dict[str, Any]) -> bool:
        """True for a decoding step of one token when every cached entry is visible: no mask is needed, and the layer hooks have
        nothing to do."""
        layers, embeddings = getattr(kwargs.get("past_key_values"), "layers", None), kwargs.get("inputs_embeds")
        if not (self.at and layers) or embeddings is None or embeddings.shape[1] != 1 or call.custom:
            return False
        if (window := self.stack.kinds.window) is not None and call.past + 1 >= window:
            return False
        first, visible = None, True
        for index in self._storing:
            layer = layers[index]
            if not isinstance(layer, Pruned) or layer.recorded is None:
                visible = False
                continue
            first = layer if first is None else first
            visible = visible and layer.recorded.dense and layer.recorded.shift is None
        if first is not None and embeddings.shape[0] > 1 and call.mask is not None:
            # Samples of a batch that have ended may hide their tokens. Where they do not, transformers need not ask it again.
            call.padded_step = not on_host(_all_seen(call.mask, first)).all()
        if first is None or first.recorded is None or call.padded_step or not visible:
            return False
        config = self._language_model.config
        implementation = config._attn_implementation  # the others make a mask in any case, and we a shorter one
        return (implementation == "sdpa" or "flash" in implementation) and (self.at[0] == 0 or first.recorded.unpadded)

    # -- at a layer ----------------------------------------------------------------------------------------------------

    def enter_layer(
        self, index: int, module: nn.Module, call: Call, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]] | None:
        """What a decoder layer is given instead of `hidden` `[batch, token, dim]` and `kwargs`; None for these themselves."""
        if index in self._running:
            hidden = self._open(index, module, call, hidden, kwargs)
        elif call.section.start > index or call.recomputes:
            call.section = call.section_of(index)
        section = call.section
        if section.rows is None:
            cache_, where = kwargs.get("past_key_values"), self.stack.kinds.stored_at[index]
            layer = cache_.layers[where] if cache_ is not None and where is not None and where < len(cache_.layers) else None
            if not isinstance(layer, Pruned):
                return None
            entries, window = layer.recorded, self.stack.kinds.of[index].window
            every = entries is not None and entries.dense and entries.shift is None and not call.custom
            every = every and (window is None or call.past < window)
            if hidden.shape[1] == 1 and every and call.prompt is None and not call.padded_step:
                # Decoding without padding: every stored entry is visible, no mask is needed.
                return None if kwargs.get("attention_mask") is None else (hidden, {**kwargs, "attention_mask": None})
        return hidden, section.arguments(index, call, hidden, kwargs, self.stack)

    def _open(self, index: int, module: nn.Module, call: Call, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Open the section that begins with a stage's layer, and shorten the hidden states `[batch, token, dim]`.

        Gradient checkpointing may run a layer, and its hooks, again (before transformers 5.23): it starts from the section that
        it started from, and ends in the section that was opened in its first run.
        """
        again = next((section for section in call.sections if section.start == index), None)
        call.section = call.section_of(index - 1)
        if call.prompt is not None:
            for bound in self._running[index]:
                with timed(call, hidden.device, f"layer {index}", again is None):
                    hidden = self._prune(bound, module, call, call.prompt, hidden, kwargs, again is None)
        if again is None:
            again = call.section.at(index)
            call.sections.append(again)
        call.section = again
        return hidden

    def _prune(
        self,
        bound: BoundStage,
        module: nn.Module,
        call: Call,
        prompt: Prompt,
        hidden: Tensor,
        kwargs: dict[str, Any],
        first: bool,
    ) -> Tensor:
        """At one stage: let its method choose, drop the rest, and go on in a section of the kept tokens."""
        index, section = bound.stage.layer, call.section
        earlier = self._earlier_shift(index, kwargs.get("past_key_values")) if call.past else None
        rotary = partial(section.rotary, hidden, earlier, kwargs, self.stack)
        chosen = prompt.chosen.get(bound.number)
        if chosen is None or not (first or prompt.replayed):  # a layer that is run again saves the same tensors again
            if bound.stage.site in IN_TOWER:
                chosen = left_by_tower(call, prompt, hidden, bound is self._in_tower[0], bound is self._in_tower[-1])
                prompt.entered = [len(index) for index in chosen.remaining]
            else:
                _refuse_lost_gradient(bound, prompt)
                tools = make_tools(self._model, module, index, call, hidden, kwargs, rotary)
                chosen = choose(bound, self.budget_of(bound, call.budget), call, prompt, hidden, tools, self.explains)
        if first:
            prompt.chosen[bound.number] = chosen.detached()
        hidden = merged(call, prompt, chosen, hidden)
        if not self._drop(bound, call, prompt, chosen, first):
            return hidden  # everything kept: the layer runs exactly as without us
        assert call.section.rows is not None
        stays = call.section.rows.after(section.rows)
        if call.section.shift is not None:  # new rotary embeddings are made
            return stays.gather(hidden)
        hidden, cos, sin = stays.gather_all(hidden, *rotary())
        call.section.hand_on((cos, sin), kwargs["position_embeddings"], earlier)
        return hidden

    def _drop(self, bound: BoundStage, call: Call, prompt: Prompt, chosen: StageResult, first: bool) -> bool:
        """Drop what was not chosen: go on in a new section. Whether there was anything to drop."""
        section, record, images, layer = call.section, call.record, prompt.layout.images, bound.stage.layer
        assert record is not None
        assert section.alive is not None
        alive, counts, changed = section.alive.clone(), list(section.counts), chosen.emptied
        for image, remaining, before in zip(images, chosen.remaining, section.remaining, strict=True):
            alive[image.sample, image.places_on_device] = False
            alive[image.sample, image.places_on_device[remaining]] = True
            counts[image.sample] += len(remaining) - len(before)
            changed |= len(remaining) != len(before)
        newlines = section.newlines and (prompt.newlines is None or bound.method.keeps_newlines)
        if section.newlines and not newlines:
            assert prompt.newlines is not None
            alive &= ~on_device(prompt.newlines, alive.device)
            counts = (counts - (prompt.newlines & prompt.tokens.real).sum(axis=1)).tolist()
            record.newlines_kept, changed = False, True
        if first:
            record.keep[layer] = alive
            record.kept += _kept(bound, prompt, chosen, section.remaining, self.explains, self._facts)
        if not changed:
            call.section = replace(section, remaining=chosen.remaining)
            return False
        shift = section.shift
        if bound.method.positions == "compact":
            shift = _moved(prompt, section.alive & ~alive) + (0 if shift is None else shift)
        rows = Reduction.keeping(alive, counts)
        call.section = Section(section.start, chosen.remaining, alive, tuple(counts), rows, shift, newlines)
        return True

    def _earlier_shift(self, index: int, cache_: Any) -> Tensor | None:
        """`[batch]` by how much positions became smaller in earlier turns, in the section that begins with a layer."""
        storing = self.stack.storing[index].values()
        layers = [] if cache_ is None else [cache_.layers[where] for (where, *_) in storing]
        recorded = next((layer.recorded for layer in layers if isinstance(layer, Pruned)), None)
        return None if recorded is None else recorded.shift

    # -- after prefill -------------------------------------------------------------------------------------------------

    def shorten_cache(self, call: Call, cache_: Any) -> None:
        """After prefill, remove from the cache, from the cache stage's layer on, the tokens that the last stage dropped."""
        bound, prompt, record = self.cache_stage, call.prompt, call.record
        last = call.sections[-1] if call.sections else call.section
        if bound is None or cache_ is None or prompt is None or record is None or last.rows is None:
            return
        assert last.alive is not None
        counts, unpadded = (None, None) if call.past else (last.counts, bool(prompt.tokens.real.all()))
        complete = partial(complete_entries, call, unpadded=unpadded)
        end = max(other.stage.layer for other in self.stages if other.stage.site != "cache")  # from there on it is removed
        starts = [layer for layer in self.at if bound.stage.layer <= layer <= end]
        for start, stop in pairwise(starts):
            for kind, indices in self.stack.kinds.storing(range(start, stop)).items():
                layers = pruned_layers(cache_, indices, self.at, complete, kind.window)
                keep_only(layers, last.alive, call.past, counts if kind.window is None else None)
                shorter = {index: layer.stored for index, layer in zip(indices, layers, strict=True)}
                record.held.append([count + shorter.get(index, 0) for index, count in enumerate(record.resident)])
                for index, entries in shorter.items():
                    record.resident[index] = entries
        record.keep_cache[bound.stage.layer] = last.alive
        record.kept += [
            Kept(bound.stage.layer, bound.label, "cache", image.sample, image.ordinal, len(image), remaining, **image.shown)
            for image, remaining in zip(prompt.layout.images, last.remaining, strict=True)
        ]


def _kept(
    bound: BoundStage, prompt: Prompt, chosen: StageResult, before: Sequence[Tensor], explains: bool, facts: TowerFacts
) -> list[Kept]:
    """What a stage kept of every image, for the record. `before`: per image, the tokens that were there."""
    reasons = chosen.judged or [(Judged(left),) if explains else () for left in before]
    how = how_it_chooses(bound.method, bound.stage.site) if explains else ""
    packed = bound.stage.site == "vision" and chosen.emptied and not facts.cls  # see `TowerPass.restore`
    return [
        Kept(
            layer=bound.stage.layer,
            method=bound.label,
            site=bound.stage.site,
            sample=image.sample,
            ordinal=image.ordinal,
            original=len(image.places),
            index=left,
            features=features,
            judged=why,
            how=how,
            in_place=not (packed and len(left) < len(image.places)),
            **image.shown,
        )
        for image, left, features, why in zip(
            prompt.layout.images, chosen.remaining, prompt.chosen[bound.number].features, reasons, strict=True
        )
    ]


def _bound(number: int, stage: Any, method: Any, facts: TowerFacts) -> BoundStage:
    needs = method.needs_at(stage) if stage.site == "llm" else frozenset()
    per_crop = method.per_crop and facts.crops
    if stage.site in IN_TOWER or per_crop:
        needs |= {"cell"}  # brings with it which crop a token belongs to, and that this tower made it
    variant = method.variant(facts)
    label = f"{method.name} ({variant})" if variant else method.name
    per_frame = stage.site == "llm" and method.per == "frame"
    return BoundStage(
        number, stage, method, needs, label, per_crop and stage.layer == 0 and not per_frame, method.adaptive, per_frame
    )


@contextmanager
def timed(call: Call, device: torch.device, what: str, record: bool = True) -> Iterator[None]:
    """Record the time that choosing takes; and let it compute in full precision, also inside `torch.autocast`."""
    call.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    with Clock(what=what, device=device) as clock, torch.autocast(device.type, enabled=False):
        yield
    if record and call.record is not None:
        call.record.selection.append(clock)


def _all_seen(given: Tensor, layer: Pruned) -> Tensor:
    """`[batch]` bool: a decoding step's 2-D mask hides nothing of what a layer stores, nor the step's own token."""
    entries, mask = layer.entries, given != 0
    slots = entries.slots.to(mask.device).clamp(max=mask.shape[1] - 1)
    return (mask.gather(1, slots) | ~entries.valid.to(mask.device)).all(dim=1) & mask[:, -1]


def _moved(prompt: Prompt, dropped: Tensor) -> Tensor:
    """`[batch, sequence]` how many of the tokens that are dropped, bool, stand before each token in its sample."""
    moved = dropped.cumsum(dim=1)
    if prompt.tokens.segments is None:
        return moved
    segment = on_device(prompt.tokens.segments, moved.device)
    before = moved.new_zeros(len(moved), int(prompt.tokens.segments.max()) + 1)
    before = before.scatter_reduce(1, segment, moved - dropped.long(), "amin", include_self=False)
    return moved - before.gather(1, segment)


def _refuse_lost_gradient(bound: BoundStage, prompt: Prompt) -> None:
    """Reentrant checkpointing runs a layer without gradients at first, and again with the layer's arguments alone. Before
    transformers 5.23 hooks are inside of that, where what the tower saw is no argument."""
    if torch.is_grad_enabled() or not prompt.tower:
        return
    if any(probe.requires_grad for known in prompt.tower for probe in known.values()):
        raise UsageError(
            f"{bound.method.name} merges what the vision tower saw, whose gradient is lost in reentrant gradient checkpointing "
            'before transformers 5.23: pass gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )
