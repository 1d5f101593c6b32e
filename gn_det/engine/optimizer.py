"""Detectron2's optimizer, with a learning rate of its own for what starts from trained weights."""

from __future__ import annotations

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from torch import nn

from gn_det.errors import InputError

__all__ = ["build_optimizer"]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Detectron2's optimizer, whose body learns at SOLVER.BACKBONE_MULTIPLIER of the rate.

    The body is what is below an FPN, or else the backbone: what ImageNet weights are of. FPN and
    heads, which begin at random, can learn faster so.

    Args:
        cfg: whole.
        model: as it trains.

    Raises:
        InputError: SOLVER.BACKBONE_MULTIPLIER is not 1, and the model has no backbone that trains.
    """
    optimizer = solver.build_optimizer(cfg, model)
    multiplier = cfg.SOLVER.BACKBONE_MULTIPLIER
    if multiplier == 1.0:
        return optimizer
    backbone = getattr(model, "backbone", None)
    body = getattr(backbone, "bottom_up", backbone)
    of_body = {*body.parameters()} if body is not None else set()
    if of_body.isdisjoint(p for group in optimizer.param_groups for p in group["params"]):
        raise InputError(
            f"SOLVER.BACKBONE_MULTIPLIER is {multiplier:g}, and {type(model).__name__} has no "
            "backbone that trains: set it to 1, or MODEL.BACKBONE.FREEZE_AT lower"
        )
    # lr_factor_func of get_default_optimizer_params does not reach biases with a rate of their own.
    groups = []
    for group in optimizer.param_groups:
        inside = [parameter for parameter in group["params"] if parameter in of_body]
        outside = [parameter for parameter in group["params"] if parameter not in of_body]
        slower = {**group, "params": inside, "lr": group["lr"] * multiplier}
        groups += [each for each in ({**group, "params": outside}, slower) if each["params"]]
    optimizer.param_groups[:] = groups
    return optimizer
