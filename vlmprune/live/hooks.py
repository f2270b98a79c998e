"""What every hook does, in the order of a forward pass.

Each asks the call, or the pass through the tower, which plan it follows. `attachment.py` puts these hooks on a model, and takes
them away.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any
from weakref import ReferenceType, WeakMethod, ref

import torch
from torch import Tensor, nn

from vlmprune.errors import UsageError
from vlmprune.live import static_step
from vlmprune.live.attention import CALL_ARGUMENT
from vlmprune.live.cache import tokens_in
from vlmprune.live.call import Call
from vlmprune.live.owner import Encoded, Owner
from vlmprune.live.owners import Owners
from vlmprune.live.prefill import begin, enter_prompt, goes_on, leave_prompt
from vlmprune.live.prompt import FED_AGAIN, begins_again, by_name, strange_embeddings
from vlmprune.live.static_step import IMAGES, is_step
from vlmprune.live.tower import TowerPass
from vlmprune.live.tower_plan import enter_pool


class _PerThread(threading.local):
    """What one thread is doing with the model.

    Attributes:
        call: finds the call that is inside the base model, if it is there still.
        tower: the pass that is inside the vision tower, or between it and the projector.
        encoding: the owner of the images that are inside the tower, where they are encoded for a later prompt.
    """

    call: Callable[[], Call | None] = staticmethod(lambda: None)
    tower: TowerPass | None = None
    encoding: Owner | None = None


class Hooks:
    """The hooks of one model.

    Args:
        owners: gives the plan that a call follows.
        watch: finds the function that is given every call, and every pass through the tower, that a backward pass may run
            again.

    Attributes:
        inside, on_the_way: by thread, the call that is in the base model; and the images that were encoded and not used yet.
        shortened: images that were encoded with patches dropped before or inside the tower.
    """

    def __init__(self, owners: Owners, watch: WeakMethod[Callable[[Any], None]]) -> None:
        self.owners, self.base, self._watch = owners, owners.base, watch
        self.inside: dict[int, ReferenceType[Call]] = {}
        self.on_the_way: dict[int, ReferenceType[Any]] = {}
        self.shortened: list[ReferenceType[Any]] = []
        self._thread = _PerThread()

    def _watch_graph(self, state: Any) -> None:
        if (watch := self._watch()) is not None:
            watch(state)

    # -- the model -------------------------------------------------------------------------------------------------------

    def enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the whole model begins."""
        if is_step(args, kwargs):
            return None
        # With images encoded beforehand, this is generate(), and it asks for the logits of the last prompt token and of
        # everything after it; in a plain call the number means nothing of the kind.
        given = kwargs.get("logits_to_keep", 0)
        wanted = given if isinstance(given, int) else 0
        if kwargs.get("mm_encoder_outputs") and not _takes_logits(type(module).forward):
            self._refuse_candidates(module)
        if begins_again(kwargs) and _innermost(type(module), only=module, function="_assisted_decoding") is not None:
            raise UsageError(FED_AGAIN)
        call = Call(tail=max(wanted - 1, 0) if kwargs.get("mm_encoder_outputs") else 0, logits_wanted=wanted)
        if kwargs.get("pixel_values") is not None or kwargs.get("pixel_values_videos") is not None:
            call.generation = _generation(module)
        for name, offset in (("labels", 1), ("shift_labels", 0)):
            if isinstance(labels := kwargs.get(name), Tensor):
                kwargs = {**kwargs, name: labels.clone()}
                call.labels = (*call.labels, (kwargs[name], offset))
        return args, {**kwargs, CALL_ARGUMENT: call}

    def _refuse_candidates(self, module: nn.Module) -> None:
        """Refuse assisted decoding of a model that is not told how many last tokens are no prompt.

        Raises:
            UsageError: the candidates would take part in the choice.
        """
        owner = self.owners.in_force()
        if owner is None or owner.plan is None or not owner.plan.contexts.settings.enabled:
            return
        if _innermost(type(module), only=module, function="_assisted_decoding") is None:
            return
        raise UsageError(
            f"assisted decoding is not supported for {type(module).__name__}: its forward takes no logits_to_keep, which says "
            "where the prompt ends and guessed tokens begin; leave prompt_lookup_num_tokens and assistant_model out."
        )

    def enter_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call enters the base model: whose plan it follows is decided."""
        if self.owners.goes_on_alone(args, kwargs):
            return None
        if args:
            kwargs = by_name(module, args, kwargs)
        call: Call = kwargs.get(CALL_ARGUMENT) or Call()
        cache, me = kwargs.get("past_key_values"), threading.get_ident()
        call.past = tokens_in(cache)
        self.on_the_way.pop(me, None)
        if call.past:
            owner = getattr(cache, "vlmprune", None)
            if owner is None or owner.plan is None or owner.plan.base is not self.base:
                owner = self.owners.of_conversation(cache)
        else:
            owner = self.owners.of_prompt(call, cache, kwargs)
        plan = None if owner is None else owner.plan  # read once: another thread may remove it
        if owner is None or plan is None:
            return (), _without_ours(kwargs)
        self._thread.call = self.inside[me] = ref(call)
        if torch.is_grad_enabled():
            self._watch_graph(call)
        call.owner, call.plan = owner, plan
        if not call.past or not self._only_goes_on(call, cache, kwargs):
            begin(call, kwargs)
        return (), {**kwargs, CALL_ARGUMENT: call}

    def _only_goes_on(self, call: Call, cache: Any, kwargs: dict[str, Any]) -> bool:
        """Whether this is a decoding step, where nothing begins. The caller's settings matter only if layers are edited."""
        ids, mask, plan = kwargs.get("input_ids"), kwargs.get("attention_mask"), call.plan
        if ids is None or ids.shape[1] != 1:
            return False
        if mask is None:
            recorded = getattr(cache.layers[plan.kinds.last], "recorded", None)
            if recorded is not None and not recorded.unpadded:
                return False  # earlier turns hid tokens, so that this one needs a mask
        elif not isinstance(mask, Tensor) or mask.ndim != 2:
            return False
        for name in IMAGES:
            if kwargs.get(name) is not None:
                return False
        for modules, name, child in plan.links.way:
            if modules.get(name) is not child:
                return False
        call.mask = mask
        if plan.edited:
            settings = plan.contexts.settings
            call.enabled, call.budget, call.blocks = settings.enabled, settings.budget, settings.blocks
        return True

    def leave_base(self, *_: Any) -> None:
        """The call is over, or has failed."""
        self._thread.call = _PerThread.call
        self.inside.pop(threading.get_ident(), None)

    def _call_inside(self) -> Call | None:
        """The call that this thread is in, inside the base model. torch runs no hook when Ctrl-C ends a forward pass, so that
        it may be over: then the base model is not on the stack."""
        if (call := self._thread.call()) is None:
            return None
        if _innermost(type(self.base), only=self.base) is not None:
            return call
        self.leave_base()
        return None

    def enter_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call reaches the language model, or this was called directly."""
        call: Call | None = kwargs.get(CALL_ARGUMENT)
        if call is not None:
            plan = call.plan
            if plan is None:
                return None
            if not call.past or call.prompt is not None:
                return enter_prompt(plan, call, args, kwargs)
            if plan.edited and not plan.carried:
                plan.redistribution.enter_step(call, kwargs)
            call.idle = plan.pruning.decodes_without_padding(call, kwargs)
            if call.idle:
                return args, {**kwargs, "attention_mask": None}
            call.idle = call.edits.ready and not plan.pruning.at
            return None if call.idle else goes_on(plan, call, args, kwargs)
        if self.owners.goes_on_alone(args, kwargs):
            return None
        if self._call_inside() is not None:  # the model itself runs it, without what it was given: nothing is pruned
            return None
        if _innermost(type(self.base), only=self.base, function="forward") is not None:
            return None  # this pass began before the hooks were there, in the un-wrapped model
        return None if self._of_another() else self._enter_alone(args, kwargs)

    def _of_another(self) -> bool:
        """Whether it is another model of this kind, with parts of this one, that runs them: then it is on the stack."""
        return _innermost(type(self.base)) not in (None, self.base)

    def _enter_alone(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The language model was called directly, not by the model around it."""
        cache = kwargs.get("past_key_values")
        past = tokens_in(cache)
        owner = self.owners.of_conversation(cache) if past else self.owners.in_force()
        if owner is None:
            return None
        plan, settings = owner.plan, owner.plan.contexts.settings
        changes = settings.enabled and plan.may_change(None, settings.budget)
        if changes and (count := strange_embeddings(kwargs, plan.language_model)):
            raise UsageError(
                f"the language model was called directly with {count} embeddings that are not words; the places of pictures in "
                f"them are unknown: call the whole model to apply {plan.recipe}, or run this call inside "
                "`with run.override(enabled=False):`."
            )
        call = Call(owner, plan, past=past)
        begin(call, kwargs)
        changed = None if kwargs.get("inputs_embeds") is None else enter_prompt(plan, call, args, kwargs)
        args, kwargs = (args, kwargs) if changed is None else changed
        return args, {**kwargs, CALL_ARGUMENT: call}

    # -- the vision tower ------------------------------------------------------------------------------------------------

    def enter_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A pass through the vision tower begins."""
        call = self._call_inside()
        beginning = None if call is not None or self._of_another() else self.owners.in_force()
        owner = beginning if call is None else call.owner
        self._thread.tower = self._thread.encoding = None
        if owner is None:
            return args, _without_ours(kwargs)
        if call is None:
            self._thread.encoding = owner
        if not owner.plan.tower.used:
            return args, _without_ours(kwargs)
        self._thread.tower = tower = owner.plan.tower.begin(call, module, args, kwargs)
        if torch.is_grad_enabled():
            self._watch_graph(tower)
        return args, {**kwargs, CALL_ARGUMENT: tower}

    def leave_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """What the tower returned gets an owner, where it was encoded for a later prompt."""
        tower, owner = self._thread.tower, self._thread.encoding
        self._thread.encoding = None
        if output is None:  # the pass has failed
            self._thread.tower = None
            return
        if owner is not None and hasattr(output, "__dict__"):
            output.vlmprune = made = Encoded(owner, tower is not None and tower.shortens)
            self.on_the_way[threading.get_ident()] = ref(output)
            if made.shortened:
                self.shortened = [found for found in self.shortened if found() is not None] + [ref(output)]
        if tower is not None:
            tower.plan.tower.leave(tower, output)
            self._thread.tower = None if tower.over else tower

    def enter_first_block_alone(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same as `enter_first_block`, of a tower whose blocks take no keyword arguments: this thread's pass."""
        if (tower := self._thread.tower) is not None:
            tower.plan.tower.enter_first_block(tower, args, kwargs)

    def enter_block_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The attention of a block that takes no keyword arguments is given this thread's pass."""
        return None if (tower := self._thread.tower) is None else (args, {**kwargs, CALL_ARGUMENT: tower})

    def enter_merger(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What enters the projector of a packed tower is shortened."""
        tower = self._thread.tower
        return None if tower is None else (tower.plan.tower.enter_merger(tower, args), kwargs)

    def leave_early(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], features: Tensor) -> Any:
        """What leaves a packed tower before its end has the full number of rows again."""
        return None if (tower := self._thread.tower) is None else tower.restore(features)

    def leave_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], features: Tensor) -> Any:
        """What the tower saw of every token is recorded with its features."""
        if (tower := self._thread.tower) is None:
            return None
        left = tower.output is not None
        features = tower.plan.tower.leave_projector(tower, args, features)
        # Not held: a graph that runs blocks again holds the pass, and the output holds that graph.
        tower.output = None
        self._thread.tower = None if left else tower
        return features


def enter_video_pool(ours: Hooks, *_: Any) -> None:
    """Squares of a video's patches become one token each, before the projector."""
    if (tower := ours._thread.tower) is not None:
        enter_pool(tower)


# -- hooks that need nothing but what they are given -------------------------------------------------------------------------


@torch.compiler.disable
def enter_first_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Reads from what enters the tower how many patches each image has."""
    if isinstance(tower := kwargs.get(CALL_ARGUMENT), TowerPass):
        tower.plan.tower.enter_first_block(tower, args, kwargs)


@torch.compiler.disable
def enter_block(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What enters a block of the tower is shortened."""
    tower = kwargs.get(CALL_ARGUMENT)
    return tower.plan.tower.enter_block(index, module, tower, args, kwargs) if isinstance(tower, TowerPass) else None


def enter_layer(
    index: int,
    stored_at: int | None,
    rotary: Callable[..., Any],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What a decoder layer is given. It runs in every layer for every token: nothing is between it and torch."""
    call: Call | None = kwargs.get(CALL_ARGUMENT)
    if call is None:
        return static_step.enter_layer(index, stored_at, rotary, args, kwargs)
    if call.plan is None or (call.idle and (call.edits.ready or index not in call.plan.edited)):
        return None
    return call.plan.enter_layer(index, module, call, args, kwargs)


def leave_language_model(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """What the language model returns for a prompt gets the length of the prompt again."""
    call: Call | None = kwargs.get(CALL_ARGUMENT)
    if call is None or call.record is None:
        return None
    return leave_prompt(call.plan, call, call.record, output)


def _innermost(kind: type, only: Any = None, function: str | None = None) -> Any:
    """The innermost object of a type among those whose methods are on the stack, or None; or that one object `only`; by any
    method, or by `function`. Frames beyond it are not looked at: that would keep what their variables hold."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        matches = found is only if only is not None else type(found) is kind
        if matches and function in (None, frame.f_code.co_name):
            return found
        frame = frame.f_back
    return None


def _generation(model: nn.Module) -> Any:
    """The settings of transformers' `generate` of a model, where it is on the stack, or None. Variables of other functions are
    not looked at: that would keep what they hold."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        theirs = frame.f_code.co_name == "generate" and frame.f_globals.get("__name__", "").startswith("transformers.")
        if theirs and (there := frame.f_locals).get("self") is model:
            return there.get("generation_config")
        frame = frame.f_back
    return None


@cache
def _takes_logits(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in signature(forward).parameters


def _without_ours(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != CALL_ARGUMENT}
