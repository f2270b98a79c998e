"""The only module that changes a live model: hooks in, hooks out.

A forward pass, from hook to hook (`Call` carries the state as an extra keyword argument, which transformers hands down from
the model to every attention function):

    model             how many of the last tokens are no prompt (assisted decoding)
    vision tower      blocks: attention that methods look at, shorter sequences; projector: what is remembered of each token
    base model        which positions are visual tokens of which picture
    language model    padding, what the tower knew, the clock
    decoder layers    from the first stage on: cut at a stage; shorten masks and rotary embeddings; tell the KV cache
    language model    put the rows back in their places, so that logits have the length of the prompt; shorten the cache
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from vlmprune.adapters.family import has_mrope
from vlmprune.adapters.registry import family_of
from vlmprune.attention import route_attention
from vlmprune.cache import PrunedLayer, check_growing, check_same_cuts
from vlmprune.cost import DecoderShape
from vlmprune.cutting import Cutting, timed
from vlmprune.errors import UsageError
from vlmprune.layout import on_host
from vlmprune.methods import Pruner, Redistributor
from vlmprune.methods.base import TowerPruner
from vlmprune.probes import recall_tower, see_attention
from vlmprune.prompt import by_name, check_mask_goes_on, find_layout, look_at_mask, read_prompt, refuse_merged, visible_pictures
from vlmprune.recipe import Recipe
from vlmprune.run import TUNNEL, Call, Chosen, Clock, Prefill, Report, no_prefill
from vlmprune.schedule import Budget
from vlmprune.steering import Steering
from vlmprune.tower import RowMemory, TowerPass
from vlmprune.view import BEFORE_THE_CUT, FROM_TOWER, Facts


def wrap(model: nn.Module, *methods: Recipe | Pruner | Redistributor | str) -> Run:
    """Prune visual tokens of a loaded Hugging Face VLM, and redistribute its attention, in place and reversibly.

    Args:
        model: a stock model of a supported family, with any weights, dtype and device. It keeps its class and API.
        methods: methods, recipes or recipe strings (`"fastv:layer=2,fraction=0.25"`).

    Returns:
        The handle: `remove()` or leaving a `with` block restores the model bit for bit. Wrapping again replaces,
        also inside the block of an earlier handle, which then has no effect any more.

    Raises:
        UsageError: unknown family or method, a layer the model does not have, or a combination that is not supported; always
            here, before the first token.
    """
    return Run(model, Recipe.of(*methods))


untraced = torch.compiler.disable
"""What hooks do depends on the prompt: `torch.compile` runs them as they are, and compiles what is between them."""


class Run:
    """A wrapped model's handle, in the manner of torch's `RemovableHandle`.

    Attributes:
        model: the wrapped model.
        recipe: what is applied.
        enabled: set to False to run prompts un-pruned without unwrapping.
        last: the record of the last prefill, or None.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.enabled = True
        self.last: Prefill | None = None
        self._undo: list[Callable[[], None]] = []
        self._thread = _PerThread()
        self._memory = RowMemory()
        self._attach()

    # -- what a user does with it ----------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Restore the model. A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        self._thread = _PerThread()
        self._memory.clear()

    def __reduce_ex__(self, protocol: object) -> Any:
        raise UsageError("a wrapped model cannot be copied or pickled: call run.remove() first, and wrap the copy.")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @contextmanager
    def override(self, *, tokens: int | None = None, fraction: float | None = None) -> Iterator[Run]:
        """Another budget for this thread's calls inside the block.

        Raises:
            UsageError: the recipe has several stages, so that one number would be ambiguous; or a budget out of range.
        """
        cutting = [cut for cut in self._cutting.cuts if self._cutting.may_override(cut)]
        if len(cutting) != 1:
            raise UsageError(
                f"override needs a recipe with one stage, found {len(cutting)} ({self.recipe}): wrap again instead."
            )
        budget = Budget(tokens, fraction)
        replace(cutting[0].stage, budget=budget)  # refuses what the stage would refuse
        before, self._thread.budget = self._thread.budget, budget
        try:
            yield self
        finally:
            self._thread.budget = before

    def report(self) -> Report:
        """Numbers of the last prefill.

        Raises:
            UsageError: nothing ran yet.
        """
        if self.last is None:
            raise no_prefill()
        return Report.of(self.last, str(self.recipe))

    # -- attaching -------------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        family = family_of(getattr(self.model, "config", None))
        base: Any = getattr(self.model, "base_model", self.model)
        text: Any = base.get_submodule(family.language_model)
        layers: Any = text.get_submodule(family.layers)
        self._family, self._config, self._base, self._text = family, base.config, base, text
        self._shape = DecoderShape.of(text.config)
        self._facts = _facts(family, base)
        self._steering = Steering(self.recipe.redistributors, family, self._facts, text)
        self._cutting = Cutting(self.recipe, family, self._facts, base, text, len(layers), instead=lambda: self._thread.budget)
        self._plan()
        self._check(len(layers))
        observed: list[tuple[Any, Callable[..., None]]] = []
        for cut in self._cutting.cuts:
            if cut.needs & BEFORE_THE_CUT:
                index = cut.stage.layer - 1
                seer = partial(self._see_attention, index, cut.needs)
                observed.append((layers[index].get_submodule(family.attention), seer))
        if self._uses_tower:
            observed += self._observed_blocks()
        # Nothing can be refused any more: from here on the model changes.
        _replace_earlier_run(base)
        modules = {id(module): module for module, _ in observed}
        editors: dict[int, Any] = {}
        for index in self._steering.routed:
            module = layers[index].get_submodule(family.attention)
            modules[id(module)], editors[id(module)] = module, partial(self._steering.attend, index)
        for name, module in modules.items():
            observers = [observer for seen, observer in observed if seen is module]
            self._undo.append(route_attention(module, observers, editors.get(name)))
        if self._uses_tower:
            self._hook_tower()
        if base is not self.model:
            self._hook(self.model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        self._hook(base.register_forward_pre_hook(self._enter_base, with_kwargs=True))
        self._hook(text.register_forward_pre_hook(self._enter_text, with_kwargs=True))
        for index in range(self._cutting.at[0] if self._cutting.at else len(layers), len(layers)):
            self._hook(layers[index].register_forward_pre_hook(partial(self._enter_layer, index), with_kwargs=True))
        for index in self._steering.by_layer:  # behind the cuts: these layers see what is left
            self._hook(layers[index].register_forward_pre_hook(partial(self._enter_steered, index), with_kwargs=True))
        self._hook(text.register_forward_hook(self._leave_text, with_kwargs=True))

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _plan(self) -> None:
        """What the recipe's methods look at in this model, and where."""
        self._needs = self._steering.needs | self._cutting.needs
        self._seen_in_tower = self._needs & FROM_TOWER
        inside = [cut for cut in self._cutting.cuts if cut.stage.site == "vision" or "flow" in cut.needs]
        self._tower_cut = inside[0] if inside else None
        self._uses_tower = bool(self._seen_in_tower) or self._tower_cut is not None

    def _check(self, layers: int) -> None:
        """Refuse what cannot work, before the model is touched."""
        text_config = self._text.config
        for cut in self._cutting.cuts:
            if cut.stage.layer >= layers:
                raise UsageError(
                    f"{cut.method.name} cuts at layer {cut.stage.layer}, but the model has layers 0 to {layers - 1}: "
                    "choose one."
                )
            if cut.method.positions == "compact" and has_mrope(text_config):
                raise UsageError(
                    f'{cut.method.name}: positions="compact" has no meaning for the M-RoPE of {self._family.name}, whose '
                    'positions are places in the picture: use positions="original".'
                )
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=text_config).layers):
            raise UsageError(
                "the language model has sliding-window layers, whose caches count tokens instead of knowing their places: "
                "pruning them is not supported; load the model with full attention."
            )
        implementation = text_config._attn_implementation
        supported = ["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
        supported += ["flex_attention"] if self._text._supports_flex_attn else []
        if implementation not in supported:
            raise UsageError(
                f"attention implementation {implementation!r} is not supported (supported: {', '.join(supported)}): call "
                'model.set_attn_implementation("sdpa").'
            )
        looking = [cut.method.name for cut in self._cutting.cuts if cut.needs & (BEFORE_THE_CUT | {"attention_of_layer"})]
        if looking and "flash" in implementation:
            raise UsageError(
                f"{looking[0]} looks at attention in the language model, which {implementation!r} does not offer "
                'yet: call model.set_attn_implementation("sdpa").'
            )
        if self._tower_cut is not None and self._tower_cut.stage.site == "vision" and self._last_block() == 0:
            raise UsageError(
                f"{self._tower_cut.method.name} drops patches between blocks of the vision tower, but this model takes its "
                "features from the first one: choose a method that cuts in the language model."
            )
        if self._uses_tower and "flash" in (found := str(self._config.vision_config._attn_implementation)):
            raise UsageError(
                f"{self.recipe} looks at attention in the vision tower, which {found!r} does not offer yet: call "
                'model.set_attn_implementation({"vision_config": "sdpa"}).'
            )

    # -- the vision tower ------------------------------------------------------------------------------------------------

    def _blocks(self) -> Any:
        assert self._family.tower is not None
        return self._base.get_submodule(self._family.tower.blocks)

    def _observed_blocks(self) -> list[tuple[Any, Callable[..., None]]]:
        """The attention modules of the tower that somebody looks at."""
        tower = self._family.tower
        assert tower is not None
        blocks, feature = self._blocks(), tower.feature_block(self._config)
        probes: dict[int, list[str]] = {}
        for name, index in (
            ("attention_from_cls", feature),
            ("attention_from_cls_first", 0),
            ("attention_from_cls_early", max(len(blocks) // 4 - 1, 0)),
            ("attention_from_cls_final", len(blocks) - 1),
            ("tower_keys", feature),
        ):
            if name in self._seen_in_tower:
                probes.setdefault(index, []).append(name)
        if self._tower_cut is not None:
            for index in tower.whole(self._config):
                if index < self._last_block():
                    probes.setdefault(index, [])
        return [
            (blocks[index].get_submodule(tower.attention), partial(self._see_block, index, names))
            for index, names in sorted(probes.items())
        ]

    def _last_block(self) -> int:
        """The block before which the sequence has its final length: what feeds the projector, or in a packed tower its end."""
        assert self._family.tower is not None
        return self._family.tower.feature_block(self._config) + (0 if self._facts.cls else 1)

    def _hook_tower(self) -> None:
        tower = self._family.tower
        assert tower is not None
        blocks, projector = self._blocks(), self._base.get_submodule(tower.projector)
        first = tower.whole(self._config)[0] if self._tower_cut is not None else 0
        self._hook(blocks[first].register_forward_pre_hook(self._begin_tower, with_kwargs=True))
        if self._tower_cut is not None and self._tower_cut.stage.site == "vision":
            for index in range(1, len(blocks)):
                self._hook(blocks[index].register_forward_pre_hook(partial(self._enter_block, index), with_kwargs=True))
            if not self._facts.cls:
                self._hook(projector.register_forward_pre_hook(self._enter_merger))
        self._hook(projector.register_forward_hook(self._leave_projector))

    @untraced
    def _begin_tower(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        lengths = [hidden.shape[1] - 1] if self._facts.cls else kwargs["cu_seqlens"].diff().tolist()
        self._thread.clocks = ()
        cut = self._tower_cut if self.enabled else None
        inside = cut is not None and cut.stage.site == "vision"
        self._thread.tower = TowerPass(
            facts=self._facts,
            last=self._last_block(),
            wanted=self._seen_in_tower,
            pruner=cut.method if cut is not None and isinstance(cut.method, TowerPruner) else None,
            budget=self._cutting.budget_of(cut) if cut is not None and inside else None,
            cuts=inside,
            lengths=lengths,
            views=hidden.shape[0] if self._facts.cls else 1,
            device=hidden.device,
        )

    @untraced
    def _see_block(
        self,
        index: int,
        probes: list[str],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float,
        **_: Any,
    ) -> None:
        """Observer of a block of the tower."""
        tower = self._thread.tower
        with self._in_tower(query.device):
            tower.see(index, query, key, value, scaling)
            for probe in probes:
                tower.note(probe, query, key, scaling)

    @untraced
    def _enter_block(self, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shorten what enters a block of the tower."""
        tower = self._thread.tower
        if tower.pruner is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        with self._in_tower(hidden.device):
            if self._facts.cls:
                hidden = tower.shorten_views(index, hidden)
                mask = tower.mask(self._config.vision_config._attn_implementation, hidden.dtype)
                if len(args) > 1:  # transformers hands the mask over by position
                    return (hidden, mask, *args[2:]), kwargs
                return (hidden,), {**kwargs, "attention_mask": mask}
            hidden = tower.shorten_packed(index, hidden)
            return (hidden, *args[1:]), tower.packed_arguments(kwargs)

    @untraced
    def _enter_merger(self, _: nn.Module, args: tuple[Any, ...]) -> Any:
        tower = self._thread.tower
        return None if tower.pruner is None else (tower.shorten_packed(len(self._blocks()), args[0]), *args[1:])

    @untraced
    def _leave_projector(self, _: nn.Module, args: tuple[Any, ...], features: Tensor) -> Tensor:
        with self._in_tower(features.device):
            return self._remember(args, features)

    def _remember(self, args: tuple[Any, ...], features: Tensor) -> Tensor:
        tower = self._thread.tower
        if self._seen_in_tower and self.enabled:
            # transformers casts features to the dtype of the words they are put among, and so must their names
            among = self._text.get_input_embeddings().weight.dtype
            self._memory.remember(features.flatten(0, -2).to(among), tower.known(features, args[0]))
        if tower.pruner is not None and tower.cuts and on_host(features.isnan().any()):
            raise UsageError(
                "the vision tower made NaN of a picture, which would pass for dropped patches: look at the pixel values, or "
                "load the tower in a dtype with more range (bfloat16, float32)."
            )
        return tower.restore(features)

    @contextmanager
    def _in_tower(self, device: torch.device) -> Iterator[None]:
        """Note the time that looking and shortening inside the tower takes."""
        clock = Clock(start=Clock.now(device), what="inside the vision tower")
        yield
        clock.end = Clock.now(device)
        self._thread.clocks = (*self._thread.clocks, clock)

    # -- attention in the language model ---------------------------------------------------------------------------------

    @untraced
    def _see_attention(
        self,
        layer: int,
        needs: frozenset[str],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float,
        **kwargs: Any,
    ) -> None:
        """Observer of the attention before a cut; prefills only, and not where the choice is made already."""
        call: Call | None = kwargs.get(TUNNEL)
        if call is not None and call.layout is not None and self._cutting.chooses_at(layer + 1, call):
            with timed(call, query.device, f"attention in layer {layer}"):
                see_attention(call, layer, needs, query, key, value, attention_mask, scaling)

    # -- hooks, in the order of a forward pass ---------------------------------------------------------------------------

    @untraced
    def _enter_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # With pictures encoded beforehand, this is generate(), and it asks for the logits of the last prompt token and of
        # everything after it; in a plain call the number means nothing of the kind.
        given = kwargs.get("logits_to_keep", 0)
        asked = given if isinstance(given, int) else 0
        tail = max(asked - 1, 0) if kwargs.get("mm_encoder_outputs") else 0
        return args, {**kwargs, TUNNEL: Call(tail=tail, asked=asked)}

    @untraced
    def _enter_base(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        args, kwargs = (), by_name(self._base, args, kwargs)
        call: Call = kwargs.get(TUNNEL) or Call()
        cache = kwargs.get("past_key_values")
        check_same_cuts(cache, self._cutting.at)
        call.past = cache.get_seq_length() if cache is not None else 0
        look_at_mask(call, kwargs)
        check_mask_goes_on(call, cache)
        if self.enabled:
            self._find_or_leave(call, kwargs)
        return args, {**kwargs, TUNNEL: call}

    def _find_or_leave(self, call: Call, kwargs: dict[str, Any]) -> None:
        """Look for pictures. What cannot be followed is refused only where something would be dropped or redistributed: the
        plain model takes it."""
        try:
            self._find_pictures(call, kwargs)
        except UsageError:
            if self._steering.by_layer or self._cutting.may_drop(call.pictures):
                raise
            look_at_mask(call, kwargs)

    def _find_pictures(self, call: Call, kwargs: dict[str, Any]) -> None:
        if kwargs.get("pixel_values_videos") is not None or (kwargs.get("mm_encoder_outputs") or {}).get("video") is not None:
            raise UsageError("videos are not pruned yet: pass the frames as pictures, or set run.enabled = False.")
        counts = call.pictures = _encoded_counts(kwargs) or self._family.tokens_per_image(kwargs, self._config)
        if counts is None:
            refuse_merged(kwargs, self._text)
            if call.past == 0:
                raise UsageError(
                    "the prompt has no image: there is nothing to prune; give the processor a picture and put its image "
                    "placeholder into the text, or set run.enabled = False for text-only prompts."
                )
            return  # a later step, or a turn without a new picture
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None:
            return  # the model itself refuses this
        cache = kwargs.get("past_key_values")
        steered = dict.fromkeys(method.name for method in self._steering.by_layer.values())
        if steered or self._cutting.may_drop(counts):
            check_growing(cache, "attention redistribution" if steered else "pruning inside the language model")
        told_by: Tensor = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"][..., 0]
        self._replay_uncached(call, told_by, kwargs.get("mm_encoder_outputs"), cached=cache is not None)
        prompt = read_prompt(call, kwargs, self._family.image_token(self._config), self._text, self._needs, tuple(steered))
        find_layout(call, prompt, counts, told_by.device)

    def _replay_uncached(self, call: Call, ids: Tensor, encoded: Any, cached: bool) -> None:
        """Generation without a cache runs the whole prompt again for every token, with the same encoded pictures: the choice
        made at the first token stays."""
        forgets = self._cutting.cache_cut
        if forgets is not None and (call.tail or (not cached and encoded is not None)):
            raise UsageError(
                f"{forgets.method.name} forgets tokens in the KV cache after prefill, which needs use_cache=True and no "
                "assisted decoding; or turn that stage off (cache_layer=-1)."
            )
        if cached or encoded is None:
            return
        known = self._thread.uncached
        if known is None or known.encoded is not encoded or not known.is_prefix_of(ids):
            known = self._thread.uncached = _Uncached(encoded, ids, {}, {})
        call.tail += ids.shape[1] - known.ids.shape[1]
        call.chosen, call.replayed = known.chosen, bool(known.chosen)
        call.uncached, call.resumed = known.marks, bool(known.marks)

    @untraced
    def _enter_text(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Call | None = kwargs.get(TUNNEL)
        if call is None or call.layout is None:
            self._refuse_what_the_tower_left(call, kwargs.get("inputs_embeds"))
            if call is None or not self._cutting.decodes_without_padding(call, kwargs):
                return None
            call.idle = True
            return args, {**kwargs, "attention_mask": None}
        embeddings: Tensor = kwargs["inputs_embeds"]
        self._set_newlines_apart(call, embeddings)
        images = call.layout.images
        call.remaining = visible_pictures(call)
        call.alive, call.counts = call.layout.real, list(call.layout.counts)
        call.candidates = list(map(len, call.remaining))
        call.entered = list(call.candidates)
        call.record = Prefill(
            batch=call.batch,
            sequence=call.sequence,
            past=call.past,
            visual=sum(map(len, images)),
            shape=self._shape,
            itemsize=embeddings.element_size(),
            newlines=0 if call.newlines is None else int(call.newlines.sum()),
            hidden=sum(map(len, images)) - sum(call.candidates),
        )
        call.record.prefill.start = Clock.now(embeddings.device)
        call.record.tower, self._thread.clocks = list(self._thread.clocks), ()
        with timed(call, embeddings.device, "what the tower knew"):
            if self._seen_in_tower and (self._steering.needs or self._cutting.may_drop(call.candidates)):
                recall_tower(call, self._memory, embeddings)
            if self._needs & {"embeddings", "text_embeddings"}:
                call.embeddings = embeddings
            self._steering.enter_text(call, embeddings)
        # With padding, the model would make a mask of the whole prompt, [batch, 1, n, n], which no layer would see. Without
        # cache and mask, however, it would take positions with padding for packed sequences, and make a mask for these.
        cached = kwargs.get("past_key_values") is not None or kwargs.get("use_cache", self._text.config.use_cache)
        unseen = (cached or kwargs.get("position_ids") is None) and self._cutting.shortens_at_once(call) and not call.custom
        return (args, {**kwargs, "attention_mask": None}) if unseen else None

    @untraced
    def _enter_steered(self, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call: Call | None = kwargs.get(TUNNEL)
        if call is not None and self.enabled:
            self._steering.enter_layer(index, call, args[0] if args else kwargs["hidden_states"], kwargs.get("past_key_values"))

    def _refuse_what_the_tower_left(self, call: Call | None, embeddings: Tensor | None) -> None:
        """Pictures that were encoded while a method shortened them inside the tower cannot be used un-pruned."""
        inside = self._tower_cut is not None and self._tower_cut.stage.site == "vision"
        if self.enabled or not inside or call is None or call.past or embeddings is None:
            return
        if on_host(embeddings[..., 0].isnan().any()):
            raise UsageError(
                f"the pictures were encoded while {self.recipe} dropped patches of them inside the vision tower, and "
                "run.enabled is False now: encode them again."
            )

    def _set_newlines_apart(self, call: Call, embeddings: Tensor) -> None:
        """Row separators stand among a picture's placeholders but show nothing: they count as text."""
        if self._family.newline is None:
            return
        assert call.layout is not None
        assert call.prompt is not None
        newline, device = getattr(self._base, self._family.newline), embeddings.device.type
        if torch.is_autocast_enabled(device):  # transformers packs it among features of that dtype
            newline = newline.to(torch.get_autocast_dtype(device))
        call.newlines = on_host((embeddings == newline.to(embeddings)).all(dim=-1)) & call.prompt.placeholders
        call.layout = call.layout.without(call.newlines)

    def _enter_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Call | None = kwargs.get(TUNNEL)
        return None if call is None or call.idle else self._at_layer(index, module, call, args, kwargs)

    @untraced
    def _at_layer(self, index: int, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        if call.layout is not None:
            hidden = self._cutting.shorten(index, module, call, hidden, kwargs)
        if call.reduction is None:
            layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
            if not isinstance(layer, PrunedLayer):
                return None
            every = layer.dense and layer.shift is None and not call.custom
            if hidden.shape[1] == 1 and every and call.layout is None and not call.padded_step:
                # Decoding without padding: every stored entry is visible, no mask is needed.
                return None if kwargs.get("attention_mask") is None else (args, {**kwargs, "attention_mask": None})
        changed = self._cutting.arguments(index, call, hidden, cache, kwargs)
        if args:
            return (hidden, *args[1:]), changed
        return args, {**changed, "hidden_states": hidden}

    def _leave_text(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call: Call | None = kwargs.get(TUNNEL)
        return None if call is None or call.record is None else self._finish(call, call.record, output)

    @untraced
    def _finish(self, call: Call, record: Prefill, output: Any) -> Any:
        hidden: Tensor = output[0]
        if call.reduction is not None:
            output.last_hidden_state = call.reduction.scatter(hidden, call.sequence)
        # Layers before the first cut, and all of them if nothing was cut, ran in full.
        full = self._shape.layers - len(record.entering)
        record.entering[:0] = [call.sequence] * full
        record.stored[:0] = [call.past + call.sequence] * full
        record.resident, record.peak = list(record.stored), sum(record.stored)
        self._cutting.forget(call, output.get("past_key_values"))  # made by the model itself in a plain call
        record.prefill.end = Clock.now(hidden.device)
        self.last = record
        return output


class _PerThread(local):
    """What one thread carries from call to call."""

    tower: TowerPass
    clocks: tuple[Clock, ...] = ()  # of the tower, until the language model takes them
    budget: Budget | None = None  # inside `override`
    uncached: _Uncached | None = None


@dataclass(eq=False)
class _Uncached:
    """What was chosen for a prompt that is run without a cache, and what redistribution marked."""

    encoded: Any
    ids: Tensor
    chosen: dict[int, Chosen]
    marks: dict[int, Any]

    def is_prefix_of(self, ids: Tensor) -> bool:
        length = self.ids.shape[1]
        return ids.shape[0] == self.ids.shape[0] and ids.shape[1] > length and torch.equal(ids[:, :length], self.ids)


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


def _facts(family: Any, base: nn.Module) -> Facts:
    """What methods may know of this very model: its checkpoint may lack what its family usually has."""
    refusal = None if family.tower is None else family.tower.refusal(base)
    return family.facts if refusal is None else replace(family.facts, cls=False, refusal=refusal)


def _replace_earlier_run(base: nn.Module) -> None:
    for hook in list(base._forward_pre_hooks.values()):
        earlier = getattr(hook, "__self__", None)
        if isinstance(earlier, Run):
            earlier.remove()
