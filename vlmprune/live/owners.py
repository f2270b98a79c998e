"""Which plan a forward pass follows: that of its conversation, that of its images, or the one in force.

A recipe can be replaced while requests run: a conversation goes on under the plan it began with, and a new one follows the new
plan. What only the old plan needed is removed when no conversation follows it any more.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any
from weakref import ReferenceType, ref

from torch import nn

from vlmprune.errors import UsageError
from vlmprune.live.cache import check_same_stages, conversation_layer, hand_over
from vlmprune.live.call import Call
from vlmprune.live.context import now, open_blocks
from vlmprune.live.owner import Owner, encoded_of, features_of, owner_of
from vlmprune.live.plan import Plan
from vlmprune.live.prefill import identity_of
from vlmprune.live.prompt import check_rows
from vlmprune.live.static_cache import check_room
from vlmprune.live.static_step import check_marked, is_step, tokens_of

GONE = (
    "these pictures were encoded while a recipe dropped patches of them inside the vision tower, and that recipe was removed "
    "from the model: encode them again."
)


class Owners:
    """The owners of all conversations of one model.

    Attributes:
        base: the base model.
        current: what owns new conversations, or None.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.current: Owner | None = None
        self._all: list[ReferenceType[Owner]] = []
        self._wrapped = -1, -1  # which thread wrapped the model last, and when

    def add(self, plan: Plan) -> Owner:
        """An owner whose conversations follow `plan`, as long as a reference to it is held."""
        owner = Owner(plan)
        self._all.append(ref(owner))
        return owner

    def follow(self, owner: Owner) -> None:
        """New conversations belong to `owner` from now on."""
        self.current, self._wrapped = owner, (threading.get_ident(), now())

    def alive(self) -> list[Owner]:
        """Owners that something holds: the attachment, a running call, the cache of a conversation, or an open block."""
        found = []
        for find in tuple(self._all):  # no lock: the garbage collector comes here, too, from anywhere
            owner = find()
            if owner is None:
                with suppress(ValueError):  # another has removed it meanwhile
                    self._all.remove(find)
            elif owner.plan is not None:
                found.append(owner)
        return found

    def has(self, owner: Owner | None) -> bool:
        """Whether an owner's plan is one of this model, and was not removed."""
        return owner is not None and owner.plan is not None and owner.plan.base is self.base

    def in_force(self) -> Owner | None:
        """Whose plan is for what begins now: of the innermost block that the caller has open, or the current one. A thread that
        wraps the model inside its own block wants the new plan; what others wrap does not reach into the block."""
        wrapped, number = self._wrapped
        if self.current is not None:
            for block in open_blocks(since=number if wrapped == threading.get_ident() else -1):
                if self.has(block.owner):
                    return block.owner
        return self.current

    def of_conversation(self, cache: Any) -> Owner | None:
        """Whose plan a conversation goes on under."""
        owner = owner_of(cache)
        if self.has(owner):
            return owner
        if self.current is not None:
            check_same_stages(cache, self.current.plan.pruning.at)
            hand_over(cache, self.current)
        return self.current

    def goes_on_alone(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it is a decoding step in a static cache, not compiled, which needs nothing but what is on the cache.

        Raises:
            UsageError: it is, and the conversation began under another recipe, or with other rows, or the cache is full.
        """
        if not is_step(args, kwargs):
            return False
        cache = kwargs["past_key_values"]
        check_room(cache.layers, 1)
        check_rows(conversation_layer(cache), len(tokens_of(args, kwargs)))
        owner = self.of_conversation(cache)
        if owner is not None and owner.plan is not None and owner.plan.contexts.settings.enabled:
            check_marked(cache, owner.plan.redistribution)
        return True

    def of_prompt(self, call: Call, cache: Any, kwargs: dict[str, Any]) -> Owner | None:
        """Whose plan the beginning of a conversation follows: that under which its images were encoded, for the first prompt
        that takes them, for one that is run again, and where only that plan can use them; else the one in force.

        Raises:
            UsageError: the images were shortened by a plan that is gone.
        """
        known = [found for features in features_of(kwargs) if (found := encoded_of(features)) is not None]
        if not known:
            return self.in_force()
        made, first = known[0], not known[0].used
        for one in known:
            one.used = True
        shortened = next((one for one in known if one.shortened), None)
        if cache is None:  # the prompt is run again for every token
            ids = identity_of(kwargs)
            for prompt in made.prompts:
                if ids is not None and self.has(prompt.owner) and prompt.goes_on(ids):
                    call.again = prompt
                    return prompt.owner
        for chosen in (shortened, made if first else None):
            if chosen is not None and self.has(chosen.owner):
                return chosen.owner
        if shortened is not None:
            raise UsageError(GONE)
        return self.in_force()
