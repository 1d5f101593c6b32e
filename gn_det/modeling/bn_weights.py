"""Weights with BN: a warning for a model with GN, as no name or shape shows it; and damage."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from gn_det.errors import InputError
from gn_det.text import shortened

__all__ = ["check_variances", "log_once", "warn_of_bn_weights"]


def warn_of_bn_weights(cfg: CfgNode) -> None:
    """Warn where MODEL.WEIGHTS names weights of Detectron2's catalog that have BN.

    A hand-over has their statistics.
    """
    weights = cfg.MODEL.WEIGHTS
    catalog = re.search(r"ImageNetPretrained/(?!.*GN)", weights)
    if catalog and not cfg.MODEL.GN.HAND_OVER_STEPS:
        log_once(
            f"MODEL.WEIGHTS, {weights}, has BN: GN takes its γ and β without its statistics"
            f"{_frozen(cfg)}. Name weights with GN, such as "
            "catalog://ImageNetPretrained/FAIR/R-50-GN with MODEL.RESNETS.STRIDE_IN_1X1 False, "
            "hand over from BN by MODEL.GN.HAND_OVER_STEPS, or convert a trained model by "
            "gn_det.convert_bn"
        )


def _frozen(cfg: CfgNode) -> str:
    stages = cfg.MODEL.BACKBONE.FREEZE_AT
    return f", and MODEL.BACKBONE.FREEZE_AT {stages} freezes them so" if stages > 0 else ""


@functools.cache
def log_once(text: str) -> None:
    """Log a warning, the first time."""
    logging.getLogger("gn_det").warning(text)


def check_variances(state: Mapping[str, Any], file: str | Path) -> None:
    """Check that no running variance is below 0, whose features would be no numbers.

    Args:
        state: tensors by name.
        file: that they are from.

    Raises:
        InputError: one is.
    """
    negative = [
        name for name, value in state.items() if name.endswith("running_var") and (value < 0).any()
    ]
    if negative:
        raise InputError(
            f"{file} is refused: the variances of BN are negative in {shortened(negative, 3)}; is "
            "it damaged?"
        )
