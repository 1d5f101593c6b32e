"""What a training step costs: bytes kept for the backward pass, and time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.utils.events import EventStorage
from torch import nn
from tqdm import tqdm

from gn_det.engine.activation_memory import kept_for_backward
from gn_det.engine.stopwatch import seconds_of_step

__all__ = ["saved_bytes", "step_seconds"]


def saved_bytes(model: nn.Module, batch: Sequence[dict[str, Any]]) -> int:
    """Bytes that a forward pass keeps for its backward pass, see :func:`kept_for_backward`.

    Args:
        model: in training mode, returning a dict of losses.
        batch: what it takes.
    """
    with EventStorage():
        return sum(kept_for_backward(lambda: model(batch)).values())


def step_seconds(
    models: Mapping[str, nn.Module], batch: Sequence[dict[str, Any]], rounds: int = 15
) -> dict[str, float]:
    """Median seconds of a forward and backward pass of each model.

    The models take turns, forwards and backwards by turns, so that a drift of the machine's speed
    meets all alike; the first round is not counted.

    Args:
        models: by name, in training mode, returning a dict of losses.
        batch: what they take.
        rounds: that are counted.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in tqdm(range(rounds + 1), desc="timing", unit="round", delay=2):
        for name in list(models)[:: 1 if number % 2 else -1]:
            seconds = seconds_of_step(models[name], batch)
            if number > 0:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}
