"""The stages of a conversion from BN to GN, and the metric at each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gn_det.files import whole_file
from gn_det.injection import convert_bn, distill, inject
from gn_det.injection.convert_bn import Calibration, Call, bn_sites
from gn_det.injection.features import Features, level_errors

__all__ = [
    "CHECKPOINT",
    "FINE_TUNED",
    "WEIGHTS",
    "Conversion",
    "ToDistill",
    "convert_in_stages",
    "write_weights",
]

# What a conversion writes into its folder: the converted model, the run of fine-tuning, and while
# it lasts the state of the distillation.
WEIGHTS = "model_gn.pth"
FINE_TUNED = "fine_tuned"
CHECKPOINT = "distillation.checkpoint"


@dataclass(frozen=True)
class ToDistill:
    """What the converted model learns from, see :func:`gn_det.distill`.

    Attributes:
        batches: of training pictures.
        held_out: batches for the error of each level.
        features: called with a model and a batch, returns the levels.
        steps: how long.
        checkpoint: file of its state, from which an interrupted one goes on. It is removed when the
            conversion is done.
    """

    batches: Iterable[Any]
    held_out: Sequence[Any]
    features: Callable[[nn.Module, Any], Features]
    steps: int
    checkpoint: Path


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_in_stages` found.

    Attributes:
        calibration: the error of each norm.
        metric: by stage, in their order: "BN", "copied" (GN with γ, β of the BN), "calibrated",
            "distilled", "fine-tuned"; without what was not asked for.
        levels: by stage, from "copied" to "distilled": the error of each level of features on
            held-out pictures, see :class:`gn_det.injection.distill.Distillation`.
        losses: of each step of the distillation.
    """

    calibration: Calibration
    metric: dict[str, float]
    levels: dict[str, dict[str, float]] = field(default_factory=dict)
    losses: tuple[float, ...] = ()


def convert_in_stages(
    model: nn.Module,
    batches: Iterable[Any],
    call: Call,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    keep: Callable[[nn.Module, Conversion], None] | None = None,
    to_distill: ToDistill | None = None,
    fine_tune: Callable[[nn.Module], None] | None = None,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    min_channels_per_group: int = 1,
    weight_standardization: bool = False,
) -> Conversion:
    """Convert every BN layer of a model to GN, in place, and evaluate what each stage makes of it.

    Args:
        model, batches, call, num_groups, channels_per_group, min_channels_per_group: see
            :func:`gn_det.convert_bn`.
        evaluate: the metric of a model, before, after conversion, calibration, distillation and
            fine-tuning.
        keep: is given the calibrated model and what was found so far, to save both; and again the
            distilled one.
        to_distill: what the calibrated model learns from the model with BN; None for nothing.
        fine_tune: trains the model, in place.
        weight_standardization: whether the calibrated model standardizes its weights from then on,
            see :func:`gn_det.inject`.

    Raises:
        InputError: see :func:`gn_det.convert_bn`.
    """
    options: dict[str, Any] = {
        "num_groups": num_groups,
        "channels_per_group": channels_per_group,
        "min_channels_per_group": min_channels_per_group,
    }
    metric: dict[str, float] = {}
    levels: dict[str, dict[str, float]] = {}
    losses: tuple[float, ...] = ()
    teacher = None if to_distill is None else copy.deepcopy(model)

    def measure(stage: str, at_that_stage: nn.Module) -> None:
        if evaluate is not None:
            metric[stage] = evaluate(at_that_stage)

    def compare(stage: str, student: nn.Module) -> None:
        if to_distill is not None and teacher is not None:
            levels[stage] = level_errors(student, teacher, to_distill.held_out, to_distill.features)

    def found() -> Conversion:
        return Conversion(calibration, dict(metric), dict(levels), losses)

    sites = bn_sites(model, **options)
    measure("BN", model)
    if evaluate is not None or to_distill is not None:
        copied = inject(copy.deepcopy(model), sites, **options)
        measure("copied", copied)
        compare("copied", copied)
        del copied
    calibration = convert_bn(model, batches, call, sites, **options)
    measure("calibrated", model)
    compare("calibrated", model)
    if keep is not None:
        keep(model, found())
    if weight_standardization:
        inject(model, sites, weight_standardization=True)
    if to_distill is not None and teacher is not None:
        distillation = distill(
            model,
            teacher,
            to_distill.batches,
            steps=to_distill.steps,
            call=to_distill.features,
            held_out=to_distill.held_out,
            checkpoint=to_distill.checkpoint,
        )
        levels["distilled"], losses = distillation.after, distillation.losses
        measure("distilled", model)
        if keep is not None:
            keep(model, found())
    if fine_tune is not None:
        fine_tune(model)
        measure("fine-tuned", model)
    if to_distill is not None:
        to_distill.checkpoint.unlink()
    return found()


def write_weights(model: nn.Module, folder: Path) -> None:
    """Write a model's state to WEIGHTS, whole or not at all."""
    with whole_file(folder / WEIGHTS) as file:
        torch.save({"model": model.state_dict()}, file)
