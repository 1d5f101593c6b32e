"""What a training step costs: bytes kept for the backward pass, and time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from tqdm import tqdm

from gn_det.checkpoint import Checkpointer
from gn_det.data.train_loader import build_train_loader
from gn_det.engine.activation_memory import kept_for_backward
from gn_det.engine.stopwatch import seconds_of_step
from gn_det.studies.comparison.matrix import Run
from gn_det.studies.comparison.results import Cost

__all__ = ["costs_of", "saved_bytes", "step_seconds"]


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


def costs_of(runs: Sequence[Run]) -> list[Cost]:
    """Cost of a step of every recipe as it ended, on the first images that the runs train on."""
    costs = []
    for ims_per_gpu in dict.fromkeys(run.ims_per_gpu for run in runs):
        models, batch = {}, None
        for run in runs:
            if run.ims_per_gpu != ims_per_gpu or run.recipe in models or not run.finished:
                continue
            cfg = run.cfg.clone()
            cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = ims_per_gpu, 0
            cfg.MODEL.GN.HAND_OVER_STEPS = 0
            batch = batch or next(iter(build_train_loader(cfg)))
            models[run.recipe] = build_model(cfg).train()
            Checkpointer(models[run.recipe]).load(str(run.folder / "model_final.pth"))
        seconds = step_seconds(models, batch)
        costs += [
            Cost(
                name,
                ims_per_gpu,
                saved_bytes(model, batch) / 2**20 / ims_per_gpu,
                seconds[name] / ims_per_gpu,
            )
            for name, model in models.items()
        ]
    return costs
