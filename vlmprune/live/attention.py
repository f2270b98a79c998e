"""Our attention function, which is put around the one that the model was loaded with: observers read its queries, keys and
values, and an editor recomputes some of its rows. Everything else is left to the model's own. Masks are in `masks.py`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmprune.kernels.attention_mass import attention_rows
from vlmprune.live.masks import not_masked, visible_in_rows

ATTENTION_KEY = "vlmprune"
"""Our key in transformers' registry of attention functions, which is made for additions; it must not contain "flash"."""

CALL_ARGUMENT = "vlmprune"
"""Name of the keyword argument that carries the `Call`, in a vision tower the `TowerPass`."""

WITHOUT_CONFIG = ("sdpa", "eager")
"""Implementations that do not look at the config of the module they run for."""

Observer = Callable[..., None]
"""Called as observer(query, key, value, attention_mask, scaling=…, **kwargs), shapes as in `rows_attention`."""


def rows_attention(
    query: Tensor, key: Tensor, attention_mask: Tensor | BlockMask | None, scaling: float, rows: Tensor
) -> Tensor:
    """`[batch, head, row, key]` fp32 attention of chosen query rows, under the mask the layer itself uses.

    Args:
        query, key: `[batch, head, query, dim]`, `[batch, kv_head, key, dim]`.
        attention_mask: None (causal), bool or additive `[batch or 1, 1, query, key]`, or a block mask.
        rows: `[batch, row]` indices of query rows.
    """
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    chosen = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    if attention_mask is None:
        visible = torch.arange(keys, device=key.device) <= (rows + keys - queries)[:, :, None]
    elif isinstance(attention_mask, BlockMask):
        visible = visible_in_rows(attention_mask, rows, keys)
    else:
        mask = attention_mask.expand(batch, -1, -1, -1)[:, 0]
        visible = mask.gather(1, rows[:, :, None].expand(-1, -1, keys))
        visible = not_masked(visible)
    return attention_rows(chosen, key, scaling, visible)


@dataclass(frozen=True, eq=False)
class Route:
    """What happens around one module's attention.

    Attributes:
        original: the module's own config.
        stock: the module as the model's own implementation shall see it, with that config.
        module: the module itself; a private copy of it has the same config, and needs a route of its own.
        users: the observers of everyone who leads this module through here. They look at queries and keys of every call, with
            or without a plan.
    """

    original: Any
    stock: _Stock
    module: nn.Module
    users: list[tuple[Observer, ...]] = field(default_factory=list)


class _Stock:
    """A module with its own config: flash attention looks up which of its kernels to run there."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def routed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """The model's own attention, seen by observers and overwritten by an editor: those that the running call's plan has for
    this module (registered under `ATTENTION_KEY`)."""
    config: Any = module.config
    route: Route | None = vars(config).get("vlmprune_route")  # past the config's own look-up, which is slow
    implementation = (config if route is None else route.original)._attn_implementation
    # "eager" is not in the registry: every modelling file brings its own.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    own = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    if route is None:  # another thread has just taken the route away
        return own(module, query, key, value, attention_mask, **kwargs)
    shown = module if implementation in WITHOUT_CONFIG else route.stock
    for observers in tuple(route.users):
        for observer in observers:
            observer(query, key, value, attention_mask, **kwargs)
    call = kwargs.get(CALL_ARGUMENT)
    if (step := getattr(call, "attend_step", None)) is not None:  # a `StepEdit` of a static cache
        wanted = kwargs.get("output_attentions") or getattr(config, "output_attentions", False)
        own = partial(own, shown, query, key, value, attention_mask, **kwargs)
        return step(own, query, key, value, attention_mask, kwargs.get("scaling"), wanted)
    plan = getattr(call, "plan", None)
    if plan is not None and not getattr(call, "idle", False):
        for observer in plan.observers.get(module, ()):
            observer(plan, query, key, value, attention_mask, **kwargs)
    if plan is None or (editor := plan.editors.get(module)) is None:
        return own(shown, query, key, value, attention_mask, **kwargs)
    return editor(partial(own, shown, query, key, value, attention_mask, **kwargs), query, key, value, **kwargs)


def route_attention(module: nn.Module, observers: Sequence[Observer] = ()) -> Callable[[], None]:
    """Lead one attention module through `routed_attention`; the returned function undoes it.

    Only this module's reference to its config is replaced, by a copy: masks are still made for the model's own
    implementation (which may be switched meanwhile), and no other layer notices. Several users (a recipe, `vlmprune.observe`)
    share one route, may leave in any order, and the last one restores the config.
    """
    AttentionInterface.register(ATTENTION_KEY, routed_attention)
    mine, original = tuple(observers), vars(module).get("config", module.config)
    config: Any = copy.copy(original)
    config.vlmprune_route = fresh = Route(original, _Stock(module, original), module)
    config._attn_implementation_internal = ATTENTION_KEY
    # Nothing is allocated while the lock is held: the garbage collector may finish a graph then, and take away other routes.
    with _routing:
        route = vars(module.config).get("vlmprune_route")
        if route is None or route.module is not module:
            route, module.config = fresh, config
        route.users.append(mine)

    def undo() -> None:
        with _routing:
            route.users.remove(mine)
            if not route.users:
                module.config = route.original

    return undo


_routing = RLock()
