"""SOLVER.BACKBONE_MULTIPLIER: what learns at which rate."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler
from support.programs import ROOT
from torch import nn

from gn_det import InputError
from gn_det.config import load_config
from gn_det.engine.optimizer import build_optimizer
from gn_det.engine.trainer import build_model

SMALL = ROOT / "configs/small/quickstart.yaml"


def config(*keys: str) -> CfgNode:
    return load_config(SMALL, ["MODEL.DEVICE", "cpu", "SOLVER.BASE_LR", "0.04", *keys])


def rates(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, tuple[float, float]]:
    """Learning rate and weight decay of each parameter."""
    return {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("multiplier", ["1.0", "0.5"])
def test_the_body_alone_learns_at_another_rate(multiplier: str) -> None:
    cfg = config("SOLVER.BACKBONE_MULTIPLIER", multiplier, "SOLVER.WEIGHT_DECAY_NORM", "0.0")
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    found = rates(optimizer)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == {*trained.values()}
    norms = {p for m in model.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters()}
    for name, parameter in trained.items():
        factor = float(multiplier) if ".bottom_up." in name else 1.0
        decay = 0.0 if parameter in norms else cfg.SOLVER.WEIGHT_DECAY
        assert found[parameter] == pytest.approx((0.04 * factor, decay)), name
    # The schedule keeps the ratio.
    scheduler = build_lr_scheduler(cfg, optimizer)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    assert len({*scheduler.base_lrs}) == (1 if multiplier == "1.0" else 2)


def test_a_multiplier_that_changes_nothing_is_an_error() -> None:
    cfg = config("SOLVER.BACKBONE_MULTIPLIER", "0.5", "MODEL.BACKBONE.FREEZE_AT", "5")
    with pytest.raises(InputError, match=r"BACKBONE_MULTIPLIER is 0.5, and GN\w+ has no backbone"):
        build_optimizer(cfg, build_model(cfg))
