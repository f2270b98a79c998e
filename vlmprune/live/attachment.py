"""The only module that changes a live model: hooks in, hooks out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any
from weakref import ReferenceType, WeakMethod, WeakSet, finalize, ref

import torch
from torch import nn

from vlmprune.errors import UsageError
from vlmprune.live import hooks
from vlmprune.live.attention import route_attention
from vlmprune.live.decoder import take
from vlmprune.live.hooks import Hooks
from vlmprune.live.owner import Owner
from vlmprune.live.owners import GONE, Owners
from vlmprune.live.plan import Plan
from vlmprune.live.static_step import is_compiled_step

PATIENCE = 60.0
"""Seconds that removing waits for forward passes of other threads, which cannot go on without their hooks."""
ON_THE_WAY = 2.0
"""Seconds that it waits for images which another thread has encoded, and has not used yet."""


class Attachment:
    """All hooks on one model. They belong to the model, not to a recipe."""

    def __init__(self, base: nn.Module) -> None:
        self.base, self.owners = base, Owners(base)
        self.hooks = Hooks(self.owners, WeakMethod(self._watch_graph))  # no cycle: it goes with the last hook
        self._places: dict[Any, _Place] = {}
        self._sleeps = False
        self._lock, self._awake = RLock(), 0
        self._changing = self._late = False
        self._graphs: WeakSet[Any] = WeakSet()

    @property
    def current(self) -> Owner | None:
        """What owns new conversations, or None."""
        return self.owners.current

    def follow(self, plan: Plan) -> Owner:
        """New conversations follow `plan` from now on."""
        with self._lock:
            owner = self.join(plan)
            self.owners.follow(owner)
        self.tidy()
        return owner

    def join(self, plan: Plan) -> Owner:
        """An owner whose conversations follow `plan`, as long as a reference to it is held."""
        with self._change():
            owner = self.owners.add(plan)
            for name, put in self._wanted(plan):
                if name not in self._places:
                    self._places[name] = place = put()
                    place.sleep(self._sleeps)
        return owner

    def clear(self) -> None:
        """No conversation follows a plan any more, and the model is as it was. Where gradient checkpointing will run layers
        again, the hooks stay until then, and go with the graph.

        Raises:
            UsageError: another thread does not leave the model.
        """
        current, self.owners.current = self.owners.current, None  # held until `close` reached its callers
        self._wait()
        for other in self.owners.alive():
            other.plan.contexts.close()
            other.plan = None
        del current
        for find in self.hooks.shortened:
            if (output := find()) is not None:
                _spoil(output)
        self.hooks.shortened = []
        self.tidy()

    def tidy(self) -> None:
        """Take away the hooks that no plan needs any more."""
        with self._change():
            self._late = False
            alive = self.owners.alive()
            recomputed = {state.plan for state in list(self._graphs) if state.recomputes}
            plans = recomputed.union(owner.plan for owner in alive)
            needed = {name for plan in plans for name, _ in self._wanted(plan)}
            for name in [name for name in self._places if name not in needed]:
                self._places.pop(name).remove()
            self._sleep(not self._awake and not any(owner.plan.may_change(None, None) for owner in alive))

    @contextmanager
    def _change(self) -> Iterator[None]:
        """While hooks are put on or taken away, what the garbage collector wants to take away has to wait."""
        with self._lock:
            outer, self._changing = self._changing, True
            try:
                yield
            finally:
                self._changing = outer
        if self._late and not outer:
            self.tidy()

    def tidy_after_graph(self) -> None:
        """The same from the garbage collector, which may run at any place in any thread, and must not wait."""
        if not self._lock.acquire(blocking=False):
            self._late = True
            return
        try:
            if self._changing:
                self._late = True
            elif self.current is None:  # what waited for this graph goes, too
                self.tidy()
        finally:
            self._lock.release()

    def _sleep(self, sleeps: bool) -> None:
        """While no plan changes anything, a model that is compiled whole needs no hook; it is compiled anew afterwards."""
        if sleeps != self._sleeps:
            self._sleeps = sleeps
            for place in self._places.values():
                place.sleep(sleeps)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While a block is open, hooks act in compiled models, too."""
        with self._change():
            self._awake += 1
            self._sleep(False)
        try:
            yield
        finally:
            with self._lock:
                self._awake -= 1
            self.tidy()

    def _watch_graph(self, state: Any) -> None:
        """Remember a call, or a pass through the tower, that a backward pass may run again."""
        self._graphs.add(state)
        finalize(state, _graph_gone, ref(self)).atexit = False

    def _wait(self) -> None:
        """Let the forward passes of other threads come to their end: half of one cannot go on without its hooks."""
        begun = time.monotonic()
        while (waited := time.monotonic() - begun) < PATIENCE:
            on_the_way = self.hooks.on_the_way if waited < ON_THE_WAY else {}
            if not _of_others(self.hooks.inside) and not _of_others(on_the_way):
                return
            time.sleep(0.001)
        raise UsageError(
            f"the hooks cannot be taken away: another thread has been running the model for {PATIENCE:g} s; new prompts run "
            "un-pruned from now on; call run.remove() again when that thread has finished."
        )

    # -- places ----------------------------------------------------------------------------------------------------------

    def _wanted(self, plan: Plan) -> Iterator[tuple[Any, Callable[[], _Place]]]:
        """The name of every hook that a plan needs, and what puts it in place."""
        ours, base, language_model = self.hooks, self.base, plan.language_model
        if plan.model is not base:
            yield ("model", plan.model), partial(self._before, plan.model, ours.enter_model)
        yield "base", partial(self._before, base, ours.enter_base)
        yield "base left", partial(self._after, base, ours.leave_base, always_call=True)
        yield "text", partial(self._before, language_model, ours.enter_language_model)
        yield "text left", partial(_Place, language_model.register_forward_hook, hooks.leave_language_model)
        if (tower := plan.family.tower) is not None:  # whose images they are is decided when they are encoded
            root = base.get_submodule(tower.root)
            yield ("tower", 0), partial(self._before, root, ours.enter_tower)
            yield ("tower left", 0), partial(self._after, root, ours.leave_tower, always_call=True)
        for kind, index in plan.places():
            yield (kind, index), partial(self._put, plan, kind, index)
        for module in {**plan.observers, **plan.editors}:
            yield ("attention", module), partial(_Route, module)

    def _put(self, plan: Plan, kind: str, index: int) -> _Place:
        if kind == "layer":
            hook = partial(hooks.enter_layer, index, plan.kinds.stored_at[index], plan.pruning.stack.rotary)
            return _Place(plan.layers[index].register_forward_pre_hook, hook)
        if kind == "carried":
            return _Place(plan.layers[index].get_submodule(plan.family.attention).register_forward_pre_hook, take)
        tower = plan.family.tower
        assert tower is not None
        part = self.base.get_submodule
        if kind == "first block":
            return self._before(part(f"{tower.blocks}.{index}"), hooks.enter_first_block)
        if kind == "first block alone":
            return self._before(part(f"{tower.blocks}.{index}"), self.hooks.enter_first_block_alone)
        if kind == "block's attention":
            return self._before(part(f"{tower.blocks}.{index}.{tower.attention}"), self.hooks.enter_block_attention)
        if kind == "block":
            return self._before(part(f"{tower.blocks}.{index}"), partial(hooks.enter_block, index))
        if kind == "early":
            early = "" if tower.patches is None else f"{tower.patches.early}.{index}"
            return self._after(part(early), self.hooks.leave_early)
        if kind == "merger":
            return self._before(part(tower.projector), self.hooks.enter_merger)
        if kind == "pool":
            assert plan.family.videos is not None
            assert plan.family.videos.pool is not None
            return self._before(part(plan.family.videos.pool), partial(hooks.enter_video_pool, self.hooks))
        return self._after(part(tower.projector), self.hooks.leave_projector)

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> _Place:
        return _Sleeper(module.register_forward_pre_hook, module._forward_pre_hooks, self, hook)

    def _after(self, module: nn.Module, hook: Callable[..., Any], always_call: bool = False) -> _Place:
        register = partial(module.register_forward_hook, always_call=always_call)
        return _Sleeper(register, module._forward_hooks, self, hook)


class _Hook(partial):
    """A hook that is not copied with its module. A `partial`, so that no Python stands between torch and the hook."""

    attachment: Attachment

    def __reduce_ex__(self, protocol: object) -> Any:
        raise UsageError("a wrapped model cannot be copied or pickled: call run.remove() first, and wrap the copy.")


class _Place:
    """A hook in its place, which does nothing without a call that follows a plan."""

    def __init__(self, register: Callable[..., Any], hook: Callable[..., Any]) -> None:
        self._handle = register(hook, with_kwargs=True)

    def remove(self) -> None:
        """Take it away."""
        self._handle.remove()

    def sleep(self, sleeps: bool) -> None:
        """Do nothing in a model that is compiled whole, or do what there is to do."""


class _Sleeper(_Place):
    """A hook that decides by itself, and that `torch.compile` must not look into: its control flow depends on the prompt. The
    model between hooks is still compiled.

    Args:
        register: puts a hook on a module.
        there: all hooks of that kind on the module.
        attachment: whose hook it is.
    """

    def __init__(
        self, register: Callable[..., Any], there: dict[int, Any], attachment: Attachment, hook: Callable[..., Any]
    ) -> None:
        self._there, apart = there, torch.compiler.disable(hook)

        def awake(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
            if torch.compiler.is_compiling() and is_compiled_step(args, kwargs):
                return None
            return apart(module, args, kwargs, *output)

        def asleep(*args: Any) -> Any:
            return None if torch.compiler.is_compiling() else apart(*args)

        self._awake, self._asleep = _Hook(awake), _Hook(asleep)
        self._awake.attachment = self._asleep.attachment = attachment
        super().__init__(register, self._awake)

    def sleep(self, sleeps: bool) -> None:
        self._there[self._handle.id] = self._asleep if sleeps else self._awake


class _Route(_Place):
    """Attention that is led through ours."""

    def __init__(self, module: nn.Module) -> None:
        self._undo = route_attention(module)

    def remove(self) -> None:
        self._undo()


def _attachments(module: nn.Module) -> list[Attachment]:
    """Those that have hooks on a module."""
    return [hook.attachment for hook in list(module._forward_pre_hooks.values()) if isinstance(hook, _Hook)]


def carries_hooks(module: nn.Module) -> bool:
    """Whether a module carries hooks of a model that is wrapped."""
    return any(found.current is not None for found in _attachments(module))


def check_unshared(plan: Plan) -> None:
    """Refuse to put hooks on parts that carry those of another model: they would act in each other's calls.

    Raises:
        UsageError: the language model or the vision tower is a part of another model, which is wrapped.
    """
    parts = {"language model": plan.language_model}
    if (tower := plan.family.tower) is not None:
        parts["vision tower"] = plan.base.get_submodule(tower.root)
    for name, part in parts.items():
        if any(found.base is not plan.base and found.current is not None for found in _attachments(part)):
            raise UsageError(
                f"the {name} of this model is a part of another model, too, which is wrapped already: call "
                "vlmprune.unwrap on that one first, or give each model parts of its own."
            )


_attaching = RLock()


def attachment_of(base: nn.Module, make: bool = False) -> Attachment | None:
    """The hooks that a model carries already, or new ones."""
    with _attaching:
        found = _attachments(base)
        return found[0] if found else Attachment(base) if make else None


def _of_others(doing: dict[int, ReferenceType[Any]]) -> bool:
    """Whether a thread that is alive, and is not this one, is listed with something that is there still."""
    alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    return any(ident in alive and what() is not None for ident, what in list(doing.items()))


def _spoil(output: Any) -> None:
    """Encoded images with rows of NaN in the places of dropped patches, which no hook will remove any more, refuse to be used:
    the plain model would answer NaN."""
    kind = type(output)
    output.__class__ = type(kind.__name__, (kind,), {"pooler_output": property(_gone)})


def _gone(_: Any) -> None:
    raise UsageError(GONE)


def _graph_gone(find: ReferenceType[Attachment]) -> None:
    if (attachment := find()) is not None:
        attachment.tidy_after_graph()
