"""Load a model by its name: everything about it is checked before its weights are read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

from vlmprune.errors import UsageError, unknown
from vlmprune.loading.config import check_torchvision, read_config
from vlmprune.loading.processor import TOKENIZER, load_processor
from vlmprune.loading.source import Source, find
from vlmprune.loading.videos import check_processor, check_shown
from vlmprune.loading.weights import check_weights, load_weights

if TYPE_CHECKING:
    from torch import Tensor


EMBEDDED = {"tiny": "pictures", "tiny-clips": "clips of eight frames"}
"""Names of the embedded models, and what they read."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Names of accelerate's ways to spread a model over a machine's devices; what does not fit stays on the CPU or the disk."""


def load_model(name: str, device: str, device_map: str | None = None) -> tuple[Any, Any]:
    """A model and its processor.

    Args:
        name: path of a folder, hub id, or one of `EMBEDDED`.
        device: where the model goes.
        device_map: one of `DEVICE_MAPS`, to spread a large model over several devices instead.

    Raises:
        UsageError: as `open_model`; or the weights are not whole.
    """
    processor, read_weights = open_model(name, device, device_map)
    return read_weights(), processor


def open_model(
    name: str,
    device: str,
    device_map: str | None = None,
    dtype: str | None = None,
    shown: Collection[str] = ("picture",),
) -> tuple[Any, Callable[[], Any]]:
    """The processor of a model, and a function that reads its weights: so that inputs can be checked before it is called.

    Args:
        name, device, device_map: as in `load_model`.
        dtype: name of the weights' dtype, for example "bfloat16". Default: as they are stored; float32 for the embedded model.
        shown: what the model is to be shown: "picture", "video", or both.

    Raises:
        UsageError: there is no such model, a file of it is missing or broken, its family is not supported or does not take what
            is shown, or this machine does not have the device.
    """
    check_device(device)
    check_device_map(device, device_map)
    if name in EMBEDDED and device_map is None:
        import torch

        from vlmprune import tiny

        load: Callable[..., tuple[Any, Any]] = tiny.load if name == "tiny" else tiny.load_for_clips
        model, processor = load(device, None if dtype is None else getattr(torch, dtype))
        check_shown(model.config, shown)
        return processor, lambda: model
    source = find(name) if name not in EMBEDDED else _embedded(name)
    config = read_config(source)
    check_shown(config, shown)
    check_weights(source)
    processor = load_processor(source, config)
    if "video" in shown:
        check_processor(processor)
    from transformers import AutoModelForImageTextToText

    wanted = dtype or ("float32" if name in EMBEDDED else None)  # as `tiny.load`
    extra = {} if wanted is None else {"dtype": wanted}
    return processor, partial(load_weights, AutoModelForImageTextToText, source, device, device_map, **extra)


def _embedded(name: str) -> Source:
    from vlmprune import tiny

    return find(str(tiny.CHECKPOINT if name == "tiny" else tiny.CLIPS_CHECKPOINT))


def load_decoder(name: str, gguf: str | None, device: str) -> tuple[Any, Callable[[str], Tensor]]:
    """A language model or VLM, and a function from a text to its ids `[1, token]`.

    Args:
        name: path of a folder, hub id, or 'tiny' for the embedded model.
        gguf: a GGUF file in the folder that is to be loaded.
        device: where the model goes.

    Raises:
        UsageError: there is no such model, a file of it is missing or broken, a package is missing, or this machine does not
            have the device.
    """
    check_device(device)
    if name == "tiny":
        if gguf is not None:
            raise UsageError(f"the embedded model is no GGUF file: give the folder of {gguf} as the model.")
        from vlmprune import tiny

        embedded, processor = tiny.load(device)
        return embedded, lambda text: processor(text=text, return_tensors="pt").input_ids.to(device)
    source = find(name, gguf)
    check_torchvision()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    extra = {} if gguf is None else {"gguf_file": gguf}
    config = source.load("config", lambda: AutoConfig.from_pretrained(source.place, **source.options, **extra))
    if gguf is None:
        check_weights(source)
        if source.unreached and not source.files & set(TOKENIZER):
            raise source.lacking("the tokenizer", source.without_processor("it lacks a tokenizer"))
    tokenizer = source.load("tokenizer", lambda: AutoTokenizer.from_pretrained(source.place, **source.options, **extra))
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    model = load_weights(AutoModelForImageTextToText if sees else AutoModelForCausalLM, source, device, **extra)
    return model, lambda text: tokenizer(text, return_tensors="pt").input_ids.to(device)


def check_device_map(device: str, device_map: str | None) -> None:
    """Refuse a device map that accelerate does not know, or that comes with a device.

    Raises:
        UsageError: says which.
    """
    if device_map is None:
        return
    if device_map not in DEVICE_MAPS:
        raise unknown("device map", device_map, DEVICE_MAPS)
    if device != "cpu":
        raise UsageError(f"found device {device!r} and device map {device_map!r}, which says where the model goes: give one.")


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have, or that cannot compute.

    Raises:
        UsageError: it does not exist, torch does not recognise its name, or it is "meta".
    """
    import torch

    try:
        if torch.empty(0, device=device).is_meta:
            raise UsageError(f"the device {device!r} holds shapes and no numbers: try cpu, or cuda where there is a GPU.")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"cannot use device {device!r} on this machine: try cpu, or cuda where there is a GPU.") from error
