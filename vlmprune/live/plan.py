"""A recipe on one model: what is decided beforehand, and what a decoder layer is given.

A forward pass, from hook to hook (`Call` carries the state as an extra keyword argument, which transformers hands down from
the model to every attention function; a `TowerPass` travels through the vision tower in the same way):

    model             how many last tokens are not the prompt's (assisted decoding)       hooks.py
    base model        which plan the call follows; its mask and pictures                  owners.py, prefill.py, prompt.py
    vision tower      attention that methods look at, shorter sequences, features         tower_plan.py, tower.py
    language model    the first section, what the tower recorded, the record              prefill.py
    decoder layers    from the first stage on: choose, drop tokens, open a section        choosing.py, pruning.py, section.py
                      in edited layers: marks, and the edit                               redistribution.py
    language model    rows back in their places; the cache is shortened; the record       prefill.py

`generate` runs the vision tower before the call.

No hook is made here: `attachment.py` puts them on a model, and each asks the call which plan it follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.live.attention import CALL_ARGUMENT
from vlmprune.live.attention_probes import see_attention
from vlmprune.live.call import Call
from vlmprune.live.context import Contexts
from vlmprune.live.decoder import carried, carry, look_at
from vlmprune.live.finder import choose_family
from vlmprune.live.links import Links
from vlmprune.live.parts import check_own_forward
from vlmprune.live.pruning import Pruning, timed
from vlmprune.live.redistribution import Redistribution
from vlmprune.live.refusals import check_edits, check_stages, check_tower
from vlmprune.live.rows import Reduction
from vlmprune.live.sizes import shape_of
from vlmprune.live.tower_plan import TowerPlan, is_recomputed
from vlmprune.methods import Pruner
from vlmprune.recipe import Recipe
from vlmprune.schedule import Budget
from vlmprune.view import BEFORE_THE_STAGE, TowerFacts


class Plan:
    """A recipe on one model.

    Args:
        model: as it was wrapped.
        recipe: what is applied.
        contexts: what callers say about the handle.
        named: a family, or "auto", to use instead of the model's own type.

    Attributes:
        found: what was found in a model of an unknown family; None otherwise.
        pruning, redistribution, tower: what the recipe does in the language model, in its attention, and in the vision tower.
        needs: all probes that methods look at.
        observers, editors: by attention module, what looks at its queries and keys (called with the plan first), and what
            computes some of its rows anew.
        edited: decoder layers whose attention is redistributed.
        kinds: what each decoder layer sees and keeps.
        carried: decoder layers that keep their keyword arguments to themselves, and whose attention must know the call.
        links: finds out if a part was replaced.
        warned_of_labels: whether a user was told that labels do not count.

    Raises:
        UsageError: the recipe cannot be applied to this model. The model was not touched.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, contexts: Contexts, named: str | None = None) -> None:
        self.model, self.recipe, self.contexts = model, recipe, contexts
        self.warned_of_labels = False
        described, self.found = choose_family(model, named)
        decoder = look_at(model, described)
        self.family, self.base, self.language_model, self.layers = (
            decoder.family,
            decoder.base,
            decoder.language_model,
            decoder.layers,
        )
        self.config, self.shape = self.base.config, shape_of(decoder)
        facts = _facts(self.family, self.base)
        self.kinds = decoder.kinds
        recipe = _bound(recipe, facts, self.base)
        self.redistribution = Redistribution(recipe.redistributors, decoder, facts)
        self.pruning = Pruning(recipe, self.family, facts, self.base, self.language_model, self.kinds)
        self.needs = self.redistribution.needs | self.pruning.needs
        self.tower = TowerPlan(self, self.family, self.base, self.language_model, facts, self.pruning, self.needs, contexts)
        check_stages(recipe, decoder, self.pruning.stages)
        check_edits(decoder, self.redistribution)
        if self.tower.looks:
            check_tower(recipe, decoder, facts, self.tower.stage, self.tower.last_block)
        self.edited = frozenset(self.redistribution.by_layer)
        self.observers: dict[nn.Module, list[Callable[..., None]]] = {}
        self.editors: dict[nn.Module, Callable[..., Any]] = {}
        looking = [bound for bound in self.pruning.stages if bound.needs & BEFORE_THE_STAGE]
        for bound in looking:
            observer = partial(_see_attention, layer=bound.stage.layer - 1, needs=bound.needs)
            self.observers.setdefault(self._attention(bound.stage.layer - 1), []).append(observer)
        for module, watcher in self.tower.observers():
            self.observers.setdefault(module, []).append(watcher)
        for index in self.redistribution.routed:
            self.editors[self._attention(index)] = partial(self.redistribution.attend, index)
        self.carried = carried(decoder, (*(bound.stage.layer - 1 for bound in looking), *self.redistribution.routed))
        hooked = [self.layers[index] for kind, index in self.places() if kind == "layer"]
        routed = {**self.observers, **self.editors}
        check_own_forward(self.model, (*hooked, *self.tower.hooked(), *routed))
        self.links = Links(self.base, self.language_model, (*hooked, *self.tower.hooked()), routed, recipe)

    def _attention(self, index: int) -> nn.Module:
        """The attention module of a decoder layer."""
        return self.layers[index].get_submodule(self.family.attention)

    def places(self) -> Iterator[tuple[str, int]]:
        """Where hooks are needed, beside those that every plan has: a kind of module, and its number."""
        first = self.pruning.at[0] if self.pruning.at else len(self.layers)
        for index in sorted({*range(first, len(self.layers)), *self.edited, *self.carried}):
            yield "layer", index
        yield from (("carried", index) for index in sorted(self.carried))
        yield from self.tower.places()

    def may_change(self, images: Sequence[int] | None, budget: Budget | None) -> bool:
        """Whether images with so many tokens (None: of any size) would be computed otherwise than without this plan."""
        return bool(self.edited) or self.pruning.may_drop(images, budget)

    # -- hooks -----------------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def enter_layer(self, index: int, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a decoder layer is given: from a stage on, a shorter sequence. Redistribution records what it edits."""
        changed = None
        if module.training:
            call.recomputes |= is_recomputed(module)
        if not call.idle and self.pruning.at and index >= self.pruning.at[0]:
            hidden = entered = args[0] if args else kwargs["hidden_states"]
            if call.prompt is not None and call.prompt.injections is not None:
                hidden = call.prompt.injections.entering(index, hidden, call.section_of(index - 1).rows)
            if call.section.rows is None or index in self.pruning.at or call.recomputes:
                given = self.pruning.enter_layer(index, module, call, hidden, kwargs)
            else:  # the section is open, and its layers are given the same
                given = hidden, call.section.arguments(index, call, hidden, kwargs, self.pruning.stack)
            if given is None and hidden is not entered:
                given = hidden, kwargs
            if given is not None:
                hidden, kwargs = given
                more = args[1:] if len(args) < 2 or (rows := call.section.rows) is None else _shortened(rows, args[1:])
                args, kwargs = changed = ((hidden, *more), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        if call.enabled and index in self.edited:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.redistribution.enter_layer(index, call, hidden, kwargs.get("past_key_values"))
        return (args, carry(kwargs)) if index in self.carried else changed


def _shortened(rows: Reduction, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a layer is given for each token beside its hidden state: `[batch, token, dim]` tensors among its positional
    arguments."""
    return tuple(rows.gather(x) if isinstance(x, Tensor) else x for x in args)


@torch.compiler.disable
def _see_attention(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    layer: int,
    needs: frozenset[str],
    **kwargs: Any,
) -> None:
    """Observer of the attention before a stage; of prompts only, and not where the choice is made already."""
    call: Call | None = kwargs.get(CALL_ARGUMENT)
    if call is not None and call.prompt is not None and plan.pruning.chooses_at(layer + 1, call, call.prompt):
        if attention_mask is None and not plan.kinds.of[layer].causal:  # then every row sees all
            attention_mask = query.new_ones(1, 1, 1, key.shape[2], dtype=torch.bool).expand(1, 1, query.shape[2], -1)
        with timed(call, query.device, f"attention in layer {layer}"), torch.no_grad():
            see_attention(call, layer, needs, query, key, value, attention_mask, scaling)


def _facts(family: Any, base: nn.Module) -> TowerFacts:
    """Facts about this model that methods may use: its checkpoint may lack what its family usually has."""
    facts: TowerFacts = family.facts
    if family.tower is None:
        return facts
    if (refusal := family.tower.refusal(base)) is not None:
        return replace(facts, cls=False, refusal=refusal)
    return replace(facts, blocks=family.tower.feature_block(base.config) + 1)


def _bound(recipe: Recipe, facts: TowerFacts, base: Any) -> Recipe:
    """The recipe with what its pruning methods name, loaded for this model."""
    name, device = str(getattr(base.config, "_name_or_path", "") or ""), next(base.parameters()).device
    return Recipe(tuple(one.bind(facts, name, device) if isinstance(one, Pruner) else one for one in recipe.methods))
