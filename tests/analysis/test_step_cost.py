"""Bytes kept for the backward pass, and times taken in turns."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from gn_det.analysis.step_cost import saved_bytes, step_seconds


class Losses(nn.Module):
    """Layers, and the mean of what comes out as the loss."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers(batch).mean()}


BATCH = torch.ones(4, 8)


def test_a_linear_layer_keeps_its_input_and_not_its_weight() -> None:
    assert saved_bytes(Losses(nn.Linear(8, 100)), BATCH) == 4 * 8 * 4


def test_a_storage_that_two_layers_keep_counts_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x.view(2, 2, 8)).view(4, 2)

    assert saved_bytes(Losses(Twice()), BATCH) == 4 * 8 * 4


def test_what_gives_no_gradient_keeps_nothing() -> None:
    model = Losses(nn.Linear(8, 100))
    model.requires_grad_(False)
    assert saved_bytes(model, BATCH) == 0


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
