"""The training loop, where something is wrong before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import ConstantParamScheduler
from torch import nn

from gn_det import InputError
from gn_det.checkpoint import Checkpointer
from gn_det.engine.loop import fit
from gn_det.engine.step import AccumulatingTrainer
from gn_det.studies.paper.features import FeatureDistribution


class Model(nn.Linear):
    """One weight, and its product with the batch as the loss."""

    def forward(self, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": super().forward(torch.stack(batch)).sum()}


def test_what_a_hook_refuses_comes_through(tmp_path: Path) -> None:
    model = Model(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = AccumulatingTrainer(model, [[torch.ones(1)]] * 3, optimizer)
    with pytest.raises(InputError, match="Model has no module 'wieght'"):
        fit(
            trainer,
            Checkpointer(model, str(tmp_path), trainer=trainer),
            WarmupParamScheduler(ConstantParamScheduler(1.0), 0.1, 0.1),
            3,
            weights="",
            resume=False,
            checkpoint_period=10,
            more_hooks=[FeatureDistribution(tmp_path / "features.json", "wieght")],
        )
