"""The only module that changes a live model: hooks in, hooks out.

Hooks belong to the model, not to a recipe. Each asks the call (or the pass through the tower) which plan it follows, and lets
that plan act. So a recipe can be replaced while requests run: a conversation goes on under the plan it began with, a new one
follows the new plan, and what only the old plan needed goes when nobody follows it any more.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any
from weakref import ReferenceType, WeakSet, finalize, ref

import torch
from torch import Tensor, nn

from vlmprune.errors import UsageError
from vlmprune.live.attention import CALL_ARGUMENT, route_attention
from vlmprune.live.cache import check_same_stages, hand_over
from vlmprune.live.call import Call
from vlmprune.live.context import now, open_blocks
from vlmprune.live.decoder import take
from vlmprune.live.owner import Encoded, Owner, encoded_of, owner_of
from vlmprune.live.plan import Plan, told_by, untraced
from vlmprune.live.prompt import by_name, look_at_mask, strange_embeddings
from vlmprune.live.tower import TowerPass

PATIENCE = 60.0
"""Seconds that removing waits for forward passes of other threads, which cannot go on without their hooks."""
ON_THE_WAY = 2.0
"""Seconds that it waits for pictures which another thread has encoded, and has not used yet."""


GONE = (
    "these pictures were encoded while a recipe dropped patches of them inside the vision tower, and that recipe was removed "
    "from the model: encode them again."
)


class _PerThread(threading.local):
    """What one thread is doing with the model.

    Attributes:
        call: finds the call that is inside the base model, if it is there still.
        tower: the pass that is inside the vision tower, or between it and the projector.
        encoding: the owner of the pictures that are inside the tower, where they are encoded for a later prompt.
    """

    call: Callable[[], Call | None] = staticmethod(lambda: None)
    tower: TowerPass | None = None
    encoding: Owner | None = None


class Attachment:
    """All hooks on one model.

    Attributes:
        current: what owns new conversations, or None.
        sleeps: no plan changes anything, and no block is open: a model that is compiled whole needs no hook, and is compiled
            anew when this changes.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.current: Owner | None = None
        self._owners: list[ReferenceType[Owner]] = []
        self._places: dict[Any, Callable[[], None]] = {}
        self._thread, self._lock = _PerThread(), RLock()
        self._inside: dict[int, ReferenceType[Call]] = {}
        self._on_the_way: dict[int, ReferenceType[Any]] = {}
        self._cut: list[ReferenceType[Any]] = []
        self.sleeps, self._awake = False, 0
        self._wrapped = -1, -1  # which thread wrapped the model last, and when
        self._graphs: WeakSet[Any] = WeakSet()

    def __reduce_ex__(self, protocol: object) -> Any:
        raise UsageError("a wrapped model cannot be copied or pickled: call run.remove() first, and wrap the copy.")

    # -- plans -----------------------------------------------------------------------------------------------------------

    def follow(self, plan: Plan) -> Owner:
        """New conversations follow `plan` from now on."""
        with self._lock:
            self.current = owner = self.join(plan)
            self._wrapped = threading.get_ident(), now()
        self.tidy()
        return owner

    def join(self, plan: Plan) -> Owner:
        """Whoever is given the owner follows `plan`, as long as somebody holds it."""
        owner = Owner(plan)
        with self._lock:
            self._owners.append(ref(owner))
            for name, put in self._wanted(plan):
                if name not in self._places:
                    self._places[name] = put()
        return owner

    def clear(self) -> None:
        """Nobody follows a plan any more, and the model is as it was; where gradient checkpointing will run layers again, the
        hooks wait for that, and go with the graph.

        Raises:
            UsageError: another thread does not leave the model.
        """
        current, self.current = self.current, None  # held until its callers are told
        self._wait()
        for other in self._alive():
            other.plan.contexts.close()
            other.plan = None
        del current
        for find in self._cut:
            if (output := find()) is not None:
                _spoil(output)
        self._cut = []
        self.tidy()

    def _alive(self) -> list[Owner]:
        """Owners that somebody holds: this attachment, a running call, the cache of a conversation, or an open block."""
        return [owner for find in self._owners if (owner := find()) is not None and owner.plan is not None]

    def tidy(self) -> None:
        """Take away the hooks that no plan needs any more."""
        with self._lock:
            alive = self._alive()
            self._owners = [ref(owner) for owner in alive]
            recomputed = {state.plan for state in list(self._graphs) if state.recomputes}
            plans = recomputed.union(owner.plan for owner in alive)
            needed = {name for plan in plans for name, _ in self._wanted(plan)}
            for name in [name for name in self._places if name not in needed]:
                self._places.pop(name)()
            self.sleeps = not self._awake and not any(owner.plan.may_change(None, None) for owner in alive)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While a block is open, hooks act in compiled models, too."""
        with self._lock:
            self._awake, self.sleeps = self._awake + 1, False
        try:
            yield
        finally:
            with self._lock:
                self._awake -= 1
            self.tidy()

    def _watch_graph(self, state: Any) -> None:
        """Note a call, or a pass through the tower, that a backward pass may run again."""
        if torch.is_grad_enabled():
            self._graphs.add(state)
            finalize(state, _graph_gone, ref(self)).atexit = False

    def _wait(self) -> None:
        """Let the forward passes of other threads come to their end: half of one cannot go on without its hooks."""
        begun = time.monotonic()
        while (waited := time.monotonic() - begun) < PATIENCE:
            on_the_way = self._on_the_way if waited < ON_THE_WAY else {}
            if not _of_others(self._inside) and not _of_others(on_the_way):
                return
            time.sleep(0.001)
        raise UsageError(
            f"the hooks cannot be taken away: another thread is inside the model, for {PATIENCE:g} s already; new prompts run "
            "un-pruned from now on; call run.remove() again when that thread has come to its end."
        )

    # -- hooks -----------------------------------------------------------------------------------------------------------

    def _wanted(self, plan: Plan) -> Iterator[tuple[Any, Callable[[], Callable[[], None]]]]:
        """The name of every hook that a plan needs, and what puts it in place and returns what takes it away."""
        if plan.model is not self.base:
            yield ("model", plan.model), partial(self._before, plan.model, self._enter_model)
        yield "base", partial(self._before, self.base, self._enter_base)
        yield "base left", partial(self._after, self.base, self._leave_base, always_call=True)
        yield "text", partial(self._before, plan.text, self._enter_text)
        yield "text left", partial(_after_text, plan.text)
        if plan.family.tower is not None:  # whose pictures they are is decided when they are encoded, also where nobody looks
            yield ("tower", 0), partial(self._put, plan, "tower", 0)
            yield ("tower left", 0), partial(self._put, plan, "tower left", 0)
        for kind, index in plan.places():
            yield (kind, index), partial(self._put, plan, kind, index)
        for module in {**plan.observers, **plan.editors}:
            yield ("attention", module), partial(route_attention, module)

    def _put(self, plan: Plan, kind: str, index: int) -> Callable[[], None]:
        if kind == "layer":
            return _before_layer(plan.layers[index], partial(_enter_layer, index))
        if kind == "carried":
            return _before_layer(plan.layers[index].get_submodule(plan.family.attention), take)
        tower = plan.family.tower
        assert tower is not None
        part = self.base.get_submodule
        put = {
            "tower": lambda: self._before(part(tower.root), self._enter_tower),
            "tower left": lambda: self._after(part(tower.root), self._leave_tower),
            "first block": lambda: self._before(part(f"{tower.blocks}.{index}"), _enter_first_block),
            "block": lambda: self._before(part(f"{tower.blocks}.{index}"), partial(_enter_block, index)),
            "merger": lambda: self._before(part(tower.projector), self._enter_merger),
            "projector": lambda: self._after(part(tower.projector), self._leave_projector),
        }
        return put[kind]()

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> Callable[[], None]:
        return module.register_forward_pre_hook(_Hook(self, hook), with_kwargs=True).remove

    def _after(self, module: nn.Module, hook: Callable[..., Any], always_call: bool = False) -> Callable[[], None]:
        return module.register_forward_hook(_Hook(self, hook), with_kwargs=True, always_call=always_call).remove

    # -- the model -------------------------------------------------------------------------------------------------------

    @untraced
    def _enter_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # With pictures encoded beforehand, this is generate(), and it asks for the logits of the last prompt token and of
        # everything after it; in a plain call the number means nothing of the kind.
        given = kwargs.get("logits_to_keep", 0)
        wanted = given if isinstance(given, int) else 0
        tail = max(wanted - 1, 0) if kwargs.get("mm_encoder_outputs") else 0
        call = Call(tail=tail, logits_wanted=wanted)
        for name, offset in (("labels", 1), ("shift_labels", 0)):
            if isinstance(labels := kwargs.get(name), Tensor):
                kwargs = {**kwargs, name: labels.clone()}
                call.labels = (*call.labels, (kwargs[name], offset))
        return args, {**kwargs, CALL_ARGUMENT: call}

    @untraced
    def _enter_base(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        kwargs = by_name(self.base, args, kwargs)
        call: Call = kwargs.get(CALL_ARGUMENT) or Call()
        cache = kwargs.get("past_key_values")
        call.past = cache.get_seq_length() if cache is not None else 0
        look_at_mask(call, kwargs)
        me = threading.get_ident()
        self._on_the_way.pop(me, None)
        owner = self._owner_of(call, cache, kwargs)
        if owner is None:
            return (), _without_ours(kwargs)
        self._thread.call = self._inside[me] = ref(call)
        owner.plan.begin(call, owner, kwargs)
        self._watch_graph(call)
        return (), {**kwargs, CALL_ARGUMENT: call}

    def _owner_of(self, call: Call, cache: Any, kwargs: dict[str, Any]) -> Owner | None:
        """Whose plan a call follows: that of the conversation in its cache; that under which its pictures were encoded, for the
        first prompt that takes them, for one that is run again, and where only that plan can use them; else the one in force.

        Raises:
            UsageError: the pictures were shortened by a plan that is gone.
        """
        if call.past:
            return self._owner_of_conversation(cache)
        features = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if (made := encoded_of(features)) is None:
            return self._in_force()
        first, made.used = not made.used, True
        if cache is None:  # the prompt is run again for every token
            ids = told_by(kwargs)
            for prompt in made.prompts:
                if ids is not None and self._has(prompt.owner) and prompt.goes_on(ids):
                    call.again = prompt
                    return prompt.owner
        if (first or made.cut) and self._has(made.owner):
            return made.owner
        if made.cut:
            raise UsageError(GONE)
        return self._in_force()

    def _has(self, owner: Owner | None) -> bool:
        """Whether an owner's plan is one of this model, and was not removed."""
        return owner is not None and owner.plan is not None and owner.plan.base is self.base

    def _owner_of_conversation(self, cache: Any) -> Owner | None:
        owner = owner_of(cache)
        if self._has(owner):
            return owner
        if self.current is not None:
            check_same_stages(cache, self.current.plan.pruning.at)
            hand_over(cache, self.current)
        return self.current

    def _in_force(self) -> Owner | None:
        """Whose plan is for what begins now: of the innermost block that the caller has open, or the current one. A thread that
        wraps the model inside its own block wants the new plan; what others wrap does not reach into the block."""
        wrapped, number = self._wrapped
        if self.current is not None:
            for block in open_blocks(since=number if wrapped == threading.get_ident() else -1):
                if self._has(block.owner):
                    return block.owner
        return self.current

    @untraced
    def _leave_base(self, *_: Any) -> None:
        self._thread.call = _PerThread.call
        self._inside.pop(threading.get_ident(), None)

    def _call_inside(self) -> Call | None:
        """The call that this thread is in, inside the base model. torch runs no hook when Ctrl-C ends a forward pass, so that
        what was noted may be over: then the base model is not on the stack."""
        if (call := self._thread.call()) is None:
            return None
        if any(caller is self.base for caller in _callers()):
            return call
        self._leave_base()
        return None

    @untraced
    def _enter_text(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Call | None = kwargs.get(CALL_ARGUMENT)
        if call is not None:
            return None if call.plan is None else call.plan.enter_text(call, args, kwargs)
        if self._call_inside() is not None:  # the model itself runs it, without what it was given: nothing is pruned
            return None
        return None if self._of_another() else self._enter_text_alone(args, kwargs)

    def _of_another(self) -> bool:
        """Whether it is another model of this kind, with parts of this one, that runs them: then it is on the stack."""
        found = next((caller for caller in _callers() if type(caller) is type(self.base)), self.base)
        return found is not self.base

    def _enter_text_alone(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The language model was called by itself, past the model around it."""
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        owner = self._owner_of_conversation(cache) if past else self._in_force()
        if owner is None:
            return None
        plan, settings = owner.plan, owner.plan.contexts.settings
        changes = settings.enabled and plan.may_change(None, settings.budget)
        if changes and (count := strange_embeddings(kwargs, plan.text)):
            raise UsageError(
                f"the language model was called by itself with {count} embeddings that are no word's: if pictures are among "
                f"them, nothing tells where, and {plan.recipe} cannot be applied; call the whole model, or run this call "
                "inside `with run.override(enabled=False):`."
            )
        call = Call(past=past)
        look_at_mask(call, kwargs)
        plan.begin(call, owner, kwargs)
        changed = None if kwargs.get("inputs_embeds") is None else plan.enter_text(call, args, kwargs)
        args, kwargs = (args, kwargs) if changed is None else changed
        return args, {**kwargs, CALL_ARGUMENT: call}

    # -- the vision tower ------------------------------------------------------------------------------------------------

    @untraced
    def _enter_tower(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._call_inside()
        beginning = None if call is not None or self._of_another() else self._in_force()
        owner = beginning if call is None else call.owner
        self._thread.tower = self._thread.encoding = None
        if owner is None:
            return args, _without_ours(kwargs)
        if call is None:
            self._thread.encoding = owner
        if not owner.plan.looks_into_tower:
            return args, _without_ours(kwargs)
        self._thread.tower = tower = owner.plan.begin_tower(call)
        self._watch_graph(tower)
        return args, {**kwargs, CALL_ARGUMENT: tower}

    @untraced
    def _leave_tower(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tower, owner = self._thread.tower, self._thread.encoding
        self._thread.encoding = None
        if owner is not None and hasattr(output, "__dict__"):
            output.vlmprune = made = Encoded(owner, cut=tower is not None and tower.drops and tower.pruner is not None)
            self._on_the_way[threading.get_ident()] = ref(output)
            if made.cut:
                self._cut = [found for found in self._cut if found() is not None] + [ref(output)]
        if tower is not None:
            tower.plan.leave_tower(tower, output)
            self._thread.tower = None if tower.over else tower

    @untraced
    def _enter_merger(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tower = self._thread.tower
        return None if tower is None else (tower.plan.enter_merger(tower, args), kwargs)

    @untraced
    def _leave_projector(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], features: Tensor) -> Any:
        if (tower := self._thread.tower) is None:
            return None
        left = tower.output is not None
        features = tower.plan.leave_projector(tower, args, features)
        # Not held: a graph that runs blocks again holds the pass, and the output holds that graph.
        tower.output = None
        self._thread.tower = None if left else tower
        return features


# -- hooks that need nothing but what they are given -------------------------------------------------------------------------


@untraced
def _enter_first_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if isinstance(tower := kwargs.get(CALL_ARGUMENT), TowerPass):
        tower.plan.enter_first_block(tower, args, kwargs)


@untraced
def _enter_block(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tower = kwargs.get(CALL_ARGUMENT)
    return tower.plan.enter_block(index, module, tower, args, kwargs) if isinstance(tower, TowerPass) else None


def _enter_layer(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call: Call | None = kwargs.get(CALL_ARGUMENT)
    if call is None or call.plan is None or (call.idle and (call.edits.ready or index not in call.plan.edited)):
        return None
    return _in_layer(index, module, call, args, kwargs)


@untraced
def _in_layer(index: int, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call.plan.enter_layer(index, module, call, args, kwargs)


def _leave_text(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    call: Call | None = kwargs.get(CALL_ARGUMENT)
    return None if call is None or call.record is None else _after_prompt(call, output)


@untraced
def _after_prompt(call: Call, output: Any) -> Any:
    return call.plan.leave_text(call, call.record, output)


def _callers() -> Iterator[Any]:
    """The objects whose methods are on the stack, the innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals.get("self")
        frame = frame.f_back


def _of_others(doing: dict[int, ReferenceType[Any]]) -> bool:
    """Whether a thread that is alive, and is not this one, is noted with something that is there still."""
    alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    return any(ident in alive and what() is not None for ident, what in list(doing.items()))


def _spoil(output: Any) -> None:
    """Encoded pictures with rows of NaN in the places of dropped patches, which nobody will remove any more, say so when they
    are used: the plain model would answer NaN."""
    kind = type(output)
    output.__class__ = type(kind.__name__, (kind,), {"pooler_output": property(_gone)})


def _gone(_: Any) -> None:
    raise UsageError(GONE)


def _graph_gone(find: ReferenceType[Attachment]) -> None:
    attachment = find()
    if attachment is not None and attachment.current is None:  # what waited for this graph goes, too
        attachment.tidy()


def _before_layer(module: nn.Module, hook: Callable[..., Any]) -> Callable[[], None]:
    """Hooks of layers run in every layer for every token: nothing stands between. Without a call they do nothing."""
    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def _after_text(module: nn.Module) -> Callable[[], None]:
    return module.register_forward_hook(_leave_text, with_kwargs=True).remove


class _Hook:
    """A hook of an attachment; does nothing in a model that is compiled whole while nothing is to be done."""

    def __init__(self, attachment: Attachment, hook: Callable[..., Any]) -> None:
        self.attachment, self.hook = attachment, hook

    def __call__(self, *args: Any) -> Any:
        if self.attachment.sleeps and torch.compiler.is_compiling():
            return None
        return self.hook(*args)


def _without_ours(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != CALL_ARGUMENT}


def check_unshared(plan: Plan) -> None:
    """Refuse to put hooks on parts that carry those of another model: they would act in each other's calls.

    Raises:
        UsageError: the language model or the vision tower is a part of another model, which is wrapped.
    """
    parts = {"language model": plan.text}
    if (tower := plan.family.tower) is not None:
        parts["vision tower"] = plan.base.get_submodule(tower.root)
    for name, part in parts.items():
        hooks = [hook.attachment for hook in part._forward_pre_hooks.values() if isinstance(hook, _Hook)]
        if any(found.base is not plan.base and found.current is not None for found in hooks):
            raise UsageError(
                f"the {name} of this model is a part of another model, too, which is wrapped already: call "
                "vlmprune.unwrap on that one first, or give each model parts of its own."
            )


_attaching = RLock()


def attachment_of(base: nn.Module, make: bool = False) -> Attachment | None:
    """The hooks that a model carries already, or new ones."""
    with _attaching:
        for hook in list(base._forward_pre_hooks.values()):
            if isinstance(hook, _Hook):
                return hook.attachment
        return Attachment(base) if make else None
