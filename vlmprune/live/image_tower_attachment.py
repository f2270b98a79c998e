"""Puts on an image tower what a recipe needs, and takes it off again: hooks on its blocks, pools and norm, and a `forward` of
the tower's own around its class's.

That `forward` begins and ends a pass, also when it is interrupted. `torch.compile` runs it, and so the whole tower, as it is:
how many patches there are depends on the picture.
"""

from __future__ import annotations

import threading
import time
from functools import partial, update_wrapper
from threading import RLock, local
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from vlmprune.adapters.image_tower import ImageTower, Pool
from vlmprune.errors import UsageError
from vlmprune.live.attachment import PATIENCE
from vlmprune.live.image_tower_pass import ImageTowerPass
from vlmprune.live.image_tower_plan import ImageTowerPlan


class _Forward(partial):
    """The `forward` of a wrapped tower."""

    attachment: TowerAttachment


class _Thread(local):
    """What a thread is doing.

    Attributes:
        inside: it is in the tower.
        tower: the pass that it is in; None if that is not pruned.
    """

    inside = False
    tower: ImageTowerPass | None = None


class TowerAttachment:
    """All that is on one image tower. It belongs to the tower, not to a recipe, and does not keep it alive.

    Args:
        root: the tower.
        tower: where its parts are.

    Attributes:
        current: the plan that new passes follow, or None.
    """

    def __init__(self, root: nn.Module, tower: ImageTower) -> None:
        self.current: ImageTowerPlan | None = None
        self._root, self._before, self._now, self._lock = ref(root), vars(root).get("forward"), _Thread(), RLock()
        self._passes: dict[int, int] = {}  # that run, by thread
        self._forward = _Forward(torch.compiler.disable(self._run))
        self._forward.attachment = self
        update_wrapper(self._forward, type(root).forward)
        part, self._handles = root.get_submodule, []
        blocks: Any = part(tower.blocks)
        for index, block in enumerate(blocks):
            enter, leave = partial(self._enter_block, index), partial(self._leave_block, index)
            self._handles += [
                block.register_forward_pre_hook(enter, with_kwargs=True),
                block.register_forward_hook(leave, always_call=True),
            ]
        self._handles.append(part(tower.averaged).register_forward_hook(self._average))
        for pool in tower.pools:
            self._handles.append(part(pool.path).register_forward_pre_hook(partial(self._hide, pool), with_kwargs=True))
        root.forward = self._forward

    def __reduce_ex__(self, protocol: object) -> Any:  # whatever of it is copied with a module
        raise UsageError("a wrapped model cannot be copied or pickled: call run.remove() first, and wrap the copy.")

    def remove(self) -> None:
        """Take everything away. New passes are not pruned from now on.

        Raises:
            UsageError: another thread does not leave the tower.
        """
        self.current = None
        begun = time.monotonic()
        while any(thread != threading.get_ident() for thread in list(self._passes)):
            if time.monotonic() - begun > PATIENCE:
                raise UsageError(
                    f"the hooks cannot be taken away: another thread has been running the tower for {PATIENCE:g} s; new "
                    "pictures are not pruned from now on; call run.remove() again when that thread has finished."
                )
            time.sleep(0.001)
        with self._lock:
            for handle in self._handles:
                handle.remove()
            root = self._root()
            if root is not None and vars(root).get("forward") is self._forward:
                if self._before is None:
                    del root.forward
                else:  # another library's
                    root.forward = self._before

    # -- hooks, in the order of a forward pass ---------------------------------------------------------------------------

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The tower's `forward`."""
        root, plan = self._root(), self.current
        assert root is not None
        original = partial(type(root).forward, root) if self._before is None else self._before
        outer, pixels = (self._now.inside, self._now.tower), _pixels(args, kwargs)
        self._now.inside, self._now.tower = True, None
        try:
            if plan is None or not plan.contexts.settings.enabled or pixels is None:
                return original(*args, **kwargs)
            return self._pruned(plan, root, original, pixels, args, kwargs)
        finally:
            self._now.inside, self._now.tower = outer

    def _pruned(
        self,
        plan: ImageTowerPlan,
        root: nn.Module,
        original: Any,
        pixels: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        blocks, thread = plan.contexts.settings.blocks, threading.get_ident()
        self._now.tower = tower = plan.begin(root, pixels, kwargs)
        with self._lock:
            self._passes[thread] = self._passes.get(thread, 0) + 1
        try:
            with tower.record.tower:
                out = original(*args, **kwargs)
            tower.end()
        finally:
            tower.close()
            with self._lock:
                self._passes[thread] -= 1
                if not self._passes[thread]:
                    del self._passes[thread]
        plan.contexts.note(tower.record, blocks)
        return out

    @torch.compiler.disable
    def _enter_block(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._now.inside:
            self._refuse_alone()
        if (tower := self._now.tower) is None:
            return None
        name = next(iter(kwargs)) if not args else ""
        hidden, kwargs = tower.enter_block(index, args[0] if args else kwargs[name], kwargs)
        return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, name: hidden})

    @torch.compiler.disable
    def _leave_block(self, index: int, block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if (tower := self._now.tower) is not None:
            tower.leave_block(index, failed=out is None)

    def _average(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """What comes out of the last norm, or block; older transformers returns it as a tuple."""
        if (tower := self._now.tower) is None:
            return None
        if isinstance(out, tuple):
            return (tower.average(out[0]), *out[1:])
        return tower.average(out)

    def _hide(self, pool: Pool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What enters a pool: keys are the second of query, key and value, or the only argument."""
        if (tower := self._now.tower) is None:
            return None
        return args, tower.hide(pool, args[1] if len(args) > 1 else args[0], kwargs)

    def _refuse_alone(self) -> None:
        """Refuse to run a block outside of the tower's own `forward`.

        Raises:
            UsageError: a recipe is on, and would not be followed.
        """
        if (plan := self.current) is not None and plan.contexts.settings.enabled:
            raise UsageError(
                f"a block of {plan.tower.name} was called by itself (as in forward_intermediates), where {plan.recipe} cannot "
                "be followed: set run.enabled = False for that, or call run.remove()."
            )


def _pixels(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The pictures among the arguments of a tower, `[picture, channel, row, column]`; None if there are none."""
    given = (value for value in (*args[:1], *kwargs.values()) if isinstance(value, Tensor) and value.ndim == 4)
    return next(given, None)


def tower_attachment_on(block: nn.Module) -> TowerAttachment | None:
    """What watches a block, whichever module counts as its tower (a ViT of timm, or what open_clip builds around it)."""
    for hook in block._forward_pre_hooks.values():
        owner = getattr(getattr(hook, "func", None), "__self__", None)
        if isinstance(owner, TowerAttachment):
            return owner
    return None


def tower_attachment_of(root: nn.Module) -> TowerAttachment | None:
    """What is on a tower already, or None."""
    found = vars(root).get("forward")
    return found.attachment if isinstance(found, _Forward) else None
