"""A private copy of a part of a model, with the same parameters and without hooks, and a run of it up to some place.

What a decoder layer *would* compute is computed by such a copy. The live layer is not touched: other threads are not affected,
and other people's hooks (statistics, recorded outputs) do not count a run that is no forward pass of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

HOOKS = {name: value for name, value in vars(nn.Module()).items() if "hook" in name}
"""The attributes in which a module keeps its hooks, and their empty values."""


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """A run came to the place where it was to stop.

    Attributes:
        args, kwargs: what that place was called with.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


class Stop(nn.Module):
    """Takes the place of a module in a copy, and stops the run there."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise Stopped(args, kwargs)


def run_to_stop(copied: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Run a private copy without gradients; what the place was called with at which it stopped, or None if it did not stop."""
    try:
        with torch.no_grad():
            copied.forward(*args, **kwargs)
    except Stopped as stopped:
        return stopped.args, dict(stopped.kwargs)
    return None


def unhooked(module: nn.Module, instead: dict[nn.Module, nn.Module] | None = None) -> Any:
    """A copy of a module and all its parts that shares their parameters and buffers, in evaluation mode (no dropout).

    What `accelerate` does before a module runs (fetching offloaded weights, moving inputs) is done for the copy as well.

    Args:
        module: what to copy.
        instead: replacements of some of its parts.
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
    # The copy has dictionaries of its own, so that weights which accelerate puts there do not enter the model.
    state |= {name: dict(state[name]) for name in ("_parameters", "_buffers")}
    state |= {"training": False, "_compiled_call_impl": None}
    state["_modules"] = {name: None if child is None else _copied(child, done) for name, child in module._modules.items()}
    copied.__dict__.update(state)
    _bind_forward(module, copied)
    return copied


def _bind_forward(module: Any, copied: Any) -> None:
    """Give the copy its own `forward` where the module has one on itself rather than on its class."""
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
