"""A training step: gradients of several batches, in mixed precision if asked."""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gn_det.data.seeding import seed_generators
from gn_det.engine.stopwatch import Stopwatch, peak_memory_mb
from gn_det.errors import InputError
from gn_det.text import shortened

__all__ = ["AccumulatingTrainer", "largest_norms"]


class AccumulatingTrainer(SimpleTrainer):
    """SimpleTrainer whose step is the mean over several batches, and can be repeated.

    The gradient of k batches is that of one batch of all their images, where each image's part does
    not depend on the others, as with GN, and the loss is a mean over images. Losses of the metrics
    are means over the batches. With DDP, gradients travel with the last batch only.

    What is random in the model (the sampled proposals, dropout) is seeded for each batch by (seed,
    rank, number of the batch), so a step does not depend on the steps before it.

    The metrics ``share/data``, ``share/forward``, ``share/backward`` and ``share/optimizer`` are
    parts of the time of the step before, ``peak_memory_mb`` the most memory since the start: of the
    GPU's allocator in MiB, on the CPU of the process.

    Args:
        model: returns a dict of losses.
        data_loader: yields batches.
        optimizer: called once a step.
        accumulate_steps: batches in each step.
        dtype: of mixed precision, torch.bfloat16 or torch.float16, the latter with scaled losses;
            None for none.
        seed: non-negative.

    Raises:
        InputError: from run_step, where a loss is not finite, or proposals are not, before the
            weights change.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        accumulate_steps: int = 1,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.accumulate_steps = accumulate_steps
        self.dtype = dtype
        self.seed = seed
        device = next(model.parameters()).device
        self._device_type = device.type
        self._stopwatch = Stopwatch(device)
        self.grad_scaler = torch.amp.GradScaler(self._device_type, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        self.optimizer.zero_grad()
        means: dict[str, torch.Tensor] = {}
        images: list[Any] = []
        data_time = 0.0
        self._stopwatch.start()
        for part in range(self.accumulate_steps):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            self._stopwatch.lap("data")
            images += batch
            seed_generators(self.seed, comm.get_rank(), self.iter * self.accumulate_steps + part, 0)
            apart = part < self.accumulate_steps - 1 and isinstance(
                self.model, DistributedDataParallel
            )
            with self.model.no_sync() if apart else nullcontext():
                losses = self._losses(batch, images)
                self._stopwatch.lap("forward")
                self.grad_scaler.scale(sum(losses.values())).backward()
            self._stopwatch.lap("backward")
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach()
        self.after_backward()
        self._check_finite(means, images)
        self._write_metrics(means, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self._stopwatch.lap("optimizer")

    def _losses(self, batch: list[Any], images: list[Any]) -> dict[str, torch.Tensor]:
        """The batch's share of the step's losses."""
        try:
            with torch.autocast(self._device_type, self.dtype, enabled=self.dtype is not None):
                losses = self.model(batch)
        except FloatingPointError as error:  # Detectron2's, of proposals that are not finite
            weights = largest_norms({n: p.data for n, p in self.model.named_parameters()})
            raise self._diverged(str(error).rstrip("."), images, "weights", weights) from error
        return {name: loss / self.accumulate_steps for name, loss in losses.items()}

    def _check_finite(self, losses: dict[str, torch.Tensor], images: list[Any]) -> None:
        values = {name: loss.item() for name, loss in losses.items()}
        if all(map(math.isfinite, values.values())):
            return
        scale = self.grad_scaler.get_scale() if self.grad_scaler.is_enabled() else 1.0
        gradients = largest_norms(
            {n: p.grad / scale for n, p in self.model.named_parameters() if p.grad is not None}
        )
        told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise self._diverged(f"the loss is not finite: {told}", images, "gradients", gradients)

    def _diverged(
        self, problem: str, images: list[Any], what: str, norms: list[tuple[str, float]]
    ) -> InputError:
        names = [
            str(image.get("file_name", "?")) if isinstance(image, dict) else "?" for image in images
        ]
        return InputError(
            f"iteration {self.iter}: {problem}; images: {shortened(names, 16)}; largest {what}: "
            f"{', '.join(f'{name} {norm:.4g}' for name, norm in norms)}. Checkpoints stay as they "
            "are. Lower the learning rate or warm up for longer; a detector may also clip "
            "gradients (SOLVER.CLIP_GRADIENTS). Then resume the run from its last checkpoint, or "
            "begin anew where it has none; a classifier begins anew"
        )

    def _write_metrics(self, loss_dict: Any, data_time: float, **kwargs: Any) -> None:
        super()._write_metrics(loss_dict, data_time, **kwargs)
        storage = get_event_storage()
        for name, share in self._stopwatch.shares().items():
            storage.put_scalar(f"share/{name}", share)
        peak = peak_memory_mb(self._device_type)
        storage.put_scalar("peak_memory_mb", peak, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load everything but the settings of the optimizer, which stay those of the config."""
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        sizes = [len(group["params"]) for group in groups]
        there = [len(group["params"]) for group in state_dict["optimizer"]["param_groups"]]
        if there != sizes:  # and so another order, in which momentum would be taken for others'
            raise InputError(
                f"the optimizer of the checkpoint has groups of {there} parameters, this one of "
                f"{sizes}: weight decay or learning rates are equal for other layers than before; "
                "take the run's SOLVER.WEIGHT_DECAY*, BIAS_LR_FACTOR, BACKBONE_MULTIPLIER and "
                "FREEZE_AT"
            )
        super().load_state_dict(state_dict)
        self.iter = int(self.iter)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own, initial_lr=own.get("initial_lr", own["lr"]))
        if self.grad_scaler.is_enabled() and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def largest_norms(tensors: Mapping[str, torch.Tensor], most: int = 5) -> list[tuple[str, float]]:
    """The parts of a model, such as backbone.bottom_up.res4, with the largest gradients or weights.

    Args:
        tensors: by the name of their parameter, through DDP, too.
        most: how many parts.

    Returns:
        (name, L2 norm of the part's tensors), those that are not finite first.
    """
    squares: Counter[str] = Counter()
    for name, tensor in tensors.items():
        part = ".".join(name.removeprefix("module.").split(".")[:-1][:3])
        squares[part] += tensor.double().square().sum().item()
    norms = {part: math.sqrt(square) for part, square in squares.items()}
    return heapq.nlargest(
        most, norms.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1]
    )
