"""The judge of `vlmprune.check`: the un-pruned model, computing what a pruned run says that it computed.

It knows no family. It runs the whole prompt and every new token at full length, without a cache, with hooks of torch on the
decoder layers, and with the tokens of the pruned run forced upon it.

    masked    a layer is given the mask that the model made for it, with the columns of dropped tokens hidden from the stage on
    dropped   where there are recurrent layers, for which masking is not dropping: the rows of dropped tokens are cut out
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.live.shells import decoder_inside


@dataclass(frozen=True)
class Answer:
    """New tokens `[batch, step]`, and the logits that gave them `[batch, step, vocabulary]`."""

    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Claim:
    """What a pruned run says that it did.

    Attributes:
        keep: by layer of a stage, `[batch, prompt]` the tokens that the layers from there on see.
        keep_cache: the same for rows behind the prompt.
        merged: by layer, `[1, kept, dim]` what entered it in the pruned run, where that is not the model's own.
        compact: the layers whose stage closes up positions.
        injected: by name, arguments of the text model that are not the model's own: features of a tower from which patches were
            dropped, added between layers (DeepStack).
    """

    keep: Mapping[int, Tensor]
    keep_cache: Mapping[int, Tensor]
    merged: Mapping[int, Tensor] = field(default_factory=dict)
    compact: frozenset[int] = frozenset()
    injected: Mapping[str, Any] = field(default_factory=dict)


class Judge:
    """The un-pruned model under a claim.

    Args:
        model: the model itself.
        inputs: of the prompt.
        steps: how many tokens to generate.
        injects: name of the text model's argument with what it adds to visual tokens between layers, or None.

    Attributes:
        ids, real: `[batch, prompt]` token ids, and which of them are no padding.
        prompt: tokens of the prompt.
        dtype: in which the text model computes.
        text_model: the text model.
        recurrent: it has layers without attention.
        entered: by layer, `[1, row, dim]` what entered it in the run that was watched.
        injected: as in `Claim`, what that run's tower gave; 0 for dropped tokens.
    """

    def __init__(self, model: Any, inputs: dict[str, Any], steps: int, injects: str | None = None) -> None:
        self._model, self._inputs, self._steps, self._injects = model, inputs, steps, injects
        text_model: Any = decoder_inside(model)
        self.text_model, self._layers = text_model, text_model.layers
        self.dtype: torch.dtype = next(self._layers.parameters()).dtype
        self.ids: Any = inputs.get("input_ids")
        ones = torch.ones_like(self.ids) if self.ids is not None else torch.ones(1, 1)
        self.real = inputs.get("attention_mask", ones).bool()
        self.prompt = self.real.shape[1]
        self._attention = [
            next((part for part in layer.modules() if hasattr(part, "is_causal")), None) for layer in self._layers
        ]
        self.recurrent = any(attention is None for attention in self._attention)
        self.entered: dict[int, Tensor] = {}
        self.injected: dict[str, Any] = {}
        self._columns = 0  # of the call under way

    def generate(self, forced: Tensor | None = None, claim: Claim | None = None, shaken: bool = False) -> Answer:
        """Greedy tokens, or forced ones; under a claim, at full length and without a cache.

        Args:
            forced: `[batch, step]` tokens to generate, whatever the logits say.
            claim: what the layers compute under.
            shaken: every number that enters a layer is moved by up to half of the distance to the next one of its dtype, at
                random: what rounding alone does.
        """
        steps = self._steps
        options: dict[str, Any] = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "num_beams": 1}
        if forced is not None:
            options["prefix_allowed_tokens_fn"] = lambda row, ids: [int(forced[row, min(len(ids) - self.prompt, steps - 1)])]
        if claim is None:
            return self._run(options)
        random = torch.Generator(self.text_model.device).manual_seed(0)

        def under(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if shaken:
                args, kwargs = _shaken(args, kwargs, random)
            return (self._cut if self.recurrent else self._mask)(claim, index, args, kwargs) or (args, kwargs)

        give = self.text_model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, **claim.injected}), with_kwargs=True
        )
        with give, self._before_layers(under):
            return self._run({**options, "use_cache": False})

    def _run(self, options: dict[str, Any]) -> Answer:
        output = self._model.generate(**self._inputs, **options, return_dict_in_generate=True, output_logits=True)
        return Answer(output.sequences[:, self.prompt :], torch.stack(output.logits, dim=1).float())

    @contextmanager
    def watch_stages(self, run: Any) -> Iterator[None]:
        """Note what enters the layers of a recipe's stages with the prompt, after the recipe's own hooks."""
        self.entered.clear()

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._injects is not None and kwargs.get(self._injects) is not None:
                self.injected[self._injects] = [part.nan_to_num(posinf=0) for part in kwargs[self._injects]]

        def note(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] > 1 and index not in self.entered and len(hidden) == 1:
                self.entered[index] = hidden.detach().clone()

        # Before the recipe's own hook, which takes these arguments over
        handle = self.text_model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
        with handle, self._before_layers(note):
            yield

    @contextmanager
    def _before_layers(self, hook: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        def bound(index: int) -> Callable[..., Any]:
            return lambda module, args, kwargs: hook(index, args, kwargs)

        handles = [layer.register_forward_pre_hook(bound(index), with_kwargs=True) for index, layer in enumerate(self._layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- a layer under a claim -------------------------------------------------------------------------------------------------

    def _mask(self, claim: Claim, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, given = args[0] if args else kwargs["hidden_states"], kwargs["attention_mask"]
        if index == 0:
            self._columns = hidden.shape[1]
        length = self._columns
        rows = slice(length - hidden.shape[1], length)  # a model may compute the last rows only
        if index in claim.merged:
            hidden = hidden.clone()
            hidden[:, : self.prompt][claim.keep[index].to(hidden.device)] = claim.merged[index][0]
        own = torch.eye(length, dtype=torch.bool, device=hidden.device)
        allowed = self._allowed(index, given, torch.ones_like(own).tril())
        seen = hidden.new_ones(len(hidden), 1, length, length, dtype=torch.bool)
        for queries, masks in ((seen, claim.keep), (seen[:, :, self.prompt :], claim.keep_cache)):
            for stage, mask in masks.items():
                if stage <= index:
                    queries[..., : self.prompt] &= mask[:, None, None, : self.prompt].to(hidden.device)
        allowed = (allowed[:, :, -hidden.shape[1] :] & seen[:, :, rows]) | own[rows]
        kwargs = {**kwargs, "attention_mask": _in_the_form_of(given, allowed, self._form(index), hidden.dtype)}
        if any(stage <= index for stage in claim.compact):
            kwargs["position_embeddings"] = self._closed_up(claim, index, hidden, kwargs)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _allowed(self, index: int, given: Tensor | None, order: Tensor) -> Tensor:
        """`[batch or 1, 1, query, key]` what the model's own mask lets a layer see."""
        if given is None:
            causal = getattr(self._attention[index], "is_causal", True)
            return (order if causal else torch.ones_like(order))[None, None]
        return given if given.dtype == torch.bool else given == 0

    def _form(self, index: int) -> str:
        return str(getattr(self._attention[index], "config", self.text_model.config)._attn_implementation)

    def _closed_up(self, claim: Claim, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        """Rotary embeddings of positions without gaps, where stages before this layer closed them."""
        before, gone = self.real.clone(), torch.zeros_like(self.real)
        for stage in sorted(stage for stage in claim.keep if stage <= index):
            mask = claim.keep[stage].to(before.device)
            gone |= before & ~mask if stage in claim.compact else torch.zeros_like(gone)
            before = mask
        positions = kwargs["position_ids"]
        moved = nn.functional.pad(gone, (0, positions.shape[-1] - gone.shape[1])).long().cumsum(dim=1)
        rotary = next(child for child in self.text_model.children() if hasattr(child, "inv_freq"))
        return rotary(hidden, positions - moved.to(positions.device))

    def _cut(self, claim: Claim, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One sample: rows of dropped tokens are taken out of whatever the layer is given by token."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            self._length = hidden.shape[1]
            self._alive = torch.arange(self._length, device=hidden.device)
        if index in claim.keep:
            wanted = torch.ones(int(self._alive.max()) + 1, dtype=torch.bool, device=hidden.device)
            wanted[: self.prompt] = claim.keep[index][0].to(hidden.device)
            stays = wanted[self._alive]
            hidden, self._alive = hidden[:, stays], self._alive[stays]
            if index in claim.merged:
                prompt = self._alive < self.prompt
                hidden = hidden.clone()
                hidden[:, prompt] = claim.merged[index]
        if not any(stage <= index for stage in (*claim.keep, *claim.keep_cache)):
            return None
        mask, alive = self._forgotten(claim, index, hidden.dtype, kwargs["attention_mask"]), self._alive
        if mask is not None:
            mask = mask[..., alive] if mask.ndim == 2 else mask[..., alive, :][..., alive]
        kwargs = {**kwargs, "attention_mask": mask}
        if any(stage <= index for stage in claim.compact):
            kwargs["position_embeddings"] = self._closed_up(claim, index, hidden, kwargs)
        if (rotary := kwargs.get("position_embeddings")) is not None:
            kwargs["position_embeddings"] = tuple(x[..., alive, :] for x in rotary)
        if isinstance(positions := kwargs.get("position_ids"), Tensor):
            kwargs["position_ids"] = positions[..., alive]
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _forgotten(self, claim: Claim, index: int, dtype: torch.dtype, given: Tensor | None) -> Tensor | None:
        """The mask of a layer, at full length, with what its cache forgot hidden from the rows behind the prompt. The state of
        a recurrent layer forgets nothing."""
        forgets = [mask for stage, mask in claim.keep_cache.items() if stage <= index]
        if not forgets or self._attention[index] is None:
            return given
        order = torch.ones(self._length, self._length, dtype=torch.bool, device=forgets[0].device).tril()
        allowed = self._allowed(index, given, order).clone()
        for mask in forgets:
            allowed[:, :, self.prompt :, : self.prompt] &= mask[:, None, None, : self.prompt]
        return _in_the_form_of(given, allowed, self._form(index), dtype)


def _shaken(args: tuple[Any, ...], kwargs: dict[str, Any], random: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = args[0] if args else kwargs["hidden_states"]
    step = torch.finfo(hidden.dtype).eps / 2
    noise = torch.empty(hidden.shape, device=random.device).uniform_(-step, step, generator=random).to(hidden.device)
    hidden = (hidden.float() * (1 + noise)).to(hidden.dtype)
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _in_the_form_of(given: Tensor | None, allowed: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """A mask as the layer's attention takes it."""
    if implementation == "sdpa" if given is None else given.dtype == torch.bool:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
