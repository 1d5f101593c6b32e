"""Shares of a step's time."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from gn_det.engine.stopwatch import Stopwatch, peak_memory_mb


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows the only number in this list."""
    shown = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: shown[0])
    return shown


def test_shares_are_those_of_the_round_before_and_laps_of_one_name_add_up(
    clock: list[float],
) -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.start()
    assert watch.shares() == {}
    for name, seconds in (("data", 1.0), ("forward", 2.0), ("data", 1.0), ("backward", 4.0)):
        clock[0] += seconds
        watch.lap(name)
    clock[0] += 100  # between rounds
    watch.start()
    assert watch.shares() == {"data": 0.25, "forward": 0.25, "backward": 0.5}


def test_the_peak_is_the_most_that_the_kernel_saw_this_process_hold() -> None:
    status = Path("/proc/self/status").read_text()
    most = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10
    assert peak_memory_mb("cpu") == pytest.approx(most, rel=0.1)
