"""A training step: gradients of several batches, in mixed precision if asked."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["AccumulatingTrainer", "amp_dtype"]


class AccumulatingTrainer(SimpleTrainer):
    """SimpleTrainer whose step is the mean over several batches.

    The gradient of k batches is that of one batch of all their images, where each image's part does
    not depend on the others, as with GN, and the loss is a mean over images. Losses of the metrics
    are means over the batches. With DDP, gradients travel with the last batch only.

    Args:
        model: returns a dict of losses.
        data_loader: yields batches.
        optimizer: called once a step.
        accumulate_steps: batches in each step.
        dtype: of mixed precision, torch.bfloat16 or torch.float16, the latter with scaled losses;
            None for none.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        accumulate_steps: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.accumulate_steps = accumulate_steps
        self.dtype = dtype
        self._device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(self._device_type, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        self.optimizer.zero_grad()
        means: dict[str, torch.Tensor] = {}
        data_time = 0.0
        for remaining in reversed(range(self.accumulate_steps)):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            apart = remaining > 0 and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if apart else nullcontext():
                losses = self._losses(batch)
                self.grad_scaler.scale(sum(losses.values())).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach()
        self.after_backward()
        self._write_metrics(means, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _losses(self, batch: Any) -> dict[str, torch.Tensor]:
        """The batch's share of the step's losses."""
        with torch.autocast(self._device_type, self.dtype, enabled=self.dtype is not None):
            losses = self.model(batch)
        return {name: loss / self.accumulate_steps for name, loss in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def amp_dtype(enabled: bool) -> torch.dtype | None:
    """The dtype of mixed precision on this GPU: bfloat16 where it has it, else float16."""
    if not enabled:
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
