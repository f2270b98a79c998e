"""A private copy of a piece of a model: the same parameters, none of the hooks.

What a decoder layer *would* compute is asked of such a copy: the live layer is not touched, so that other threads do not
notice, and hooks of other people (statistics, output recording) do not count what is no forward pass of the model.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

HOOKS = {name: value for name, value in vars(nn.Module()).items() if "hook" in name}
"""A module's own records of hooks, empty."""


def unhooked(module: nn.Module, instead: dict[nn.Module, nn.Module] | None = None) -> Any:
    """A copy of a tree of modules that shares its parameters and buffers, in evaluation mode (no dropout, no random numbers).

    What `accelerate` does before a module runs (fetching offloaded weights, moving inputs) is done for the copy too.

    Args:
        module: root of the tree.
        instead: modules that take the places of others of the tree.
    """
    return _copied(module, dict(instead or {}))


def _copied(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    module = getattr(module, "_orig_mod", module)  # compiled
    if module in done:
        return done[module]
    kind: Any = type(module)
    copied: Any = kind.__new__(kind)
    done[module] = copied
    state = {**vars(module), **{name: type(value)() if value is not None else None for name, value in HOOKS.items()}}
    # The copy has dictionaries of its own: what is put into them (weights that accelerate fetches) stays out of the model.
    state |= {name: dict(state[name]) for name in ("_parameters", "_buffers")}
    state |= {"training": False, "_compiled_call_impl": None}
    state["_modules"] = {name: None if child is None else _copied(child, done) for name, child in module._modules.items()}
    copied.__dict__.update(state)
    _bind_forward(module, copied)
    return copied


def _bind_forward(module: Any, copied: Any) -> None:
    """A forward method that was put on the module itself, rather than on its class, still belongs to the module."""
    own = vars(module).get("forward")
    if (fetch := vars(module).get("_hf_hook")) is not None:  # accelerate
        own = vars(module).get("_old_forward", own)

        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = fetch.pre_forward(copied, *args, **kwargs)
            return bound(*args, **kwargs)

        bound = _rebound(own, module, copied)
        copied.__dict__["forward"] = forward
    elif own is not None:
        copied.__dict__["forward"] = _rebound(own, module, copied)


def _rebound(method: Any, module: Any, copied: Any) -> Any:
    if method is None:
        return MethodType(type(copied).forward, copied)
    return MethodType(method.__func__, copied) if getattr(method, "__self__", None) is module else method
