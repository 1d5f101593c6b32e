"""Bytes kept for the backward pass, and times taken in turns."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from gn_det.studies.comparison.cost import saved_bytes, step_seconds


class Losses(nn.Module):
    """Layers, and the mean of what comes out as the loss."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers(batch).mean()}


BATCH = torch.ones(4, 8)


def test_the_losses_of_a_batch_keep_what_their_backward_pass_takes() -> None:
    # The second layer's input; the batch was there before.
    assert saved_bytes(Losses(nn.Linear(8, 100), nn.Linear(100, 2)), BATCH) == 4 * 100 * 4


class Slow(nn.Module):
    """Notes when it is called, and waits."""

    def __init__(self, name: str, calls: list[str], seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.name, self.calls, self.seconds = name, calls, seconds

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        self.calls.append(self.name)
        time.sleep(self.seconds)
        return {"loss": self.weight * batch.sum()}


def test_models_take_turns_and_leave_no_gradient() -> None:
    calls: list[str] = []
    models = {"a": Slow("a", calls, 0.03), "b": Slow("b", calls, 0.0)}
    seconds = step_seconds(models, BATCH, rounds=3)
    assert "".join(calls) in ("abbaabba", "baabbaab")
    assert seconds.keys() == models.keys() and seconds["a"] >= 0.03
    assert all(model.weight.grad is None for model in models.values())
