"""The stages of a conversion from BN to GN, and the metric at each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gn_det.injection import convert_bn, inject
from gn_det.injection.convert_bn import Calibration, Call, bn_sites
from gn_det.utils import whole_file

__all__ = ["FINE_TUNED", "WEIGHTS", "Conversion", "convert_in_stages", "write_weights"]

# What a conversion writes into its folder: the calibrated model, and the run of fine-tuning.
WEIGHTS = "model_gn.pth"
FINE_TUNED = "fine_tuned"


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_in_stages` found.

    Attributes:
        calibration: the error of each norm.
        metric: by stage, in their order: "BN", "copied" (GN with γ, β of the BN), "calibrated",
            "fine-tuned"; without what was not asked for.
    """

    calibration: Calibration
    metric: dict[str, float]


def convert_in_stages(
    model: nn.Module,
    batches: Iterable[Any],
    call: Call,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    keep: Callable[[nn.Module, Conversion], None] | None = None,
    fine_tune: Callable[[nn.Module], None] | None = None,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
) -> Conversion:
    """Convert every BN layer of a model to GN, in place, and evaluate what each stage makes of it.

    Args:
        model, batches, call, num_groups, channels_per_group: see
            :func:`gn_det.convert_bn`.
        evaluate: the metric of a model, before, after conversion, calibration and fine-tuning.
        keep: is given the calibrated model and what was found before fine-tuning, to save both.
        fine_tune: trains the calibrated model, in place.

    Raises:
        InputError: see :func:`gn_det.convert_bn`.
    """
    options = {"num_groups": num_groups, "channels_per_group": channels_per_group}
    metric: dict[str, float] = {}

    def measure(stage: str, at_that_stage: nn.Module) -> None:
        if evaluate is not None:
            metric[stage] = evaluate(at_that_stage)

    sites = bn_sites(model, **options)
    measure("BN", model)
    if evaluate is not None:
        measure("copied", inject(copy.deepcopy(model), sites, **options))
    conversion = Conversion(convert_bn(model, batches, call, sites, **options), metric)
    measure("calibrated", model)
    if keep is not None:
        keep(model, conversion)
    if fine_tune is not None:
        fine_tune(model)
        measure("fine-tuned", model)
    return conversion


def write_weights(model: nn.Module, folder: Path) -> None:
    """Write a model's state to WEIGHTS, whole or not at all."""
    with whole_file(folder / WEIGHTS) as file:
        torch.save({"model": model.state_dict()}, file)
