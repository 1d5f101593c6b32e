"""How long a GPU waits between the kernels of a call, from a profiler's trace."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["gaps_in", "gaps_of"]

CALLS = 50


def gaps_in(function: Callable[[], Any], calls: int = CALLS) -> dict[str, float]:
    """What the GPU does over some calls of a function: kernels, busy µs and gaps of one call.

    Args:
        function: that launches kernels on the current GPU, and did so before.
        calls: of it.
    """
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as trace:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in trace.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return gaps_of(kernels, calls)


def gaps_of(kernels: Iterable[tuple[float, float]], calls: int) -> dict[str, float]:
    """Of intervals in µs in which kernels ran, over some calls.

    Returns:
        Launches, busy and idle µs of a call, and the median gap between two kernels.

    Raises:
        RuntimeError: the trace has no kernels.
    """
    ordered = sorted(kernels)
    if not ordered:
        raise RuntimeError("the profiler's trace has no kernels; may it read the GPU's counters?")
    busy = 0.0
    gaps = []
    last = ordered[0][0]
    for start, end in ordered:
        gaps.append(max(0.0, start - last))
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    idle = sum(gaps)
    return {
        "launches": len(ordered) / calls,
        "busy µs": busy / calls,
        "idle µs": idle / calls,
        "median gap µs": statistics.median(gaps[1:] or [0.0]),
    }
