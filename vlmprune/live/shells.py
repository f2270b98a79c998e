"""The model inside what other libraries put around one: PEFT, torch's and accelerate's wrappers for training, `torch.compile`.

Hooks belong on the model itself; a call through the shell reaches them there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlmprune.adapters.registry import FAMILIES
from vlmprune.errors import UsageError

LOAD = "load one, for example with transformers.AutoModelForImageTextToText.from_pretrained(…)"


def model_inside(given: Any) -> nn.Module:
    """The vision-language model in what a caller passed, with shells around it or without.

    Args:
        given: a Hugging Face model, or one inside PEFT, DistributedDataParallel, DataParallel on one device, FSDP, DeepSpeed
            or `torch.compile`.

    Raises:
        UsageError: it is something else (the sentence says what, and what to pass), a text-only model, or a shell whose calls
            hooks cannot follow.
    """
    model = without_shells(given)
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None and (held := _held(model)):
        raise UsageError(f"expected a Hugging Face vision-language model, found {_named(given)}, which {held}.")
    if kind is None:
        raise UsageError(
            f"expected a Hugging Face vision-language model, found {_named(given)}, which has no config.model_type, and is no "
            f"image tower of timm or open_clip: {LOAD}."
        )
    if kind not in FAMILIES and not _sees(config):
        raise UsageError(
            f"expected a vision-language model, found {_named(model)} (model_type {kind!r}), which has no vision tower, and so "
            f"no visual tokens; if it is a part of one, wrap the whole model; supported are {', '.join(sorted(FAMILIES))}."
        )
    return model


def decoder_inside(given: Any) -> nn.Module:
    """The decoder in a model, with shells around it or without; a text-only model has one, too.

    Raises:
        UsageError: it is no model (the sentence says what it is, and what to pass), or a shell whose calls hooks cannot follow.
    """
    model: Any = without_shells(given)
    while not hasattr(model, "layers") and callable(getattr(model, "get_decoder", None)):
        if (inner := model.get_decoder()) is model or inner is None:
            break
        model = inner
    return model


def without_shells(given: Any) -> nn.Module:
    """What libraries have put their shells around; a model without shells is returned as it is.

    Raises:
        UsageError: it is no model (the sentence says what it is, and what to pass), or a shell whose calls hooks cannot follow.
    """
    model = given
    while (inner := _inside(model)) is not None:
        model = inner
    if not isinstance(model, nn.Module):
        raise UsageError(_no_model(model))
    return model


def _inside(shell: Any) -> nn.Module | None:
    """What one shell holds; None if it is none."""
    if not isinstance(shell, nn.Module):
        return None
    if callable(getattr(type(shell), "get_base_model", None)):  # PEFT
        _refuse_prompt_learning(shell)
        inner: Any = shell.get_base_model()  # type: ignore[operator]
    elif callable(getattr(type(shell), "inject_adapter", None)):  # PEFT's own inner shell
        inner = shell.model
    else:  # torch.compile; DistributedDataParallel, FSDP, DeepSpeed and the like
        inner = shell._modules.get("_orig_mod") or getattr(shell, "module", None)
    if isinstance(shell, nn.DataParallel) and len(shell.device_ids) > 1:
        raise UsageError(
            f"DataParallel copies the model to {len(shell.device_ids)} devices at every call, and hooks stay with the first: "
            "use torch.nn.parallel.DistributedDataParallel, or device_ids=[0]."
        )
    return inner if isinstance(inner, nn.Module) else None


def _refuse_prompt_learning(shell: Any) -> None:
    config = getattr(shell, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise UsageError(
            f"{type(shell).__name__} puts learned tokens before the prompt ({type(config).__name__}), whose places are "
            "unknown: use an adapter that changes weights, such as LoRA, or wrap its get_base_model() without them."
        )


def _held(module: nn.Module) -> str:
    """What to do with a module that has vision-language models as parts, a Sequential for example; empty if it has none."""
    configs = ((part, getattr(part, "config", None)) for part in module.children())
    models = [
        type(part).__name__ for part, config in configs if getattr(config, "model_type", None) in FAMILIES or _sees(config)
    ]
    if len(models) == 1:
        return f"holds a model ({models[0]}): pass that one"
    return f"holds {len(models)} models ({', '.join(models)}): wrap each of them, one call per model" if models else ""


def _sees(config: Any) -> bool:
    return any(getattr(config, name, None) is not None for name in ("vision_config", "visual", "vision_tower"))


def _named(found: Any) -> str:
    name = type(found).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _no_model(found: Any) -> str:
    """One sentence: what was found instead of a model, and what to pass."""
    return f"expected a loaded vision-language model, found {_instead_of_model(found)}."


def _instead_of_model(found: Any) -> str:
    if found is None:
        return f"None: {LOAD}"
    if isinstance(found, str) or hasattr(found, "__fspath__"):
        return f"the name {str(found)!r}: {LOAD}"
    if isinstance(found, type):
        load = f"{found.__name__}.from_pretrained(…)" if hasattr(found, "from_pretrained") else "an instance"
        return f"the class {found.__name__}: pass {load}"
    if isinstance(found, list | tuple | set | dict):
        return _collection(found)
    if isinstance(getattr(found, "model", None), nn.Module):  # a pipeline, a trainer, a handle of `wrap`
        return f"{_named(found)}: pass the model in it, its attribute .model"
    if any(
        getattr(found, part, None) is not None
        for part in ("image_processor", "tokenizer", "convert_ids_to_tokens", "preprocess")
    ):
        return f"{_named(found)}, which prepares the inputs of a model: pass the model itself; {LOAD}"
    if hasattr(found, "model_type"):
        return f"{_named(found)}, which describes a model and has no weights: {LOAD}"
    owner = getattr(found, "__self__", None)
    if isinstance(owner, nn.Module):
        return f"a method of {_named(owner)}: pass the model itself"
    if isinstance(getattr(owner, "model", None), nn.Module):
        return f"a method of {_named(owner)}: pass the model in it, its attribute .model"
    if callable(found) and hasattr(found, "__qualname__"):
        return f"the function {found.__qualname__}: call it, and pass the model that it returns"
    return f"{_named(found)}: {LOAD}"


def _collection(found: list[Any] | tuple[Any, ...] | set[Any] | dict[Any, Any]) -> str:
    values = list(found.values()) if isinstance(found, dict) else list(found)
    models = [value for value in values if isinstance(value, nn.Module)]
    held = f"{_named(found)} of {len(values)}"
    if len(models) == 1:
        return f"{held}, one of which is a model ({type(models[0]).__name__}): pass that one"
    if models:
        return f"{held}, with {len(models)} models: wrap each of them, one call per model"
    if isinstance(found, dict) and values and all(isinstance(value, Tensor) for value in values):
        return f"{held} tensors, which are weights without a model: {LOAD}"
    return f"{held}, with no model in it: {LOAD}"
