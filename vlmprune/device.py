"""The two doors between host and device: a tensor's values are read, and arrays are put there, here only."""

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
