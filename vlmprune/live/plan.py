"""What a recipe does in one model, hook by hook.

A forward pass, from hook to hook (`Call` carries the state as an extra keyword argument, which transformers hands down from
the model to every attention function; a `TowerPass` travels through the vision tower in the same way):

    model             how many of the last tokens are no prompt (assisted decoding)
    vision tower      blocks: attention that methods look at, shorter sequences; projector: what is remembered of each token
    base model        which positions are visual tokens of which picture
    language model    padding, what the tower knew, the clock
    decoder layers    from the first stage on: cut at a stage; shorten masks and rotary embeddings; tell the KV cache
    language model    put the rows back in their places, so that logits have the length of the prompt; shorten the cache

No hook is made here: `live/hooks.py` makes them, and asks every call which plan it follows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from threading import local
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from vlmprune.adapters.registry import family_of
from vlmprune.cost import DecoderShape
from vlmprune.device import on_host
from vlmprune.errors import UsageError
from vlmprune.live.attention import CALL_ARGUMENT
from vlmprune.live.cache import check_growing, hand_over
from vlmprune.live.call import Call, Chosen, Prompt
from vlmprune.live.context import Contexts
from vlmprune.live.decoder import Decoder, carried, carry, look_at
from vlmprune.live.feature_index import FeatureIndex
from vlmprune.live.links import Links
from vlmprune.live.observed import see_attention
from vlmprune.live.owner import Encoded, Owner, encoded_of
from vlmprune.live.prompt import begin_prompt, check_mask_goes_on, look_at_mask, read_prompt, refuse_merged, visible_images
from vlmprune.live.pruning import Pruning, timed
from vlmprune.live.record import Clock, Prefill
from vlmprune.live.redistribution import Redistribution
from vlmprune.live.refusals import check_cuts, check_edits, check_tower
from vlmprune.live.tower import TowerPass, blocks_of_probes, look_up_tower, stage_in_tower
from vlmprune.methods.tower import TowerPruner
from vlmprune.recipe import Recipe
from vlmprune.schedule import Budget
from vlmprune.view import BEFORE_THE_STAGE, TowerFacts, taken_in_tower

untraced = torch.compiler.disable
"""What hooks do depends on the prompt: `torch.compile` runs them as they are, and compiles what is between them."""

IGNORED = -100
"""The label that a loss leaves out, as everywhere in transformers."""

Place = tuple[str, int]
"""Where a plan acts: a kind of module, and its number."""


class Plan:
    """A recipe on one model: what is decided beforehand, and what happens in every hook.

    Args:
        model: as it was wrapped.
        recipe: what is applied.
        contexts: what callers say about the handle.

    Attributes:
        observers, editors: by attention module, what looks at its queries and keys (called with the plan first), and what
            computes some of its rows anew.
        edited: decoder layers whose attention is redistributed.
        carried: decoder layers that keep their keyword arguments to themselves, and whose attention must know the call.
        memory: what the tower knew of each visual token.

    Raises:
        UsageError: the recipe cannot be applied to this model. The model was not touched.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, contexts: Contexts) -> None:
        self.model, self.recipe, self.contexts = model, recipe, contexts
        self.memory = FeatureIndex()
        self.observers: dict[nn.Module, list[Callable[..., None]]] = {}
        self.editors: dict[nn.Module, Callable[..., Any]] = {}
        self.now: PerThread = PerThread()
        self._warned_of_labels = False
        self._prepare()

    # -- beforehand ------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        decoder = look_at(self.model, family_of(self.model.config))
        family, base, text, layers = decoder.family, decoder.base, decoder.text, decoder.layers
        self.family, self.base, self.text, self.layers, self._config = family, base, text, layers, base.config
        self._shape = DecoderShape.of(text.config)
        self._facts = _facts(family, base)
        self._redistribution = Redistribution(self.recipe.redistributors, family, self._facts, text)
        self.edited = frozenset(self._redistribution.by_layer)
        self.pruning = Pruning(self.recipe, family, self._facts, base, text)
        self._plan()
        self._check(decoder)
        observed: list[tuple[Any, Callable[..., None]]] = []
        for cut in self.pruning.stages:
            if cut.needs & BEFORE_THE_STAGE:
                index = cut.stage.layer - 1
                seer = partial(Plan._see_attention, layer=index, needs=cut.needs)
                observed.append((layers[index].get_submodule(family.attention), seer))
        if self._uses_tower:
            observed += self._observed_blocks()
        for module, observer in observed:
            self.observers.setdefault(module, []).append(observer)
        for index in self._redistribution.routed:
            self.editors[layers[index].get_submodule(family.attention)] = partial(self._redistribution.attend, index)
        looking = [cut.stage.layer - 1 for cut in self.pruning.stages if cut.needs & BEFORE_THE_STAGE]
        self.carried = carried(decoder, (*looking, *self._redistribution.routed))
        self.links = Links(base, text, self._hooked(), {**self.observers, **self.editors}, self.recipe)

    def places(self) -> Iterator[Place]:
        """Where hooks are needed, beside those that every plan has."""
        first = self.pruning.at[0] if self.pruning.at else len(self.layers)
        for index in sorted({*range(first, len(self.layers)), *self.edited, *self.carried}):
            yield "layer", index
        yield from (("carried", index) for index in sorted(self.carried))
        if not self._uses_tower:
            return
        tower = self.family.tower
        assert tower is not None
        yield "projector", 0
        yield "first block", tower.full_attention_blocks(self._config)[0] if self._tower_cut is not None else 0
        if self._tower_cut is not None and self._tower_cut.stage.site == "vision":
            yield from (("block", index) for index in range(1, len(self._blocks())))
            if not self._facts.cls:
                yield "merger", 0

    def _hooked(self) -> Iterator[nn.Module]:
        """What carries hooks or attention that is looked at; of the tower, its root, projector and blocks."""
        yield from (self.layers[index] for kind, index in self.places() if kind == "layer")
        if self._uses_tower and (tower := self.family.tower) is not None:
            yield from (self.base.get_submodule(name) for name in (tower.root, tower.projector))
            yield from self._blocks()

    def _plan(self) -> None:
        """What the recipe's methods look at in this model, and where."""
        self._needs = self._redistribution.needs | self.pruning.needs
        self._seen_in_tower = taken_in_tower(self._needs)
        self._tower_cut = stage_in_tower(self.pruning.stages, self._needs)
        self._uses_tower = bool(self._seen_in_tower) or self._tower_cut is not None

    def _check(self, decoder: Decoder) -> None:
        """Refuse what cannot work, before the model is touched."""
        check_cuts(self.recipe, decoder, self.pruning.stages)
        check_edits(decoder, self._redistribution)
        if self._uses_tower:
            check_tower(self.recipe, decoder, self._facts, self._tower_cut, self._last_block)

    # -- the vision tower ------------------------------------------------------------------------------------------------

    def _blocks(self) -> Any:
        assert self.family.tower is not None
        return self.base.get_submodule(self.family.tower.blocks)

    def _observed_blocks(self) -> list[tuple[Any, Callable[..., None]]]:
        """The attention modules of the tower that somebody looks at."""
        tower = self.family.tower
        assert tower is not None
        blocks, feature = self._blocks(), tower.feature_block(self._config)
        probes = blocks_of_probes(self._seen_in_tower, feature, len(blocks))
        if self._tower_cut is not None:
            for index in tower.full_attention_blocks(self._config):
                if index < self._last_block():
                    probes.setdefault(index, [])
        return [
            (blocks[index].get_submodule(tower.attention), partial(Plan._see_block, index=index, probes=names))
            for index, names in sorted(probes.items())
        ]

    def _last_block(self) -> int:
        """The block before which the sequence has its final length: what feeds the projector, or in a packed tower its end."""
        assert self.family.tower is not None
        return self.family.tower.feature_block(self._config) + (0 if self._facts.cls else 1)

    @property
    def looks_into_tower(self) -> bool:
        return self._uses_tower

    def begin_tower(self, call: Call | None) -> TowerPass:
        """A pass through the tower begins: what travels through its blocks. `call` is None where pictures are encoded alone."""
        settings = self.contexts.settings
        enabled, budget = (settings.enabled, settings.budget) if call is None else (call.enabled, call.budget)
        cut = self._tower_cut if enabled else None
        inside = cut is not None and cut.stage.site == "vision"
        self.now.clocks = ()
        return TowerPass(
            plan=self,
            facts=self._facts,
            last=self._last_block(),
            wanted=self._seen_in_tower if enabled else frozenset(),
            pruner=cut.method if cut is not None and isinstance(cut.method, TowerPruner) else None,
            budget=self.pruning.budget_of(cut, budget) if cut is not None and inside else None,
            drops=inside,
            in_call=call is not None,
        )

    def enter_first_block(self, tower: TowerPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What enters the first block whose attention sees whole pictures says how many patches each has."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if self._facts.cls:
            tower.begin([hidden.shape[1] - 1], hidden.shape[0], hidden.device)
        else:
            tower.begin(kwargs["cu_seqlens"].diff().tolist(), 1, hidden.device)

    @untraced
    def _see_block(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float,
        index: int,
        probes: list[str],
        **kwargs: Any,
    ) -> None:
        """Observer of a block of the tower. A block that gradient checkpointing runs again was seen before."""
        tower: TowerPass = kwargs[CALL_ARGUMENT]
        if tower.over:
            return
        with self._in_tower(query.device), torch.no_grad():
            tower.watch(index, query, key, value, scaling, probes)

    def enter_block(
        self, index: int, module: nn.Module, tower: TowerPass, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Shorten what enters a block of the tower."""
        if tower.pruner is None:
            return None
        tower = _as_it_was(tower, index, module)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        with self._in_tower(hidden.device):
            if self._facts.cls:
                hidden = tower.shorten_crops(index, hidden)
                mask = tower.mask(self._config.vision_config._attn_implementation, hidden.dtype)
                if len(args) > 1:  # transformers hands the mask over by position
                    return (hidden, mask, *args[2:]), kwargs
                return (hidden,), {**kwargs, "attention_mask": mask}
            hidden = tower.shorten_packed(index, hidden)
            return (hidden, *args[1:]), tower.packed_arguments(kwargs)

    def enter_merger(self, tower: TowerPass, args: tuple[Any, ...]) -> Any:
        return args if tower.pruner is None else (tower.shorten_packed(len(self._blocks()), args[0]), *args[1:])

    def leave_projector(self, tower: TowerPass, args: tuple[Any, ...], features: Tensor) -> Tensor:
        with self._in_tower(features.device):
            return self._remember(tower, args, features)

    def _remember(self, tower: TowerPass, args: tuple[Any, ...], features: Tensor) -> Tensor:
        tower.over = True
        restored = tower.restore(features)
        if tower.wanted:
            # transformers casts features to the dtype of the words they are put among, and so must their names
            among = self.text.get_input_embeddings().weight.dtype
            lives = (restored.untyped_storage(), tower.output)
            tower.observed = self.memory.add(
                features.flatten(0, -2).to(among), tower.probes(features, args[0]), lives, differentiable=tower.in_call
            )
        if tower.pruner is not None and tower.drops and on_host(features.isnan().any()):
            raise UsageError(
                "the vision tower made NaN of a picture, which would pass for dropped patches: look at the pixel values, or "
                "load the tower in a dtype with more range (bfloat16, float32)."
            )
        return restored

    def leave_tower(self, tower: TowerPass, output: Any) -> None:
        """What the tower returned lives as long as its features are wanted."""
        tower.output = None if tower.over else output
        if tower.observed is not None and hasattr(output, "__weakref__"):  # a projector inside the tower
            tower.observed.holders.append(ref(output))

    @contextmanager
    def _in_tower(self, device: torch.device) -> Iterator[None]:
        """Note the time that looking and shortening inside the tower takes."""
        clock = Clock(start=Clock.now(device), what="inside the vision tower")
        yield
        clock.end = Clock.now(device)
        self.now.clocks = (*self.now.clocks, clock)

    # -- attention in the language model ---------------------------------------------------------------------------------

    @untraced
    def _see_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float,
        layer: int,
        needs: frozenset[str],
        **kwargs: Any,
    ) -> None:
        """Observer of the attention before a cut; prefills only, and not where the choice is made already."""
        call: Call | None = kwargs.get(CALL_ARGUMENT)
        if call is not None and call.prompt is not None and self.pruning.chooses_at(layer + 1, call, call.prompt):
            with timed(call, query.device, f"attention in layer {layer}"), torch.no_grad():
                see_attention(call, layer, needs, query, key, value, attention_mask, scaling)

    # -- hooks, in the order of a forward pass ---------------------------------------------------------------------------

    def may_change(self, pictures: Sequence[int] | None, budget: Budget | None) -> bool:
        """Whether pictures with so many tokens (None: of any size) would be computed otherwise than without this plan."""
        return bool(self.edited) or self.pruning.may_drop(pictures, budget)

    def begin(self, call: Call, owner: Owner, kwargs: dict[str, Any]) -> None:
        """A call that follows this plan enters the base model, with `kwargs`. `owner` owns its conversation."""
        settings = self.contexts.settings
        call.owner, call.plan = owner, self
        call.enabled, call.budget, call.blocks = settings.enabled, settings.budget, settings.blocks
        check_mask_goes_on(call, kwargs.get("past_key_values"))
        if not call.past:
            self._begin_conversation(call, owner, kwargs)
        if call.enabled:
            self._find_or_leave(call, kwargs)

    def _begin_conversation(self, call: Call, owner: Owner, kwargs: dict[str, Any]) -> None:
        cache, ids = kwargs.get("past_key_values"), told_by(kwargs)
        hand_over(cache, owner)
        if ids is not None and ids.shape[1] > 1:  # guidance runs the last token alone, beside the prompt that counts
            self.contexts.note(None, call.blocks)  # a prompt that is refused, or switched off, has no record
        features = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if cache is not None or features is None or ids is None:
            return
        if (made := encoded_of(features)) is None:  # encoded before the model was wrapped, or put together by the caller
            made = features.vlmprune = Encoded(None, used=True)
        if call.again is None:  # else it was found with its owner
            call.again = Uncached(ids, owner, call.enabled, call.budget)
            made.prompts.append(call.again)
        call.enabled, call.budget = call.again.enabled, call.again.budget

    def _find_or_leave(self, call: Call, kwargs: dict[str, Any]) -> None:
        """Look for pictures. What cannot be followed is refused only where something would be dropped or redistributed: the
        plain model takes it."""
        try:
            self._find_pictures(call, kwargs)
        except UsageError:
            if self.may_change(call.images, call.budget):
                raise
            look_at_mask(call, kwargs)

    def _find_pictures(self, call: Call, kwargs: dict[str, Any]) -> None:
        if kwargs.get("pixel_values_videos") is not None or (kwargs.get("mm_encoder_outputs") or {}).get("video") is not None:
            raise UsageError(
                "videos are not pruned yet: pass the frames as pictures, or run this prompt inside "
                "`with run.override(enabled=False):`."
            )
        counts = call.images = _encoded_counts(kwargs) or self.family.tokens_per_image(kwargs, self._config)
        self.links.check(whole=counts is not None)
        if counts is None:
            refuse_merged(kwargs, self.text)
            return  # a prompt without a picture, a later step, or a turn without a new picture
        if (ids := told_by(kwargs)) is None:
            return  # the model itself refuses this
        cache = kwargs.get("past_key_values")
        steered = dict.fromkeys(method.name for method in self._redistribution.by_layer.values())
        if steered or self.pruning.may_drop(counts, call.budget):
            check_growing(cache, "attention redistribution" if steered else "pruning inside the language model")
        self._check_forgetting(call, kwargs.get("mm_encoder_outputs"), cached=cache is not None)
        if (known := call.again) is not None:
            call.tail += ids.shape[1] - known.ids.shape[1]
            call.uncached, call.resumed = known.marks, bool(known.marks)
        tokens = read_prompt(call, kwargs, self.family.image_token(self._config), self.text, self._needs, tuple(steered))
        begin_prompt(call, tokens, counts, ids.device)
        if known is not None and call.prompt is not None:
            call.prompt.chosen, call.prompt.replayed = known.chosen, bool(known.chosen)

    def _check_forgetting(self, call: Call, encoded: Any, cached: bool) -> None:
        """Refuse a stage that forgets tokens in the cache where there is none, or where the prompt has candidates behind it."""
        forgets = self.pruning.cache_stage
        if forgets is not None and (call.tail or (not cached and encoded is not None)):
            raise UsageError(
                f"{forgets.method.name} forgets tokens in the KV cache after prefill, which needs use_cache=True and no "
                "assisted decoding; or turn that stage off (cache_layer=-1)."
            )

    def enter_text(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prompt = call.prompt
        if prompt is None:
            self._refuse_what_the_tower_left(call, kwargs.get("inputs_embeds"))
            if call.past == 0 and call.enabled and kwargs.get("inputs_embeds") is not None:
                self._without_picture(call, kwargs["inputs_embeds"])
            if call.enabled and self.edited and not self.carried:
                self._redistribution.enter_step(call, kwargs.get("past_key_values"))
                call.idle = call.edits.ready and not self.pruning.at
            if not self.pruning.decodes_without_padding(call, kwargs):
                return None
            call.idle = True
            return args, {**kwargs, "attention_mask": None}
        embeddings: Tensor = kwargs["inputs_embeds"]
        self._set_newlines_apart(prompt, embeddings)
        remaining = visible_images(prompt)
        prompt.candidates = [len(index) for index in remaining]
        prompt.entered = list(prompt.candidates)
        self.pruning.begin(call, remaining, prompt.layout.real, prompt.layout.counts)
        visual = sum(len(image) for image in prompt.layout.images)
        call.record = self._begin_record(call, visual, embeddings, hidden=visual - sum(prompt.candidates))
        with timed(call, embeddings.device, "what the tower knew"):
            if self._seen_in_tower and (self._redistribution.needs or self.pruning.may_drop(prompt.candidates, call.budget)):
                look_up_tower(call, self.memory, embeddings)
            if self._needs & {"embeddings", "text_embeddings"}:
                prompt.embeddings = embeddings
            self._redistribution.enter_text(call, embeddings)
        # With padding, the model would make a mask of the whole prompt, [batch, 1, n, n], which no layer would see. Without
        # cache and mask, however, it would take positions with padding for packed sequences, and make a mask for these.
        cached = kwargs.get("past_key_values") is not None or kwargs.get("use_cache", self.text.config.use_cache)
        unseen = (cached or kwargs.get("position_ids") is None) and self.pruning.shortens_at_once(call) and not call.custom
        return (args, {**kwargs, "attention_mask": None}) if unseen else None

    def _without_picture(self, call: Call, embeddings: Tensor) -> None:
        """A prompt without a picture has nothing to prune: it simply runs, and the record says so."""
        call.batch, call.sequence = embeddings.shape[:2]
        if call.sequence > 1:  # guidance runs the last token alone beside the prompt, whose record is what people want
            call.record = self._begin_record(call, 0, embeddings)

    def _begin_record(self, call: Call, visual: int, embeddings: Tensor, hidden: int = 0) -> Prefill:
        record = Prefill(
            batch=call.batch,
            sequence=call.sequence,
            past=call.past,
            visual=visual,
            shape=self._shape,
            itemsize=embeddings.element_size(),
            neutral=self._redistribution.neutral,
            newlines=0 if call.prompt is None or call.prompt.newlines is None else int(call.prompt.newlines.sum()),
            hidden=hidden,
        )
        record.prefill.start = Clock.now(embeddings.device)
        record.tower, self.now.clocks = list(self.now.clocks), ()
        return record

    def _refuse_what_the_tower_left(self, call: Call, embeddings: Tensor | None) -> None:
        """Pictures that were encoded while a method shortened them inside the tower cannot be used un-pruned."""
        inside = self._tower_cut is not None and self._tower_cut.stage.site == "vision"
        if not inside or call.past or embeddings is None:
            return
        if on_host(embeddings[..., 0].isnan().any()):
            raise UsageError(
                f"the pictures were encoded while {self.recipe} dropped patches of them inside the vision tower, and "
                "run.enabled is False now: encode them again."
            )

    def _set_newlines_apart(self, prompt: Prompt, embeddings: Tensor) -> None:
        """Row separators are among an image's placeholders but show nothing: they count as text."""
        if self.family.newline is None:
            return
        newline, device = getattr(self.base, self.family.newline), embeddings.device.type
        if torch.is_autocast_enabled(device):  # transformers packs it among features of that dtype
            newline = newline.to(torch.get_autocast_dtype(device))
        prompt.newlines = on_host((embeddings == newline.to(embeddings)).all(dim=-1)) & prompt.tokens.placeholders
        prompt.layout = prompt.layout.without(prompt.newlines)

    def enter_layer(self, index: int, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a decoder layer is given: from a stage on, a shorter sequence. Redistribution records what it edits."""
        changed = None
        if module.training:
            call.recomputes |= _is_recomputed(module)
        if not call.idle and self.pruning.at and index >= self.pruning.at[0]:
            hidden = args[0] if args else kwargs["hidden_states"]
            given = self.pruning.enter_layer(index, module, call, hidden, kwargs)
            if given is not None:
                hidden, kwargs = given
                args, kwargs = changed = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        if call.enabled and index in self.edited and not call.edits.ready:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._redistribution.enter_layer(index, call, hidden, kwargs.get("past_key_values"))
        return (args, carry(kwargs)) if index in self.carried else changed

    def _leave_out_labels(self, call: Call) -> None:
        """A label is predicted from the row before it. Where that row was not computed, the label does not count."""
        alive = call.sections[-1].alive
        if call.sections[-1].rows is None or alive is None:
            return
        lost = 0
        for labels, offset in call.labels:
            missing = ~alive[:, : alive.shape[1] - offset].to(labels.device)
            found = (labels[:, offset:] != IGNORED) & missing
            labels[:, offset:].masked_fill_(found, IGNORED)
            lost += int(on_host(found.sum()))
        if lost and not self._warned_of_labels:
            self._warned_of_labels = True
            warnings.warn(
                f"{lost} label(s) stand directly behind tokens that {self.recipe} dropped, or behind padding: there is nothing "
                f"to predict them from, and they are left out of the loss. Set them to {IGNORED} in your data. (Said once.)",
                stacklevel=2,
            )

    def leave_text(self, call: Call, record: Prefill, output: Any) -> Any:
        hidden: Tensor = output[0]
        if (rows := call.sections[-1].rows) is not None:
            output.last_hidden_state = rows.scatter(hidden, call.sequence)
        for layer in range(self._shape.layers):
            section = call.section_of(layer)
            record.entering.append(call.sequence if section.rows is None else section.rows.rows.shape[1])
            record.stored.append(call.past + call.sequence if section.stored is None else section.stored)
        record.resident, record.peak = list(record.stored), sum(record.stored)
        self.pruning.forget(call, output.get("past_key_values"))  # made by the model itself in a plain call
        record.prefill.end = Clock.now(hidden.device)
        hand_over(output.get("past_key_values"), call.owner)
        self._leave_out_labels(call)
        if not call.recomputes:
            call.edits.inputs.clear()
        if call.edits.text_only is not None:
            call.edits.text_only.close()
        self.contexts.note(record, call.blocks)
        return output


class PerThread(local):
    """What one thread carries from the tower to the prompt."""

    clocks: tuple[Clock, ...] = ()  # of the tower, until the language model takes them


@dataclass(eq=False)
class Uncached:
    """A prompt that is run again for every token, with the same encoded pictures: whose it is, what its caller had said, what
    was chosen, and what redistribution marked. It stays with the pictures."""

    ids: Tensor
    owner: Owner
    enabled: bool
    budget: Budget | None
    chosen: dict[int, Chosen] = field(default_factory=dict)
    marks: dict[int, Any] = field(default_factory=dict)

    def goes_on(self, ids: Tensor) -> bool:
        """Whether `ids` continue the prompt."""
        length = self.ids.shape[1]
        return ids.shape[0] == self.ids.shape[0] and ids.shape[1] > length and torch.equal(ids[:, :length], self.ids)


def told_by(kwargs: dict[str, Any]) -> Tensor | None:
    """`[batch, token]` what tells one prompt from another: ids, or the first numbers of embeddings."""
    ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    return embeddings[..., 0] if ids is None and embeddings is not None else ids


def _encoded_counts(kwargs: dict[str, Any]) -> list[int] | None:
    """Visual tokens of each picture, where `generate` has encoded them already."""
    encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    if encoded is None:
        return None
    if encoded.last_hidden_state is None:  # generate() cuts features up for a chunked prefill, and leaves this out
        raise UsageError(
            "pruning decides over whole pictures, but these features come in pieces, as generate(prefill_chunk_size=…) cuts "
            "them, whether the prompt has one chunk or several: leave prefill_chunk_size out, and pass on what "
            "get_image_features returned as it is."
        )
    return [features.shape[0] for features in encoded.pooler_output]


def _facts(family: Any, base: nn.Module) -> TowerFacts:
    """What methods may know of this very model: its checkpoint may lack what its family usually has."""
    refusal = None if family.tower is None else family.tower.refusal(base)
    return family.facts if refusal is None else replace(family.facts, cls=False, refusal=refusal)


def _as_it_was(tower: TowerPass, index: int, module: nn.Module) -> TowerPass:
    """A pass through the tower, as it was when block `index` was entered for the first time.

    Before transformers 5.23, gradient checkpointing runs a block's hooks again when it recomputes the block.
    """
    if (before := tower.before.get(index)) is not None:
        return before.branch()
    if _is_recomputed(module):
        tower.before[index] = tower.branch()
    return tower


def _is_recomputed(module: nn.Module) -> bool:
    """Whether gradient checkpointing runs a layer again in the backward pass."""
    return module.training and bool(getattr(module, "gradient_checkpointing", False))
