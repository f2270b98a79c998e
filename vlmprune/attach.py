"""The only module that touches a live model: hooks in, hooks out.

A forward pass, from hook to hook (`Call` carries the state as an extra keyword argument, which transformers hands down from
the model to every attention function):

    model             how many of the last tokens are no prompt (assisted decoding)
    base model        which positions are visual tokens of which picture
    language model    padding, probes of the vision tower, the clock
    decoder layers    from the first stage on: cut at a stage; shorten masks and rotary embeddings; tell the KV cache
    language model    put the rows back in their places, so that logits have the length of the prompt
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from vlmprune.adapters.registry import family_of
from vlmprune.attention import observe, pruned_mask
from vlmprune.cache import PrunedLayer, check_same_cuts, pruned_layer
from vlmprune.cost import DecoderShape
from vlmprune.errors import UsageError
from vlmprune.kernels.attention_mass import attention_mass
from vlmprune.layout import Layout, group_by_size, real_tokens
from vlmprune.methods import Pruner
from vlmprune.probes import BEFORE_THE_CUT, ClsMemory, attention_ahead, build_view, see_attention
from vlmprune.recipe import Recipe
from vlmprune.reduction import Reduction
from vlmprune.run import Call, Clock, Kept, Prefill, Report, no_prefill
from vlmprune.schedule import Budget

TUNNEL = "vlmprune"
"""Name of the keyword argument that carries the `Call`."""


def wrap(model: nn.Module, *methods: Recipe | Pruner | str) -> Run:
    """Prune visual tokens of a loaded Hugging Face VLM, in place and reversibly.

    Args:
        model: a stock model of a supported family, with any weights, dtype and device. It keeps its class and API.
        methods: methods, recipes or recipe strings (`"fastv:layer=2,fraction=0.25"`).

    Returns:
        The handle: `remove()` or leaving a `with` block restores the model bit for bit. Wrapping again replaces.

    Raises:
        UsageError: unknown family or method, a layer the model does not have, or a combination that is not supported; always
            here, before the first token.
    """
    return Run(model, Recipe.of(*methods))


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
        self._budget: Budget | None = None
        self._cuts = recipe.cuts()
        self._layers = tuple(stage.layer for stage, _ in self._cuts)
        self._needs = frozenset().union(*(method.needs for _, method in self._cuts))
        self._undo: list[Callable[[], None]] = []
        self._thread = _PerThread()
        self._cls = ClsMemory()
        self._attach()

    # -- what a user does with it ----------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Restore the model. A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        self._thread = _PerThread()
        self._cls.clear()

    def __reduce_ex__(self, protocol: object) -> Any:
        raise UsageError("a wrapped model cannot be copied or pickled: call run.remove() first, and wrap the copy.")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @contextmanager
    def override(self, *, tokens: int | None = None, fraction: float | None = None) -> Iterator[Run]:
        """Another budget for the calls inside the block.

        Raises:
            UsageError: the recipe has several stages, so that one number would be ambiguous; or a budget out of range.
        """
        if len(self._cuts) != 1:
            raise UsageError(
                f"override needs a recipe with one stage, found {len(self._cuts)} ({self.recipe}): wrap again instead."
            )
        before, self._budget = self._budget, Budget(tokens, fraction)
        try:
            yield self
        finally:
            self._budget = before

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
        self._family, self._config = family, base.config
        self._shape = DecoderShape.of(text.config)
        self._text_config = text.config
        self._check(len(layers), text.config)
        observed: list[tuple[Any, Callable[..., None]]] = []
        for stage, method in self._cuts:
            if method.needs & BEFORE_THE_CUT:
                index = stage.layer - 1
                seer = partial(self._see_attention, index, method.needs)
                observed.append((layers[index].get_submodule(family.attention), seer))
        if "attention_from_cls" in self._needs:
            tower = _tower_with_cls(family, base)
            block = base.get_submodule(tower.blocks)[tower.feature_block(base.config)]
            observed.append((block.get_submodule(tower.attention), self._see_cls))
        # Nothing can be refused any more: from here on the model changes.
        _replace_earlier_run(base)
        self._undo += [observe(module, observer) for module, observer in observed]
        if "attention_from_cls" in self._needs:
            self._hook(base.get_submodule(tower.projector).register_forward_hook(self._leave_projector))
        if base is not self.model:
            self._hook(self.model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        self._hook(base.register_forward_pre_hook(self._enter_base, with_kwargs=True))
        self._hook(text.register_forward_pre_hook(self._enter_text, with_kwargs=True))
        for index in range(self._layers[0], len(layers)):
            self._hook(layers[index].register_forward_pre_hook(partial(self._enter_layer, index), with_kwargs=True))
        self._hook(text.register_forward_hook(self._leave_text, with_kwargs=True))

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _check(self, layers: int, text_config: Any) -> None:
        """Refuse what cannot work, before the model is touched."""
        for stage, method in self._cuts:
            if stage.layer >= layers:
                raise UsageError(
                    f"{method.name} cuts at layer {stage.layer}, but the model has layers 0 to {layers - 1}: choose one."
                )
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=text_config).layers):
            raise UsageError(
                "the language model has sliding-window layers, whose caches count tokens instead of knowing their places: "
                "pruning them is not supported; load the model with full attention."
            )
        implementation = text_config._attn_implementation
        supported = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
        if implementation not in supported:
            raise UsageError(
                f"attention implementation {implementation!r} is not supported (supported: {', '.join(supported)}): call "
                'model.set_attn_implementation("sdpa").'
            )
        looking = [method.name for method in self.recipe.methods if method.needs & (BEFORE_THE_CUT | {"attention_of_layer"})]
        if looking and "flash" in implementation:
            raise UsageError(
                f"{looking[0]} looks at attention in the language model, which {implementation!r} does not offer "
                'yet: call model.set_attn_implementation("sdpa").'
            )

    # -- probes ----------------------------------------------------------------------------------------------------------

    def _see_attention(
        self,
        layer: int,
        needs: frozenset[str],
        query: Tensor,
        key: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> None:
        """Observer of the attention before a cut; prefills only, and not where the choice is made already."""
        call: Call | None = kwargs.get(TUNNEL)
        if call is not None and call.layout is not None and layer + 1 not in call.chosen:
            with _timed(call, query.device):
                see_attention(call, layer, needs, query, key, attention_mask, scaling)

    def _see_cls(self, query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any) -> None:
        """Observer of the tower's block: what CLS pays to all but itself."""
        self._thread.cls = attention_mass(query[:, :, :1], key, scaling)[:, :, 1:]

    def _leave_projector(self, _: nn.Module, args: tuple[Any, ...], features: Tensor) -> None:
        self._cls.remember(features, self._thread.cls)

    # -- hooks, in the order of a forward pass ---------------------------------------------------------------------------

    def _enter_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # With pictures encoded beforehand, this is generate(), and it asks for the logits of the last prompt token and of
        # everything after it; in a plain call the number means nothing of the kind.
        last = kwargs.get("logits_to_keep", 0) if kwargs.get("mm_encoder_outputs") else 0
        return args, {**kwargs, TUNNEL: Call(tail=last - 1 if isinstance(last, int) and last > 1 else 0)}

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
        call.ids = ids
        call.batch, call.sequence = ids.shape
        real = real_tokens(call.mask, call.batch, call.sequence, ids.device)
        call.layout = Layout.find(ids == self._family.image_token(self._config), counts, real)
        call.remaining = [torch.arange(len(image), device=ids.device) for image in call.layout.images]
        place = torch.arange(call.sequence, device=ids.device)
        call.prompt_end = (place * real).amax(dim=1) - call.tail
        self._replay_uncached(call, kwargs.get("mm_encoder_outputs"), cached=kwargs.get("past_key_values") is not None)

    def _replay_uncached(self, call: Call, encoded: Any, cached: bool) -> None:
        """Generation without a cache runs the whole prompt again for every token, with the same encoded pictures: the choice
        made at the first token stays."""
        if cached or encoded is None:
            return
        assert call.ids is not None
        known = self._thread.uncached
        if known is None or known.encoded is not encoded or not known.is_prefix_of(call.ids):
            known = self._thread.uncached = _Uncached(encoded, call.ids, {})
        call.chosen = known.chosen

    def _enter_text(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call: Call | None = kwargs.get(TUNNEL)
        if call is None or call.layout is None:
            return
        embeddings: Tensor = kwargs["inputs_embeds"]
        call.record = Prefill(
            batch=call.batch,
            sequence=call.sequence,
            past=call.past,
            visual=sum(map(len, call.layout.images)),
            shape=self._shape,
            itemsize=embeddings.element_size(),
        )
        call.record.prefill.start = Clock.now(embeddings.device)
        if "attention_from_cls" in self._needs:
            with _timed(call, embeddings.device):
                call.cls = self._cls.recall(call.layout, embeddings)

    def _enter_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Call | None = kwargs.get(TUNNEL)
        if call is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        if call.layout is not None:
            hidden = self._cut(index, module, call, hidden, kwargs)
        if call.reduction is None:
            layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
            if not isinstance(layer, PrunedLayer):
                return None
            if hidden.shape[1] == 1 and layer.dense and call.layout is None:
                # Decoding without padding: every stored entry is visible, no mask is needed.
                return None if kwargs.get("attention_mask") is None else (args, {**kwargs, "attention_mask": None})
        changed = self._shortened(index, call, hidden, cache, kwargs)
        if args:
            return (hidden, *args[1:]), changed
        return args, {**changed, "hidden_states": hidden}

    def _shortened(self, index: int, call: Call, hidden: Tensor, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer that computes fewer tokens than the conversation has."""
        batch, device, implementation = hidden.shape[0], hidden.device, self._text_config._attn_implementation
        group = sum(layer <= index for layer in self._layers)  # masks are equal in all layers between two stages
        layer = None
        if cache is not None:
            layer = pruned_layer(cache, index, self._layers, call.mask)
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
            return {**kwargs, "attention_mask": call.masks[group], "position_ids": None}
        rows = call.reduction or _every_row(call, hidden)
        slots, valid, dense = rows.rows.to(device) + call.past, rows.valid.to(device), rows.dense
        keys, keys_valid, keys_dense = slots, valid, dense
        if layer is not None:
            keys, keys_valid, keys_dense = layer.announce(slots, valid, dense, call.sequence or hidden.shape[1])
        if group not in call.masks:
            call.masks[group] = pruned_mask(slots, valid, keys, keys_valid, keys_dense, implementation, hidden.dtype)
        if call.record is not None:
            call.record.entering.append(hidden.shape[1])
            call.record.stored.append(keys.shape[1])
        # position_ids serve only flash attention's search for packed sequences, which gaps would mislead.
        changed = {**kwargs, "attention_mask": call.masks[group], "position_ids": None}
        if call.reduction is not None:
            changed["position_embeddings"] = _rotary(call, kwargs["position_embeddings"])
        return changed

    def _leave_text(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call: Call | None = kwargs.get(TUNNEL)
        if call is None or call.record is None:
            return None
        hidden: Tensor = output[0]
        record = call.record
        if call.reduction is not None:
            output.last_hidden_state = call.reduction.scatter(hidden, call.sequence)
        # Layers before the first cut, and all of them if nothing was cut, ran in full.
        full = self._shape.layers - len(record.entering)
        record.entering[:0] = [call.sequence] * full
        record.stored[:0] = [call.past + call.sequence] * full
        record.prefill.end = Clock.now(hidden.device)
        self.last = record
        return output

    # -- the cut ---------------------------------------------------------------------------------------------------------

    def _cut(self, index: int, module: nn.Module, call: Call, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """At a stage: let its method choose, and shorten the hidden states `[batch, token, dim]`."""
        for stage, method in self._cuts:
            if stage.layer == index:
                with _timed(call, hidden.device):
                    if index not in call.chosen:
                        rotary, stored = kwargs["position_embeddings"], kwargs.get("past_key_values")
                        now = rotary if call.reduction is None else _rotary(call, rotary)
                        ahead = partial(attention_ahead, call, self._family, module, index, hidden, now, stored)
                        budget = self._budget or stage.budget
                        call.chosen[index] = self._choose(index, method, budget, call, hidden, cache(ahead))
                    return self._shorten(index, method, call, hidden)
        return hidden

    def _shorten(self, index: int, method: Pruner, call: Call, hidden: Tensor) -> Tensor:
        """Drop what was not chosen."""
        assert call.layout is not None
        assert call.record is not None
        images = call.layout.images
        before = sum(map(len, call.remaining))
        call.remaining = call.chosen[index]
        call.record.kept += [
            Kept(index, method.name, image.sample, image.ordinal, len(image), remaining)
            for image, remaining in zip(images, call.remaining, strict=True)
        ]
        alive = call.layout.real.clone()
        for image, remaining in zip(images, call.remaining, strict=True):
            alive[image.sample, image.positions] = False
            alive[image.sample, image.positions[remaining]] = True
        call.record.keep[index] = alive
        if sum(map(len, call.remaining)) == before:
            return hidden  # everything kept: the layer runs exactly as without us
        shorter = Reduction.keeping(alive)
        hidden = shorter.after(call.reduction).gather(hidden)
        call.reduction = shorter
        call.rotary.clear()
        return hidden

    def _choose(
        self, index: int, method: Pruner, budget: Budget, call: Call, hidden: Tensor, ahead: Callable[[], Tensor]
    ) -> list[Tensor]:
        """What remains of every picture after this stage; pictures of one size are decided together."""
        assert call.layout is not None
        images, remaining = call.layout.images, list(call.remaining)
        for group in group_by_size([(len(image), len(left)) for image, left in zip(images, remaining, strict=True)]):
            original, visual = len(images[group[0]]), len(remaining[group[0]])
            keep = min(budget.resolve(original), visual)
            if keep == visual:
                continue
            if keep == 0:
                chosen = remaining[group[0]].new_empty(len(group), 0)
            else:
                chosen = method.select(build_view(call, index, method.needs, group, hidden, ahead), keep)
                if chosen.shape != (len(group), keep):
                    raise RuntimeError(
                        f"{method.name}.select returned shape {tuple(chosen.shape)}, expected {(len(group), keep)}."
                    )
            for image, row in zip(group, chosen, strict=True):
                remaining[image] = remaining[image][row.to(remaining[image].device)]
        return remaining


class _PerThread(local):
    """What one thread carries from call to call."""

    cls: Tensor  # [picture, head, visual] from a tower block to the projector
    uncached: _Uncached | None = None


@dataclass(eq=False)
class _Uncached:
    """What was chosen for a prompt that is run without a cache."""

    encoded: Any
    ids: Tensor
    chosen: dict[int, list[Tensor]]

    def is_prefix_of(self, ids: Tensor) -> bool:
        length = self.ids.shape[1]
        return ids.shape[0] == self.ids.shape[0] and ids.shape[1] > length and torch.equal(ids[:, :length], self.ids)


@contextmanager
def _timed(call: Call, device: torch.device) -> Iterator[None]:
    clock = Clock(start=Clock.now(device))
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
        call.every_row = Reduction(rows, valid, call.mask is None or bool(valid.all()))
    return call.every_row


def _rotary(call: Call, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The rotary embeddings of the surviving rows; some models hand different ones to different layers."""
    assert call.reduction is not None
    name = id(embeddings[0])
    if name not in call.rotary:  # the full ones are held with their name, so that it cannot be given to another tensor
        call.rotary[name] = (embeddings, tuple(call.reduction.gather(part) for part in embeddings))
    return call.rotary[name][1]


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


def _tower_with_cls(family: Any, base: nn.Module) -> Any:
    reason = "its vision tower has no CLS token" if family.tower is None else family.tower.refusal(base)
    if reason is not None:
        raise UsageError(
            f"this {family.name} model has no usable CLS attention: {reason}; choose a method that does not need it."
        )
    return family.tower


def _replace_earlier_run(base: nn.Module) -> None:
    for hook in list(base._forward_pre_hooks.values()):
        earlier = getattr(hook, "__self__", None)
        if isinstance(earlier, Run):
            earlier.remove()
