"""The parts of a model, found by their names and kinds, and what must be true of them whatever the recipe is.

A model that is not built as expected is refused by the name of the class that differs, with what was looked for and found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from vlmprune.errors import UsageError


def uncompiled(module: Any) -> Any:
    """A module itself, where `torch.compile` was applied to it."""
    return getattr(module, "_orig_mod", module)


def part(module: Any, path: str, what: str, name: str | None = None) -> Any:
    """A part of a module.

    Args:
        path: its name, with dots.
        what: what it is, for the error.
        name: what the module is called in the error; its class if not given.

    Raises:
        UsageError: there is no such part.
    """
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise UsageError(
            f"{name or type(module).__name__} is not built as expected: looked for {what}, found "
            f"{', '.join(child for child, _ in module.named_children()) or 'no modules'}; such models are not supported."
        ) from error


def attention_name(layer: Any, usual: str) -> str:
    """The name of a decoder layer's attention module; `usual` where there is one of this name.

    Raises:
        UsageError: the layer has no attention module, or several of unusual names.
    """
    children = dict(uncompiled(layer).named_children())
    named = {name: child for name, child in children.items() if hasattr(child, "config") and hasattr(child, "layer_idx")}
    name = usual if usual in named else next(iter(named), "")
    if not named or (usual not in named and len(named) > 1):
        raise UsageError(
            f"{type(layer).__name__} is not built as expected: looked for one attention module with a config, found "
            f"{', '.join(named) or 'none'} among {', '.join(children)}; such text models are not supported."
        )
    return name


def check_unpatched(base: Any, language_model: Any, layers: Any) -> None:
    """Refuse a model of transformers whose classes somebody patched: their forward method is not the one that was tested.

    Raises:
        UsageError: the sentence names the class, and where its forward method comes from.
    """
    attention = [child for layer in layers for child in uncompiled(layer).children() if hasattr(child, "layer_idx")]
    for kind in {type(uncompiled(module)): None for module in (base, language_model, *layers, *attention)}:
        origin = getattr(kind.forward, "__module__", None) or ""
        if kind.__module__.startswith("transformers.") and not origin.startswith("transformers."):
            raise UsageError(
                f"{kind.__name__}.forward is not transformers' own, but that of {origin or 'an unknown module'}: somebody "
                "patched the class, and what the model computes is unknown; load it in a process without that patch."
            )


def check_own_forward(whole: nn.Module, seen: Iterable[nn.Module]) -> None:
    """Refuse a model, or a part of it, whose `forward` was replaced by a compiled one, where modules inside it are looked at.

    What was compiled calls the part as it was, past our look at it: torch does not notice hooks that are added to a module
    after it was compiled with what is around it.

    Args:
        whole: the model.
        seen: modules of it that get hooks, or are led through attention of ours.

    Raises:
        UsageError: the sentence names the part.
    """
    wanted = set(seen)
    for module in whole.modules():
        if not hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            continue
        if not wanted.isdisjoint(module.modules()):
            name = type(module).__name__
            raise UsageError(
                f"{name}.forward was replaced by torch.compile({name}.forward), and the layers inside it cannot be looked at: "
                "wrap the model first and compile then, or compile the part in place (part.compile()), or the whole model "
                "(torch.compile(model))."
            )


def only(language_model: Any, usual: str, fits: Callable[[nn.Module], bool], what: str) -> str:
    """The name of a language model's only child of a kind; `usual` where there is a child of this name.

    Args:
        fits: whether a child is of that kind.
        what: the kind, for the error.

    Raises:
        UsageError: there is none, or there are several.
    """
    children = dict(uncompiled(language_model).named_children())
    if usual in children:
        return usual
    names = [name for name, child in children.items() if fits(child)]
    last = [name for name in names if "final" in name] if len(names) > 1 else names
    if len(last) != 1:
        raise UsageError(
            f"{type(language_model).__name__} is not built as expected: looked for one {what}, found "
            f"{', '.join(names) or 'none'} among "
            f"{', '.join(children)}; such text models are not supported."
        )
    return last[0]


def check_config(language_model: Any) -> None:
    """Refuse a language model by its config.

    Raises:
        UsageError: sizes are missing, or its attention implementation is not supported.
    """
    config, name = language_model.config, type(language_model).__name__
    for needed in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if not isinstance(getattr(config, needed, None), int):
            raise UsageError(
                f"{name} is not built as expected: its config has no number {needed}; such text models are not supported."
            )
    if getattr(config, "is_causal", True) is False:
        raise UsageError(
            f"the config of {name} says is_causal=False, by which every token sees those after it; pruning follows causal "
            "models: set it to True, or run this model un-wrapped."
        )
    implementation = config._attn_implementation
    supported = ["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
    supported += ["flex_attention"] if language_model._supports_flex_attn else []
    if implementation not in supported:
        raise UsageError(
            f"attention implementation {implementation!r} is not supported (supported: {', '.join(supported)}): call "
            'model.set_attn_implementation("sdpa").'
        )
