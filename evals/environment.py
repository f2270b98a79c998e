"""Versions and devices: what a measured result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import vlmprune


def environment() -> dict[str, Any]:
    """Versions, CPU threads, the machine and its GPUs, for result files and bug reports."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "vlmprune": vlmprune.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "gpu": ", ".join(gpus) or "none",
    }
