"""The two doors between host and device: a tensor's values are read, and arrays are put there, here only; and where a model
takes its inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def on_host(x: Tensor) -> np.ndarray[Any, Any]:
    """A tensor's values. Waits for the device: the only such place on the way of a prompt through a model."""
    return np.asarray(x.detach().cpu())


def on_device(x: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    return torch.from_numpy(x.copy()).to(device, non_blocking=True)


def execution_device(model: Any) -> torch.device:
    """The device on which a model takes its inputs.

    That is `model.device`, but for a model whose weights accelerate moves to the device layer by layer (`cpu_offload`,
    `disk_offload`, `device_map`): its own device may be `meta`. The hook of its embedding knows where it computes.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    hook = getattr(embedding, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # accelerate puts several hooks of one module into one
        if (found := getattr(one, "execution_device", None)) is not None:
            return torch.device(found)
    return model.device


def to_model(model: Any, inputs: Any) -> Any:
    """A processor's output on the device on which a model takes it; pictures in the model's dtype."""
    return inputs.to(execution_device(model), model.dtype)
