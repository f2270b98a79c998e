"""A stopwatch around `generate`: the language model's share of a prompt, when each token is there, and what the cache holds.

It works alike on a model that is wrapped and on one that is not, so that the two are timed by one clock. Times include the wait
for the GPU.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class PrefillClock:
    """Times the first call of the language model inside a `with` block, around our own hooks.

    Args:
        model: the model.
        device: on which it computes.

    Attributes:
        begin, end: seconds of the host's clock; 0 until then.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.text, self.device = model.get_decoder(), device
        self.begin = self.end = 0.0

    def __enter__(self) -> PrefillClock:
        before = self.text.register_forward_pre_hook(self._start, prepend=True)
        after = self.text.register_forward_hook(self._stop)  # after ours
        self.handles = (before, after)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _start(self, *_: object) -> None:
        if not self.begin:
            wait(self.device)
            self.begin = time.perf_counter()

    def _stop(self, *_: object) -> None:
        if not self.end:
            wait(self.device)
            self.end = time.perf_counter()


class Stamps:
    """A stopping criterion that never stops `generate`, and notes when each token is there. It works with beams, too.

    Attributes:
        at: seconds of the host's clock, one for each token.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.at = device, list[float]()

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """`[batch]` False."""
        wait(self.device)
        self.at.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def cache_bytes(cache: Any, later: int) -> int:
    """Bytes of the keys and values that are stored after prefill, without those of the `later` generated tokens.

    Layers that store none (recurrent ones) count nothing.
    """
    total = 0
    for layer in cache.layers:
        for x in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if x is None:
                continue
            total += x[..., : x.shape[-2] - later, :].numel() * x.element_size()
    return total


def wait(device: torch.device) -> None:
    """Wait until a GPU has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
