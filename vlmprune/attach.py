"""The only module that touches a live model: hooks in, hooks out.

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
from functools import cache, partial
from itertools import groupby
from threading import local
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from vlmprune.adapters.family import has_mrope
from vlmprune.adapters.registry import family_of
from vlmprune.attention import pruned_mask, route_attention
from vlmprune.cache import PrunedLayer, check_same_cuts, keep_only, pruned_layer
from vlmprune.cost import DecoderShape
from vlmprune.errors import UsageError
from vlmprune.layout import Layout, Prompt, group_by_size, on_device, on_host, real_tokens
from vlmprune.methods import Choice, Pruner, Redistributor
from vlmprune.methods.base import TowerPruner
from vlmprune.probes import Part, Tools, attention_ahead, build_view, recall_tower, rows_now, see_attention
from vlmprune.recipe import Recipe
from vlmprune.reduction import Reduction
from vlmprune.run import TUNNEL, Call, Chosen, Clock, Kept, Prefill, Report, no_prefill
from vlmprune.schedule import Budget, Stage, share
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
        cutting = [cut for cut in self._cuts if self._may_override(cut)]
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
        self._plan()
        self._check(len(layers))
        observed: list[tuple[Any, Callable[..., None]]] = []
        for cut in self._cuts:
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
        for index in range(self._layers[0] if self._layers else len(layers), len(layers)):
            self._hook(layers[index].register_forward_pre_hook(partial(self._enter_layer, index), with_kwargs=True))
        for index in self._steering.by_layer:  # behind the cuts: these layers see what is left
            self._hook(layers[index].register_forward_pre_hook(partial(self._enter_steered, index), with_kwargs=True))
        self._hook(text.register_forward_hook(self._leave_text, with_kwargs=True))

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _plan(self) -> None:
        """The recipe's stages for this model, and what they ask of it."""
        self._cuts = []
        for stage, method in self.recipe.cuts(self._facts):
            needs = method.needs_at(stage) if stage.site == "llm" else frozenset()
            if stage.site == "vision" or (method.per_view and self._facts.crops):
                needs |= {"cell"}  # brings with it which view a token belongs to, and that this tower made it
            variant = method.variant(self._facts)
            self._cuts.append(_Cut(stage, method, needs, f"{method.name} ({variant})" if variant else method.name))
        self._layers = tuple(sorted({cut.stage.layer for cut in self._cuts}))
        self._cache_cut = next((cut for cut in self._cuts if cut.stage.site == "cache"), None)
        self._needs: frozenset[str] = self._steering.needs.union(*(cut.needs for cut in self._cuts))
        self._seen_in_tower = self._needs & FROM_TOWER
        inside = [cut for cut in self._cuts if cut.stage.site == "vision" or "flow" in cut.needs]
        self._tower_cut = inside[0] if inside else None
        self._uses_tower = bool(self._seen_in_tower) or self._tower_cut is not None

    def _check(self, layers: int) -> None:
        """Refuse what cannot work, before the model is touched."""
        text_config = self._text.config
        for cut in self._cuts:
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
        looking = [cut.method.name for cut in self._cuts if cut.needs & (BEFORE_THE_CUT | {"attention_of_layer"})]
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
            budget=self._budget_of(cut) if cut is not None and inside else None,
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
        if call is not None and call.layout is not None and not call.replayed:
            with _timed(call, query.device, f"attention in layer {layer}"):
                see_attention(call, layer, needs, query, key, value, attention_mask, scaling)

    # -- hooks, in the order of a forward pass ---------------------------------------------------------------------------

    @untraced
    def _enter_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # With pictures encoded beforehand, this is generate(), and it asks for the logits of the last prompt token and of
        # everything after it; in a plain call the number means nothing of the kind.
        last = kwargs.get("logits_to_keep", 0) if kwargs.get("mm_encoder_outputs") else 0
        asked = kwargs.get("logits_to_keep", 0)
        tail = last - 1 if isinstance(last, int) and last > 1 else 0
        return args, {**kwargs, TUNNEL: Call(tail=tail, asked=asked if isinstance(asked, int) else 0)}

    @untraced
    def _enter_base(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        call: Call = kwargs.get(TUNNEL) or Call()
        cache = kwargs.get("past_key_values")
        check_same_cuts(cache, self._layers)
        call.past = cache.get_seq_length() if cache is not None else 0
        mask = kwargs.get("attention_mask")
        call.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if self.enabled:
            self._find_pictures(call, args, kwargs)
        return args, {**kwargs, TUNNEL: call}

    def _find_pictures(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("pixel_values_videos") is not None or (kwargs.get("mm_encoder_outputs") or {}).get("video") is not None:
            raise UsageError("videos are not pruned yet: pass the frames as pictures, or set run.enabled = False.")
        counts = _encoded_counts(kwargs) or self._family.tokens_per_image(kwargs, self._config)
        if counts is None:
            if call.past == 0:
                raise UsageError(
                    "the prompt has no image: there is nothing to prune; give the processor a picture and put its image "
                    "placeholder into the text, or set run.enabled = False for text-only prompts."
                )
            return  # a later step, or a turn without a new picture
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise UsageError("pruning finds pictures by their placeholder ids: pass input_ids, not inputs_embeds.")
        mask = kwargs.get("attention_mask")
        if mask is not None and call.mask is None:
            found = f"{mask.ndim}-D tensor" if isinstance(mask, Tensor) else type(mask).__name__
            raise UsageError(
                f"pruning needs a 2-D attention mask [batch, tokens] or None, found a {found}: static caches and custom masks "
                "are not supported."
            )
        call.batch, call.sequence = ids.shape
        self._replay_uncached(call, ids, kwargs.get("mm_encoder_outputs"), cached=kwargs.get("past_key_values") is not None)
        call.prompt = prompt = Prompt.read(ids, call.mask, self._family.image_token(self._config), call.tail)
        call.layout = Layout.find(prompt.visual, counts, prompt.real, ids.device)
        call.prompt_end = on_device(prompt.end, ids.device)

    def _replay_uncached(self, call: Call, ids: Tensor, encoded: Any, cached: bool) -> None:
        """Generation without a cache runs the whole prompt again for every token, with the same encoded pictures: the choice
        made at the first token stays."""
        if self._cache_cut is not None and (call.tail or (not cached and encoded is not None)):
            raise UsageError(
                f"{self._cache_cut.method.name} forgets tokens in the KV cache after prefill, which needs use_cache=True and "
                "no assisted decoding; or turn that stage off."
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
            if call is None or not self._decodes_without_padding(kwargs):
                return None
            call.idle = True
            return args, {**kwargs, "attention_mask": None}
        embeddings: Tensor = kwargs["inputs_embeds"]
        self._set_newlines_apart(call, embeddings)
        images = call.layout.images
        call.remaining = [torch.arange(len(image), device=image.positions.device) for image in images]
        call.alive, call.counts, call.entered = call.layout.real, list(call.layout.counts), list(map(len, images))
        call.record = Prefill(
            batch=call.batch,
            sequence=call.sequence,
            past=call.past,
            visual=sum(map(len, images)),
            shape=self._shape,
            itemsize=embeddings.element_size(),
            newlines=0 if call.newlines is None else int(call.newlines.sum()),
        )
        call.record.prefill.start = Clock.now(embeddings.device)
        call.record.tower, self._thread.clocks = list(self._thread.clocks), ()
        with _timed(call, embeddings.device, "what the tower knew"):
            if self._seen_in_tower:
                recall_tower(call, self._memory, embeddings)
            if self._needs & {"embeddings", "text_embeddings"}:
                call.embeddings = embeddings
            self._steering.enter_text(call, embeddings)
        # With padding, the model would make a mask of the whole prompt, [batch, 1, n, n], which no layer would see.
        return (args, {**kwargs, "attention_mask": None}) if self._shortens_at_once(call) else None

    def _decodes_without_padding(self, kwargs: dict[str, Any]) -> bool:
        """One token follows a conversation in which every stored entry is visible: no layer needs a mask, nor us."""
        cache = kwargs.get("past_key_values")
        embeddings = kwargs.get("inputs_embeds")
        if not self._layers or cache is None or embeddings is None or embeddings.shape[1] != 1 or not cache.layers:
            return False
        layers = [cache.layers[index] for index in self._layers]  # the others store what one of these does, or everything
        if not all(isinstance(layer, PrunedLayer) and layer.dense and layer.shift is None for layer in layers):
            return False
        return self._layers[0] == 0 or layers[0].unpadded

    def _shortens_at_once(self, call: Call) -> bool:
        """Whether all layers will compute fewer tokens than the prompt has, as far as budgets tell."""
        return any(
            cut.stage.layer == 0
            and cut.stage.site == "llm"
            and not cut.method.adaptive
            and any(self._budget_of(cut).resolve(len(index)) < len(index) for index in call.remaining)
            for cut in self._cuts
        )

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
        newline = getattr(self._base, self._family.newline).to(embeddings)
        call.newlines = on_host((embeddings == newline).all(dim=-1)) & call.prompt.visual
        call.layout = call.layout.without(call.newlines)

    def _enter_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Call | None = kwargs.get(TUNNEL)
        return None if call is None or call.idle else self._at_layer(index, module, call, args, kwargs)

    @untraced
    def _at_layer(self, index: int, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        if call.layout is not None:
            hidden = self._cut_here(index, module, call, hidden, kwargs)
        if call.reduction is None:
            layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
            if not isinstance(layer, PrunedLayer):
                return None
            if hidden.shape[1] == 1 and layer.dense and layer.shift is None and call.layout is None:
                # Decoding without padding: every stored entry is visible, no mask is needed.
                return None if kwargs.get("attention_mask") is None else (args, {**kwargs, "attention_mask": None})
        changed = self._shortened(index, call, hidden, cache, kwargs)
        if args:
            return (hidden, *args[1:]), changed
        return args, {**changed, "hidden_states": hidden}

    def _shortened(self, index: int, call: Call, hidden: Tensor, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer that computes fewer tokens than the conversation has."""
        batch, device, implementation = hidden.shape[0], hidden.device, self._text.config._attn_implementation
        group = self._group(index)
        layer = None
        if cache is not None:
            layer = pruned_layer(cache, index, self._layers, call.mask)
        # position_ids serve only flash attention's search for packed sequences, which gaps would mislead.
        changed = {**kwargs, "position_ids": None, "position_embeddings": self._rotary(index, call, hidden, layer, kwargs)}
        if layer is not None and call.reduction is None and hidden.shape[1] == 1:  # decoding: the cache appends by itself
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
            call.masks[group] = pruned_mask(slots, valid, keys, keys_valid, keys_dense, implementation, hidden.dtype)
        if call.record is not None:
            call.record.entering.append(hidden.shape[1])
            call.record.stored.append(keys.shape[1])
        return {**changed, "attention_mask": call.masks[group]}

    def _group(self, index: int) -> int:
        """Number of the stages up to a layer: masks, and what is stored, are equal in all layers between two stages."""
        return sum(layer <= index for layer in self._layers)

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
        if self._cache_cut is not None and call.reduction is not None:
            self._cut_cache(self._cache_cut, call, output.get("past_key_values"))  # made by the model itself in a plain call
        record.prefill.end = Clock.now(hidden.device)
        self.last = record
        return output

    # -- the cut ---------------------------------------------------------------------------------------------------------

    def _cut_here(self, index: int, module: nn.Module, call: Call, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """At a layer's stages: let their methods choose, and shorten the hidden states `[batch, token, dim]`."""
        for number, cut in enumerate(self._cuts):
            if cut.stage.layer != index or cut.stage.site == "cache":
                continue
            cache_ = kwargs.get("past_key_values")
            layer = cache_.layers[index] if call.past and cache_ is not None else None
            pruned = layer if isinstance(layer, PrunedLayer) else None
            now = partial(self._rotary, index, call, hidden, pruned, kwargs)
            with _timed(call, hidden.device, f"layer {index}"):
                if cut.stage.site == "vision":
                    call.chosen[number] = _left_by_tower(call, hidden)
                    call.entered = list(map(len, call.chosen[number].remaining))
                elif number not in call.chosen:
                    ahead = partial(attention_ahead, call, self._family, module, index, hidden, cache=cache_)
                    tools = Tools(
                        ahead=cache(lambda: _as_the_model(call, hidden.device, lambda: ahead(rotary=now()))),  # noqa: B023
                        rotary=now,
                        norm=partial(_as_the_model, call, hidden.device, self._text.get_submodule(self._family.final_norm)),
                        project=partial(_as_the_model, call, hidden.device, self._projector()),
                    )
                    call.chosen[number] = self._choose(cut, call, hidden, tools)
                hidden = self._shorten(cut, call, call.chosen[number], hidden, kwargs, now)
        return hidden

    def _projector(self) -> Any:
        tower = self._family.tower
        return None if tower is None else self._base.get_submodule(tower.projector).forward  # no hooks: nothing is remembered

    def _budget_of(self, cut: _Cut) -> Budget:
        """The stage's budget, or what stands in its place inside `override`."""
        other = self._thread.budget
        return other if other is not None and self._may_override(cut) else cut.stage.budget

    def _may_override(self, cut: _Cut) -> bool:
        """Not a stage that only merges, or only forgets what others dropped."""
        return len(self._cuts) == 1 or cut.stage.budget.fraction != 1.0

    def _choose(self, cut: _Cut, call: Call, hidden: Tensor, tools: Tools) -> Chosen:
        """What remains of every picture after this stage; pictures of one size are decided together."""
        assert call.layout is not None
        index, method, budget = cut.stage.layer, cut.method, self._budget_of(cut)
        parts = [
            part
            for image, original in enumerate(map(len, call.layout.images))
            for part in _parts(call, image, budget.resolve(original), method.per_view and self._facts.crops and not index)
        ]
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
                chosen = method.select(build_view(call, index, cut.needs, [parts[i] for i in group], hidden, tools), keep)
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

    def _shorten(
        self,
        cut: _Cut,
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
            for image, remaining, features in zip(images, chosen.remaining, chosen.features, strict=True)
        ]
        changed = any(len(now) != len(before) for now, before in zip(chosen.remaining, call.remaining, strict=True))
        before, alive = call.alive, call.alive.clone()
        for image, remaining, left in zip(images, chosen.remaining, call.remaining, strict=True):
            alive[image.sample, image.positions] = False
            alive[image.sample, image.positions[remaining]] = True
            call.counts[image.sample] += len(remaining) - len(left)
        call.remaining = chosen.remaining
        if call.newlines is not None and not cut.method.keeps_newlines and call.record.newlines_kept:
            alive &= ~on_device(call.newlines, alive.device)
            call.counts = (call.counts - call.newlines.sum(axis=1)).tolist()
            call.record.newlines_kept = False
            changed = True
        call.record.keep[layer] = alive
        if not changed:
            return hidden  # everything kept: the layer runs exactly as without us
        if cut.method.positions == "compact":
            moved = (before & ~alive).cumsum(dim=1)
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
        call.steps.rows.clear()  # they are places among what a layer computes
        return hidden

    def _cut_cache(self, cut: _Cut, call: Call, cache_: Any) -> None:
        """After prefill, forget in the layers from the stage's on what the last cut dropped."""
        assert call.alive is not None
        assert call.layout is not None
        assert call.record is not None
        if cache_ is None:
            return
        assert call.prompt is not None
        counts, unpadded = (None, None) if call.past else (call.counts, bool(call.prompt.real.all()))
        last = max(other.stage.layer for other in self._cuts if other.stage.site != "cache")  # from there on it is forgotten
        for _, group in groupby(range(cut.stage.layer, last), self._group):
            layers = {index: pruned_layer(cache_, index, self._layers, call.mask, unpadded) for index in group}
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


@dataclass(frozen=True, eq=False)
class _Cut:
    """One stage of a recipe on this model: its method, what that looks at, and how the report names it."""

    stage: Stage
    method: Pruner
    needs: frozenset[str]
    label: str


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


def _as_the_model(call: Call, device: torch.device, run: Callable[..., Any], *args: Any) -> Any:
    """Run a piece of the model as the model itself does: inside `torch.autocast` if it was called so."""
    enabled, dtype = call.autocast
    with torch.autocast(device.type, dtype=dtype, enabled=enabled):
        return run(*args)


@contextmanager
def _timed(call: Call, device: torch.device, what: str) -> Iterator[None]:
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


def _left_by_tower(call: Call, hidden: Tensor) -> Chosen:
    """What the vision tower left of every picture: the rest are rows of NaN."""
    assert call.layout is not None
    images = call.layout.images
    there = on_host(~torch.cat([hidden[image.sample, image.positions.to(hidden.device), 0] for image in images]).isnan())
    ends = np.cumsum(list(map(len, images)))[:-1]
    remaining = [
        on_device(mine.nonzero()[0], image.positions.device) for mine, image in zip(np.split(there, ends), images, strict=True)
    ]
    return Chosen(remaining, [None] * len(remaining))


def _parts(call: Call, image: int, keep: int, per_view: bool) -> list[Part]:
    """What is decided together of one picture: all of it, or each of its views with its share of the budget."""
    assert call.layout is not None
    index, original, entered = call.remaining[image], len(call.layout.images[image]), call.entered[image]
    if not per_view:
        return [Part(image, index, original, entered, keep)]
    view = call.views[image][:, 0]
    numbers, sizes = np.unique(view[view >= 0], return_counts=True)  # −1: dropped inside the tower
    there = np.arange(original) if len(index) == original else on_host(index)
    left = [on_device(there[view[there] == number], index.device) for number in numbers]
    shares = share(keep, sizes.tolist(), list(map(len, left)))
    return [Part(image, here, size, entered, kept) for here, size, kept in zip(left, sizes.tolist(), shares, strict=True)]


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


def _encoded_counts(kwargs: dict[str, Any]) -> list[int] | None:
    """Visual tokens of each picture, where `generate` has encoded them already."""
    encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    if encoded is None:
        return None
    if encoded.last_hidden_state is None:  # generate() cuts features up for a chunked prefill, and leaves this out
        raise UsageError(
            "where one picture ends and the next begins is unknown, because the encoded features are in pieces: chunked "
            "prefill is not supported (prefill_chunk_size=None); pass on what get_image_features returned as it is."
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
