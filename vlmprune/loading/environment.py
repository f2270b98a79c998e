"""Versions and devices that a result depends on; and transformers without its bars and warnings."""

from __future__ import annotations

from typing import Any


def environment() -> dict[str, Any]:
    """Versions, threads, machine and GPUs, for bug reports and beside every result."""
    import platform

    import torch
    import transformers

    import vlmprune

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "vlmprune": vlmprune.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "gpu": ", ".join(gpus) or "none",
    }


def quiet() -> None:
    """Switch off the bars and warnings of transformers. Downloads take minutes and keep their bars."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    enable_progress_bars()
