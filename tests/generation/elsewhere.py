"""An accelerator's memory, played on a CPU: what transformers offloads is really out of reach until it is fetched again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin


class _Stream:
    def wait_stream(self, other: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


@contextmanager
def offloading() -> Iterator[dict[str, int]]:
    """Inside the block, an offloaded layer holds tensors without contents (device "meta"): whoever reads them, or asks them for
    the device to compute on, fails.

    Yields:
        how many times layers were offloaded, and fetched.
    """
    counts = {"offloaded": 0, "fetched": 0}
    away: dict[int, tuple[Any, Any]] = {}

    def offload(layer: Any) -> None:
        if layer.is_initialized and layer.keys.device.type != "meta":
            counts["offloaded"] += 1
            there = layer.keys, layer.values
            layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
            away[id(layer.keys)] = there  # another layer may take over the tensors

    def prefetch(layer: Any) -> None:
        if layer.is_initialized and layer.keys.device != layer.device:  # as transformers asks
            counts["fetched"] += 1
            layer.keys, layer.values = away.pop(id(layer.keys))

    theirs = CacheLayerMixin.offload, CacheLayerMixin.prefetch, torch.Stream, torch.cuda.default_stream
    CacheLayerMixin.offload, CacheLayerMixin.prefetch = offload, prefetch
    torch.Stream, torch.cuda.default_stream = _Stream, lambda device=None: _Stream()
    try:
        yield counts
    finally:
        CacheLayerMixin.offload, CacheLayerMixin.prefetch, torch.Stream, torch.cuda.default_stream = theirs
