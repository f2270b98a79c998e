"""What is counted and not timed: FLOPs, and the peak of allocated memory."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(work: Callable[[], Any]) -> int:
    """FLOPs of some work as torch counts them, attention on the CPU included; a Triton kernel of ours is not counted."""
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS) as counter:
        work()
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Both products of attention. Grouped queries count with all their heads; causal halving is not counted."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * key[-2] * (dim + value[-1])


_ATTENTION_FLOPS = {
    getattr(torch.ops.aten, name): _attention_flops
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",  # torch itself does not count it
    )
}


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most memory that is allocated at one time during some work, above what was allocated before it.

    On a GPU torch keeps this number. On a CPU it is summed up from the allocations that torch's profiler records.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler writes to stderr whenever it starts and stops
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    moved = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    held = peak = 0
    for event in sorted(moved, key=lambda event: (event["ts"], event["args"]["Ev Idx"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
