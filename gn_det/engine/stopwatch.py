"""How long a step takes, where its time goes, and how much memory it took."""

from __future__ import annotations

import resource
import time
from collections import Counter
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import nn

__all__ = ["Stopwatch", "peak_memory_mb", "seconds_of_step"]

Moment = float | torch.cuda.Event


class Stopwatch:
    """Time between moments of a device's work, read one round later so that nothing waits for it.

    Args:
        device: whose work is timed; a GPU by events in its stream, else the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._round: list[tuple[str, Moment]] = []
        self._last_round: list[tuple[str, Moment]] = []

    def start(self) -> None:
        """Begin a round."""
        self._last_round = self._round
        self._round = [("", self._now())]

    def lap(self, name: str) -> None:
        """End what has gone on since the last lap; laps of one name add up."""
        self._round.append((name, self._now()))

    def shares(self) -> dict[str, float]:
        """Each name's part of the round before this one, from 0 to 1; empty in the first."""
        seconds: Counter[str] = Counter()
        for (_, begin), (name, end) in zip(self._last_round, self._last_round[1:], strict=False):
            seconds[name] += _seconds(begin, end)
        return {name: value / seconds.total() for name, value in seconds.items()}

    def _now(self) -> Moment:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begin: Moment, end: Moment) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def seconds_of_step(model: nn.Module, batch: Any) -> float:
    """Seconds of one forward and backward pass, to the end of a GPU's work; no gradient is left.

    Args:
        model: in training mode, returning a dict of losses.
        batch: what it takes.
    """
    _wait_for_gpu()
    start = time.perf_counter()
    with EventStorage():
        sum(model(batch).values()).backward()
    _wait_for_gpu()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_mb(device_type: str) -> float:
    """The most memory so far in MiB: of PyTorch's allocations on "cuda", else of the process."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux: in KiB
