"""Weights of RetinaNet from before its towers gained norms, through the checkpointers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from support import zoo

from gn_det import inject
from gn_det.checkpoint import Checkpointer

CONFIG = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    state = zoo.build(CONFIG).head.state_dict()
    path = tmp_path / "retinanet.pth"
    torch.save({"model": {f"head.{key}": value for key, value in state.items()}}, path)
    return path, state


def test_our_checkpointer_loads_every_convolution(
    weights: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path, before = weights
    model = inject(zoo.build(CONFIG))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Checkpointer(model, str(tmp_path), optimizer=optimizer).load(str(path), checkpointables=[])
    for tower in ("cls_subnet", "bbox_subnet"):
        for old, new in ((0, 0), (2, 3), (4, 6), (6, 9)):
            expected = before[f"{tower}.{old}.weight"]
            assert torch.equal(getattr(model.head, tower)[new].weight, expected)


def test_detectron2s_own_checkpointer_is_told_what_it_drops(
    weights: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, _ = weights
    with pytest.raises(RuntimeError, match=r"lack head\.cls_subnet\.4\.weight.*gn_det\.checkpoint"):
        DetectionCheckpointer(inject(zoo.build(CONFIG))).load(str(path))
